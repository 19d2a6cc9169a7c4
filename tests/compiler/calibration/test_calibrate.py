"""Calibration: its tables against forward hooks on the eager model, and its file."""

import json
import multiprocessing

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

import stepgraph as sg
from helpers.families import FLUX, flux_inputs
from helpers.oracle import run_loop
from helpers.oracle_families import run_flow
from helpers.tiny import tiny_dit, tiny_scheduler
from helpers.watched import SAMPLES, SEED, STEPS, watched_values
from stepgraph.errors import PlanError
from stepgraph.scheduler import refuse_stochastic


@pytest.fixture(scope="module")
def stats(dit):
    return sg.calibrate(dit, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED)


def mean_of(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def l1(value) -> torch.Tensor:
    return value.double().abs().sum()


def test_tables_are_those_of_forward_hooks(dit, stats):
    runs = watched_values(dit, tiny_scheduler("ddim"), SAMPLES)
    for column, site in enumerate(stats.sites):
        for step in range(STEPS):
            z = [[run[s][site.name].double() for s in range(STEPS)] for run in runs]
            expected = {
                ("magnitude",): mean_of(v[step].abs().mean() for v in z),
                ("norm",): mean_of(v[step].norm() for v in z),
            }
            for lag in range(1, step + 1):
                expected["change", lag] = mean_of((v[step] - v[step - lag]).abs().mean() for v in z)
                expected["relative", lag] = mean_of(l1(v[step] - v[step - lag]) / l1(v[step]) for v in z)
            if step:
                expected["ratio",] = mean_of((v[step].norm(dim=-1) / v[step - 1].norm(dim=-1)).mean() for v in z)
            for (name, *lag), value in expected.items():
                table = getattr(stats, name)
                found = table[lag[0] - 1, step, column] if lag else table[step, column]
                assert found.item() == pytest.approx(value, rel=1e-6), (site.name, name, lag)
            for other in range(STEPS):
                mse = mean_of(((v[step] - v[other]) ** 2).mean() for v in z)
                cosine = mean_of((v[step] * v[other]).sum() / v[step].norm() / v[other].norm() for v in z)
                # These values have no more elements than the sample takes.
                assert stats.mse[column, step, other].item() == pytest.approx(mse, rel=1e-4, abs=1e-10), site.name
                assert stats.cosine[column, step, other].item() == pytest.approx(cosine, rel=1e-6), site.name
    assert not stats.change[:, 0].any()
    assert not stats.change[1, 1].any()
    assert torch.allclose(stats.relative_change, stats.change[0] / stats.magnitude)
    assert (stats.header.seed, stats.header.samples, stats.header.guidance) == (SEED, SAMPLES, "none")
    assert all(table.dtype == torch.float64 for table in stats.tables.values())


def test_the_timestep_embedding_and_the_times(dit, stats):
    scheduler = tiny_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    embed = dit.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        e = [embed.timestep_embedder(embed.time_proj(t.reshape(1))).double() for t in scheduler.timesteps]
    for step in range(1, STEPS):
        assert stats.embedding[step].item() == pytest.approx(float(l1(e[step] - e[step - 1]) / l1(e[step - 1])), rel=1e-6)
    assert stats.embedding[0] == 0
    assert (stats.ms > 0).all()
    kinds = [site.kind for site in stats.sites]
    # A reused output saves everything, a block what its modules save and more.
    assert stats.ms.argmax() == kinds.index("output")
    assert stats.ms[kinds.index("block")] > stats.ms[kinds.index("attn")] + stats.ms[kinds.index("ff")]


def test_guided_runs_have_two_branches(dit):
    stats = sg.calibrate(dit, tiny_scheduler("ddim"), steps=STEPS, samples=1, seed=SEED, guidance_scale=3.0)
    assert (stats.branches, stats.guidance_scale, stats.header.guidance) == (("cond", "uncond"), 3.0, "batched")
    site, seen, halves = "transformer_blocks.1.ff", [], {}
    hook = dit.transformer_blocks[1].ff.register_forward_hook(lambda module, args, out: seen.append(out.double()))
    generator = torch.Generator().manual_seed(SEED)
    labels = {"class_labels": torch.tensor([0])}, {"class_labels": torch.tensor([dit.config.num_embeds_ada_norm])}
    run_loop(dit, tiny_scheduler("ddim"), torch.randn(1, 4, 8, 8, generator=generator), STEPS, 3.0, *labels)
    hook.remove()
    column = [s.name for s in stats.sites].index(site)
    for half, branch in enumerate(("cond", "uncond")):
        own = stats.of_branch(branch)
        assert own.branches == (branch,)
        halves[branch] = own
        for step in range(STEPS):
            wanted = seen[step][half].abs().mean().item()
            assert own.magnitude[step, column].item() == pytest.approx(wanted, rel=1e-6)
    assert not torch.allclose(halves["cond"].magnitude, halves["uncond"].magnitude)
    assert torch.allclose(stats.magnitude, (halves["cond"].magnitude + halves["uncond"].magnitude) / 2)
    assert torch.equal(halves["cond"].mse, stats.mse)
    with pytest.raises(PlanError, match="unknown branch 'nose'; these statistics have cond, uncond"):
        stats.of_branch("nose")


def test_channel_means_are_those_of_hooks_on_the_linear_maps(dit, stats):
    names = [
        f"transformer_blocks.1.{name}" for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2")
    ]
    seen = {(name, side): [] for name in names for side in ("input", "output")}

    def keep(name):
        def hook(module, args, out):
            seen[name, "input"].append(args[0].double())
            seen[name, "output"].append(out.double())

        return hook

    hooks = [dit.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    watched_values(dit, tiny_scheduler("ddim"), SAMPLES)
    for hook in hooks:
        hook.remove()

    def means(name, side, what):
        """Per-channel means [C] of every sample and step."""
        values = seen[name, side]
        runs = [values[i : i + STEPS] for i in range(0, len(values), STEPS)]
        if what == "change":
            return [(b - a).abs().mean((0, 1)) for run in runs for a, b in zip(run, run[1:], strict=False)]
        return [value.abs().mean((0, 1)) for run in runs for value in run]

    for name in names:
        for side in ("input", "output"):
            for what in ("magnitude", "change"):
                own = means(name, side, what)
                together = own
                if "to_out" not in name and "attn1" in name and side == "output":
                    parts = [means(other, side, what) for other in names[:3]]
                    together = [torch.cat(three) for three in zip(*parts, strict=True)]
                scaled = [(v - t.min() + 1e-6) / (t.max() - t.min() + 1e-6) for v, t in zip(own, together, strict=True)]
                for form, wanted in (("", own), ("_scaled", scaled)):
                    found = stats.channels[f"{name}/{side}_{what}{form}"]
                    assert torch.allclose(found, torch.stack(wanted).mean(0), rtol=1e-6, atol=1e-9), (name, side, what, form)
    assert len(stats.channels) == 2 * 6 * 8
    assert not sg.calibrate(dit, tiny_scheduler("ddim"), steps=STEPS, samples=1, channels=False).channels


def test_flux_normalises_an_attentions_maps_together_and_the_mlps_projection_alone():
    """In a single block q, k, v and the MLP's projection read one value; only the first three are one attention's."""
    torch.manual_seed(0)
    model, scheduler = diffusers.FluxTransformer2DModel(**FLUX).eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    block = "single_transformer_blocks.1"
    names = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    given = flux_inputs(1)
    conditioning = {name: value for name, value in given.items() if name not in ("hidden_states", "timestep")}
    settings = {"steps": STEPS, "samples": 1, "seed": SEED, "inputs": given, "conditioning": conditioning}
    found = sg.calibrate(model, scheduler, **settings).channels
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name, taken in seen.items():
        hook = lambda _, __, out, taken=taken: taken.append(out.double().abs().mean((0, 1)))  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    noise = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(SEED))
    run_flow(model, scheduler, STEPS, {**given, "hidden_states": noise})
    for number, name in enumerate(names):
        family = names[:3] if number < 3 else names[3:]
        wanted = []
        for step, own in enumerate(seen[name]):
            together = torch.cat([seen[other][step] for other in family])
            wanted.append((own - together.min() + 1e-6) / (together.max() - together.min() + 1e-6))
        assert torch.allclose(found[f"{name}/output_magnitude_scaled"], torch.stack(wanted).mean(0), rtol=1e-4), name


def test_a_killed_calibration_goes_on_where_it_was(dit, stats, tmp_path):
    path = tmp_path / "unfinished.safetensors"
    arguments = {"steps": STEPS, "samples": 3, "seed": SEED, "checkpoint": path}
    whole = sg.calibrate(dit, tiny_scheduler("ddim"), **arguments | {"checkpoint": None})
    calls = []

    def killed(done, total):
        calls.append(done)
        if done == STEPS + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sg.calibrate(dit, tiny_scheduler("ddim"), **arguments, on_step=killed)
    assert path.is_file()
    again = []
    resumed = sg.calibrate(dit, tiny_scheduler("ddim"), **arguments, on_step=lambda *progress: again.append(progress))
    # The first sample is not run again, and counts once.
    assert again == [(n + 1, 3 * STEPS) for n in range(STEPS, 3 * STEPS)]
    same_tables(resumed, whole)
    finished = sg.calibrate(dit, tiny_scheduler("ddim"), **arguments, on_step=lambda *progress: pytest.fail("ran again"))
    same_tables(finished, whole)
    for other in ({"seed": 9}, {"samples": 4}, {"guidance_scale": 2.0}, {"channels": False}):
        with pytest.raises(PlanError, match=r"unfinished\.safetensors was left by another calibration \(.*differ"):
            sg.calibrate(dit, tiny_scheduler("ddim"), **arguments | other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PlanError, match=r"unfinished\.safetensors: not a complete"):
        sg.calibrate(dit, tiny_scheduler("ddim"), **arguments)


def same_tables(first, second, **tolerance):
    assert first.tables.keys() == second.tables.keys()
    assert first.channels.keys() == second.channels.keys()
    for name, table in (*first.tables.items(), *first.channels.items()):
        # Times are measured anew.
        if name != "ms":
            other = second.tables.get(name, second.channels.get(name))
            assert torch.allclose(table, other, **tolerance) if tolerance else torch.equal(table, other), name


def calibrate_in_group(folder, rank):
    """A forked child, one of two."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    stats = sg.calibrate(tiny_dit(), tiny_scheduler("ddim"), steps=3, samples=3, seed=4)
    if rank == 1:
        stats.save(folder / "stats.safetensors")
    with pytest.raises(PlanError, match="samples is 1; expected at least 2, because each of the 2 processes runs its own"):
        sg.calibrate(tiny_dit(), tiny_scheduler("ddim"), steps=3, samples=1)
    distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_two_processes_give_what_one_gives(dit, tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=calibrate_in_group, args=(tmp_path, rank), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    one = sg.calibrate(dit, tiny_scheduler("ddim"), steps=3, samples=3, seed=4)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    two = sg.CalibrationStats.load(tmp_path / "stats.safetensors")
    same_tables(two, one, rtol=1e-12, atol=1e-15)


STOCHASTIC = [
    (diffusers.DDPMScheduler(), "DDPMScheduler is stochastic"),
    (diffusers.DDPMScheduler(variance_type="learned_range"), "DDPMScheduler is stochastic"),
    (diffusers.EulerAncestralDiscreteScheduler(), "EulerAncestralDiscreteScheduler is stochastic"),
    (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "DPMSolverMultistepScheduler is stochastic"),
    (diffusers.LCMScheduler(), "LCMScheduler is stochastic"),
    (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "FlowMatchEulerDiscreteScheduler is stochastic"),
]


@pytest.mark.parametrize(("scheduler", "said"), STOCHASTIC, ids=lambda value: type(value).__name__)
def test_stochastic_samplers_are_refused(dit, scheduler, said):
    with pytest.raises(PlanError, match=f"{said}.*--allow-stochastic"):
        sg.calibrate(dit, scheduler, steps=3, samples=1)
    with pytest.raises(PlanError, match=said):
        sg.make_plan("full", model=dit, scheduler=scheduler, steps=3)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun", "unipc", "flow"])
def test_deterministic_samplers_are_taken(name):
    flow = {"unipc": diffusers.UniPCMultistepScheduler, "flow": diffusers.FlowMatchEulerDiscreteScheduler}
    refuse_stochastic(flow[name]() if name in flow else tiny_scheduler(name), 4)


def test_stochastic_samplers_are_taken_where_asked(dit, ddim):
    with pytest.raises(PlanError, match=r"eta is 0\.5: the sampler adds noise at every step"):
        sg.calibrate(dit, ddim, steps=3, samples=1, eta=0.5)
    noisy = sg.calibrate(dit, ddim, steps=3, samples=1, eta=0.5, allow_stochastic=True)
    plain = sg.calibrate(dit, ddim, steps=3, samples=1)
    assert not torch.equal(noisy.change, plain.change)
    # The sampler's own noise is seeded too.
    same_tables(sg.calibrate(dit, ddim, steps=3, samples=1, eta=0.5, allow_stochastic=True), noisy)
    for eta, scheduler in ((2, ddim), (0.5, tiny_scheduler("euler")), (True, ddim)):
        with pytest.raises(PlanError, match=f"eta is {eta}"):
            sg.calibrate(dit, scheduler, steps=3, samples=1, eta=eta, allow_stochastic=True)
    assert sg.calibrate(dit, diffusers.DDPMScheduler(), steps=3, samples=1, allow_stochastic=True).magnitude.isfinite().all()


def test_phase_2_goes_by_the_eta_of_the_statistics(dit, ddim):
    noisy = sg.calibrate(dit, ddim, steps=6, samples=1, eta=0.5, allow_stochastic=True)
    assert noisy.eta == 0.5
    with pytest.raises(PlanError, match=r"eta is 0\.5: the sampler adds noise"):
        sg.make_plan("invardiff", noisy, model=dit, scheduler=ddim)
    made = sg.make_plan("invardiff", noisy, model=dit, scheduler=ddim, allow_stochastic=True, step=0.0, attn=0.6, ff=0.6)
    provisional = sg.make_plan("invardiff", noisy, step=0.0, attn=0.6, ff=0.6, phase2=False)
    reused = torch.tensor([[letter == "R" for letter in row] for row in provisional.rows])
    same = sg.calibrate(dit, ddim, steps=6, samples=1, eta=0.5, allow_stochastic=True, provisional=reused)
    for kind in ("attn", "ff"):
        own = [i for i, site in enumerate(noisy.sites) if site.kind == kind]
        rate = same.rate("v1")[:, own]
        hits = rate < torch.quantile(rate[1:-1].flatten(), 0.6)
        hits[0] = hits[-1] = False
        assert hits.tolist() == [[row[i] == "R" for i in own] for row in made.rows]


def test_more_lags(dit, ddim):
    stats = sg.calibrate(dit, ddim, steps=6, samples=1, lags=5)
    few = sg.calibrate(dit, ddim, steps=6, samples=1)
    assert stats.change.shape == (5, 6, len(stats.sites))
    assert torch.equal(stats.change[:3], few.change)
    assert stats.relative[4, 5].gt(0).all()
    assert not stats.relative[4, :5].any()
    long = sg.make_plan("smoothcache", stats, alpha=100.0)
    assert long.rows[1:5] == (long.rows[1],) * 4
    with pytest.raises(PlanError, match="lags is 0; expected a whole number of at least 1"):
        sg.calibrate(dit, ddim, steps=6, samples=1, lags=0)


@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "RePaintScheduler", "DDPMWuerstchenScheduler"])
def test_samplers_that_need_more_are_named(dit, name):
    with pytest.raises(PlanError, match=f"{name} does not step from a prediction, a timestep and a sample alone"):
        sg.calibrate(dit, getattr(diffusers, name)(), steps=3, samples=1)


def test_conditioning_of_ones_own(dit, ddim):
    labels = torch.tensor([7, 2])
    own = sg.calibrate(dit, ddim, steps=3, samples=2, conditioning={"class_labels": labels})
    other = sg.calibrate(dit, ddim, steps=3, samples=2, conditioning={"class_labels": torch.tensor([0, 1])})
    example = sg.calibrate(dit, ddim, steps=3, samples=2)
    same_tables(other, example)
    assert not torch.equal(own.magnitude, other.magnitude)
    assert len({own.conditioning, other.conditioning, example.conditioning}) == 3
    with pytest.raises(PlanError, match=r"conditioning class_labels is \[2\]; expected 3 rows, one per sample"):
        sg.calibrate(dit, ddim, steps=3, samples=3, conditioning={"class_labels": labels})
    with pytest.raises(PlanError, match="other conditioning"):
        sg.make_plan("invardiff", own, model=dit, scheduler=ddim)


def test_the_picture_is_drawn(stats, tmp_path):
    figure = stats.plot(tmp_path / "stats.png")
    titles = [axis.get_title() for axis in figure.axes]
    for title in ("attn: any two steps", "ff: steps s and s - 1", "hidden: rates"):
        assert title in titles
    heat = next(axis for axis in figure.axes if axis.get_title() == "hidden: any two steps")
    column = [site.kind for site in stats.sites].index("hidden")
    assert torch.allclose(torch.as_tensor(heat.images[0].get_array().data), stats.relative_mse[column])
    assert (tmp_path / "stats.png").read_bytes()[:4] == b"\x89PNG"


def test_it_repeats_itself_and_leaves_the_model_alone(dit, stats):
    seen = []
    again = sg.calibrate(
        dit, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED, on_step=lambda *progress: seen.append(progress)
    )
    same_tables(again, stats)
    assert seen == [(n + 1, STEPS * SAMPLES) for n in range(STEPS * SAMPLES)]
    other = sg.calibrate(dit, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED + 1)
    assert not torch.equal(other.change, stats.change)
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in dit.modules())


def test_plans_from_stats_need_nothing_else(dit, stats):
    plan = sg.make_plan("interval", stats, every=2)
    direct = sg.make_plan("interval", model=dit, scheduler=tiny_scheduler("ddim"), steps=STEPS, every=2)
    assert plan.rows == direct.rows
    assert plan.sites == direct.sites == stats.sites
    assert plan.header.seed == SEED


def test_heun_counts_every_evaluation():
    stats = sg.calibrate(tiny_dit(), tiny_scheduler("heun"), steps=2, samples=1)
    assert stats.magnitude.shape == (3, 9)
    assert (stats.magnitude > 0).all()


def test_no_samples_are_refused(dit, ddim):
    for samples, expected in ((0, r" in 1\.\.1048576, because every table"), (-1, r" in 1\.\.1048576"), (1.5, ""), (True, "")):
        with pytest.raises(PlanError, match=f"samples is {samples}; expected a whole number{expected}"):
            sg.calibrate(dit, ddim, steps=2, samples=samples)
    with pytest.raises(PlanError, match="guidance_scale is -1; expected a number of at least 0"):
        sg.calibrate(dit, ddim, steps=2, samples=1, guidance_scale=-1)


# -- the file ------------------------------------------------------------------------------------------------------------


def test_file_round_trip(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    loaded = sg.CalibrationStats.load(tmp_path / "stats.safetensors")
    assert (loaded.header, loaded.sites) == (stats.header, stats.sites)
    assert (loaded.branches, loaded.guidance_scale, loaded.conditioning) == (stats.branches, 1.0, "")
    same_tables(loaded, stats)
    assert torch.equal(loaded.ms, stats.ms)


def test_truncated_files_are_refused(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match=r"stats\.safetensors: not a complete stepgraph-stats file"):
            sg.CalibrationStats.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "expected stepgraph-stats version 2; got stepgraph-stats 9"),
        ({"format": "book"}, "expected stepgraph-stats version 2; got book 2"),
        ({"sites": []}, r"magnitude is not a table of shape \[1, 3, 0\]"),
        ({"header": {"model": "x"}}, "stats.safetensors"),
        ({"branches": ["left"]}, r"stats.safetensors: branches are \['left'\]"),
        ({"header": None}, "stats.safetensors"),
        ({"sites": [{"nose": 1}]}, "stats.safetensors"),
    ],
)
def test_altered_files_are_refused(stats, tmp_path, change, message):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    with safe_open(str(path), framework="pt") as file:
        described = json.loads(file.metadata()["stepgraph"])
    save_file(load_file(path), path, metadata={"stepgraph": json.dumps(described | change)})
    with pytest.raises(PlanError, match=message):
        sg.CalibrationStats.load(path)


def test_values_that_stay_zero_have_not_changed():
    # adaLN-zero initialisation: the gates are zero, so that the stack adds nothing at any step.
    model = tiny_dit()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    stats = sg.calibrate(model, tiny_scheduler("ddim"), steps=4, samples=1)
    column = [site.name for site in stats.sites].index("stack_residual")
    assert stats.magnitude[:, column].tolist() == [0.0] * 4
    assert stats.relative[:, :, column].abs().max() == 0
    assert stats.ratio[:, column].tolist() == [1.0] * 4


def test_values_that_are_not_finite_are_refused():
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].bias[0] = float("nan")
    with pytest.raises(PlanError, match=r"transformer_blocks\.1\.ff is not finite at step 0"):
        sg.calibrate(model, tiny_scheduler("ddim"), steps=3, samples=1)
