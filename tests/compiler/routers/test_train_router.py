"""Learning-to-Cache: pairing, training, files, and the plans that follow."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler, EulerAncestralDiscreteScheduler

import stepgraph as sg
from helpers.tiny import labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_settings import PRESETS, RouterSettings, full_steps, settings_of
from stepgraph.compiler.routers.router_states import Conditioning, NoisedLatents, Sampling, Trajectories
from stepgraph.errors import PlanError
from stepgraph.fingerprint import fingerprint

SMALL = settings_of("quick", {"iterations": 6, "batch": 8, "pool": 8})


def train(model, scheduler=None, steps: int = 4, settings=SMALL, **options) -> Router:
    return sg.train_router(model, scheduler or DDIMScheduler(), steps=steps, settings=settings, **options)


def sampling(model, steps: int = 4) -> Sampling:
    return Sampling(TracedModel(model), DDIMScheduler(), steps, sg.example_inputs(model))


def trajectories(model, size: int, steps: int = 4, batch: int = 4, dropout: float = 0.0, seed: int = 0) -> Trajectories:
    how = sampling(model, steps)
    pool = Conditioning.of_pool(how, None, size, dropout)
    return Trajectories(how, pool, size, batch, dropout, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.fixture(scope="module")
def router(model) -> Router:
    torch.manual_seed(0)
    return train(model)


# -- pairing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "run", "shift", "letters"),
    [
        (6, 1, 0, "F.F.F."),
        (5, 1, 0, "F.F.F"),
        (7, 2, 0, "F..F..F"),
        (8, 3, 0, "F...F..."),
        # Two evaluations per solver step: the cache is filled at the second one and read at the first one of the next step.
        (8, 1, 1, "FF.F.F.F"),
        (8, 2, 1, "FF..F..F"),
    ],
)
def test_which_steps_are_full(steps, run, shift, letters):
    assert "".join("F" if full else "." for full in full_steps(steps, run, shift)) == letters


@pytest.mark.parametrize("steps", [2, 10, 20, 50])
def test_pairs_are_those_of_ascending_timestep_indices(steps):
    """L2C counts indices upwards in time: odd ones are full, even ones routed."""
    by_index = [index % 2 == 1 for index in range(steps)]
    assert list(full_steps(steps)) == by_index[::-1]


# -- states --------------------------------------------------------------------------------------------------------------


def test_trajectories_are_the_states_of_real_runs(model):
    source = trajectories(model, 3, batch=2, seed=5)
    window = source.window(torch.tensor([0, 2, 3]), 1, torch.Generator().manual_seed(0))
    assert window.steps.tolist() == [[0, 2, 3], [1, 3, 3]]
    assert window.valid.tolist() == [[True] * 3, [True, True, False]]
    own = DDIMScheduler()
    own.set_timesteps(4)
    first, second = window.inputs
    for sample, step in enumerate((0, 2)):
        one = {name: value[sample : sample + 1] for name, value in first.items()}
        assert one["timestep"] == own.timesteps[step]
        predicted = model(**one).sample.chunk(2, dim=1)[0]
        moved = own.step(predicted, own.timesteps[step], one["hidden_states"]).prev_sample
        torch.testing.assert_close(second["hidden_states"][sample : sample + 1], moved, rtol=1e-5, atol=1e-5)
    expected = model(**second).sample
    torch.testing.assert_close(window.targets[0], expected, rtol=1e-5, atol=1e-5)


def test_noised_latents_follow_the_forward_process(model):
    clean = noise(3, seed=4)
    source = NoisedLatents(sampling(model), clean.expand(3, 4, 8, 8), Conditioning(labels(1, 2, 3)), dropout=0.0)
    with torch.no_grad():
        window = source.window(torch.tensor([0, 2, 0, 2] * 64), 1, torch.Generator().manual_seed(0))
    own = DDIMScheduler()
    own.set_timesteps(4)
    level = own.alphas_cumprod[window.inputs[0]["timestep"]].reshape(-1, 1, 1, 1)
    chosen = clean[window.inputs[0]["class_labels"] - 1]
    left = (window.inputs[0]["hidden_states"] - level.sqrt() * chosen) / (1 - level).sqrt()
    # What is left is standard normal: 65536 values.
    assert abs(float(left.mean())) < 0.02
    assert abs(float(left.std()) - 1) < 0.02
    one = {name: value[1:2] for name, value in window.inputs[0].items()}
    moved = own.step(model(**one).sample.chunk(2, dim=1)[0], own.timesteps[2], one["hidden_states"]).prev_sample
    torch.testing.assert_close(window.inputs[1]["hidden_states"][1:2], moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "heun"])
def test_solvers_with_a_history_take_real_runs(model, name):
    with pytest.raises(PlanError, match="needs the steps before it, so it cannot start from a noised latent; pass states="):
        train(model, tiny_scheduler(name), settings=replace(SMALL, states="q_sample"))
    trained = train(model, tiny_scheduler(name), settings=replace(SMALL, iterations=1))
    assert trained.logits.shape == (len(trained.header.timesteps), 4)


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_single_step_solvers_start_from_noised_latents(model, name):
    trained = train(model, tiny_scheduler(name), settings=replace(SMALL, states="q_sample", iterations=1))
    assert (trained.logits[1::2] != 0).all()


def test_schedulers_that_draw_noise_are_refused(model):
    before = torch.get_rng_state()
    with pytest.raises(PlanError, match="EulerAncestralDiscreteScheduler is stochastic"):
        train(model, EulerAncestralDiscreteScheduler())
    assert torch.equal(torch.get_rng_state(), before)


def test_label_dropout_takes_the_null_class(model):
    source = trajectories(model, 40, steps=2, batch=20, dropout=0.5)
    dropped = int((source.conditioning.wanted["class_labels"] == 1000).sum())
    assert 8 < dropped < 32


# -- training ------------------------------------------------------------------------------------------------------------


def test_only_logits_are_trained(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.pos_embed.proj.weight.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    trained = train(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.pos_embed.proj.weight.requires_grad_(True)
    assert trained.history.shape == (6, 2)
    moved = (trained.logits != 0).all(dim=1)
    assert moved.tolist() == [False, True, False, True]


def test_the_same_seed_trains_the_same_routers(model, router):
    assert torch.equal(train(model).logits, router.logits)
    assert not torch.equal(train(model, settings=replace(SMALL, seed=1)).logits, router.logits)


def test_the_loss_is_the_papers(model):
    """The first history entry, computed again with hooks on the eager model."""
    settings = replace(SMALL, iterations=1, batch=4, pool=4, init=1.0, label_dropout=0.0)
    trained = train(model, settings=settings)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(settings.seed))
    source = trajectories(model, 4, seed=settings.seed + 2)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    offset = int(torch.randint(2, (1,), generator=generator))
    window = source.window(torch.tensor([0, 2])[(torch.arange(4) + offset) % 2], 1, generator)
    modules = [m for block in model.transformer_blocks for m in (block.attn1, block.ff)]
    stored = {}
    errors, sums = [], []
    for sample in range(4):
        full, routed = ({name: value[sample : sample + 1] for name, value in each.items()} for each in window.inputs)
        beta = 1 / (1 + torch.exp(-weights[int(window.steps[1, sample])]))
        with torch.no_grad():
            handles = [m.register_forward_hook(lambda _m, _i, out, i=i: stored.update({i: out})) for i, m in enumerate(modules)]
            model(**full)
            [handle.remove() for handle in handles]
            teacher = model(**routed).sample
            handles = [
                m.register_forward_hook(lambda _m, _i, out, i=i, beta=beta: (1 - beta[i]) * stored[i] + beta[i] * out)
                for i, m in enumerate(modules)
            ]
            student = model(**routed).sample
            [handle.remove() for handle in handles]
        errors.append(float((student - teacher).double().square().mean()))
        sums.append(float(beta.sum()))
    assert trained.history[0].tolist() == pytest.approx([sum(errors) / 4, sum(sums) / 4], rel=1e-4)


def constant_feed_forward() -> torch.nn.Module:
    """Block 0's feed-forward returns the same at every step: reusing it costs nothing."""
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight.zero_()
        model.transformer_blocks[0].ff.net[2].bias.fill_(0.5)
    return model


def test_what_never_changes_is_learnt_as_reusable():
    trained = train(constant_feed_forward(), settings=replace(SMALL, iterations=40, lam=1e-6, batch=16))
    routed = trained.logits[1::2]
    constant = trained.sites[1].name
    assert constant == "transformer_blocks.0.ff"
    # Nothing but lam moves its logits, downwards; every other module costs something to reuse.
    assert (routed[:, 1] < -0.5).all()
    assert (routed[:, [0, 2, 3]] > 0.5).all()
    plan = trained.reused(0.5)
    assert plan[1::2].tolist() == [[False, True, False, False]] * 2
    assert not plan[::2].any()


def test_lambda_decides_what_is_left():
    model = constant_feed_forward()
    nothing = train(model, settings=replace(SMALL, iterations=20, lam=0.0))
    # Without a price only the constant module has no reason to move.
    assert (nothing.logits[1::2, 1].abs() < 1e-3).all()
    assert (nothing.logits[1::2, [0, 2, 3]] > 0).all()
    everything = train(model, settings=replace(SMALL, iterations=20, lam=1e3))
    assert (everything.logits[1::2] < 0).all()
    assert everything.reused(0.5)[1::2].all()


def test_logits_are_clamped_unless_told_otherwise(model):
    wild = replace(SMALL, iterations=3, lr=10.0, lam=1e3)
    assert float(train(model, settings=wild).logits.min()) == -5.0
    assert float(train(model, settings=replace(wild, clamp=None)).logits.min()) < -20


@pytest.mark.parametrize("changes", [{"run": 2}, {"shift": 1}, {"loss": "sum"}, {"states": "q_sample"}], ids=str)
def test_the_other_settings_train_too(model, changes):
    trained = train(model, steps=5, settings=replace(SMALL, **changes))
    routed = ~torch.tensor(trained.full)
    assert (trained.logits[routed] != 0).all()
    assert (trained.logits[~routed] == 0).all()


def test_longer_runs_read_what_the_step_before_mixed(model):
    """With run 2, the second routed step's loss depends on the first one's logits."""
    from stepgraph.compiler.marking.describe import example_inputs, make_header
    from stepgraph.compiler.marking.traced_model import marked_graph
    from stepgraph.compiler.routers.mixed_model import MixedModel
    from stepgraph.compiler.routers.train_router import _Training

    settings = replace(SMALL, run=2, batch=4)
    marked = marked_graph(model, example_inputs(model, 4))
    header = make_header(model, DDIMScheduler(), 3, marked)
    states = trajectories(model, 4, steps=3)
    training = _Training(MixedModel(model, marked), states, header, settings)
    window = states.window(torch.zeros(4, dtype=torch.int64), 2, torch.Generator().manual_seed(0))
    _, stored = training.soft.fill(window.inputs[0])
    first = torch.full((4, 4), 0.5, requires_grad=True)
    _, mixed = training.soft.mix(window.inputs[1], stored, first)
    output, _ = training.soft.mix(window.inputs[2], mixed, torch.full((4, 4), 0.5))
    (gradient,) = torch.autograd.grad(output.square().sum(), [first])
    assert (gradient != 0).all()


def test_user_data_is_noised(model):
    settings = replace(SMALL, states="q_sample", iterations=2)
    given = {"data": noise(5), "conditioning": labels(1, 2, 3, 4, 5)}
    assert train(model, settings=settings, **given).history.shape == (2, 2)


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_resumed_training_equals_an_uninterrupted_one(model, router, tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, checkpoint=path, every=2, on_step=stop)
    seen = []
    resumed = train(model, checkpoint=path, every=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 6), (6, 6)]
    assert torch.equal(resumed.logits, router.logits)
    assert torch.equal(resumed.history, router.history)
    # It can go on further than it was asked for at first.
    longer = train(model, settings=replace(SMALL, iterations=8), checkpoint=path)
    assert torch.equal(longer.logits, train(model, settings=replace(SMALL, iterations=8)).logits)


def test_a_checkpoint_of_another_training_is_refused(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train(model, checkpoint=path)
    with pytest.raises(PlanError, match=r"begun with lam 0\.0001, asked for is 0\.5; remove the file"):
        train(model, settings=replace(SMALL, lam=0.5), checkpoint=path)
    with pytest.raises(PlanError, match="trained for fingerprint"):
        train(tiny_dit(seed=1), checkpoint=path)
    with pytest.raises(PlanError, match="trained for steps 4, but the plan is for 6"):
        train(model, steps=6, checkpoint=path)
    with pytest.raises(PlanError, match="already at iteration 6, asked for are 3"):
        train(model, settings=replace(SMALL, iterations=3), checkpoint=path)


def test_a_checkpoint_of_other_data_is_refused(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    settings = replace(SMALL, states="q_sample", iterations=1)
    train(model, settings=settings, data=noise(2), conditioning=labels(1, 2), checkpoint=path)
    with pytest.raises(PlanError, match="begun on other data"):
        train(model, settings=settings, data=noise(2, seed=1), conditioning=labels(1, 2), checkpoint=path)


# -- files and plans -----------------------------------------------------------------------------------------------------


def test_a_router_file_is_read_back(router, tmp_path):
    path = tmp_path / "router.safetensors"
    router.save(path)
    again = Router.load(path)
    assert torch.equal(again.logits, router.logits)
    assert torch.equal(again.history, router.history)
    assert (again.header, again.sites, again.settings) == (router.header, router.sites, router.settings)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PlanError, match="not a complete stepgraph-router file"):
        Router.load(path)


def test_theta_decides(model, router, tmp_path):
    path = tmp_path / "router.safetensors"
    logits = torch.tensor([[-9.0] * 4, [2.0, -2.0, 0.0, 3.0], [-9.0] * 4, [-1.0, 1.0, -3.0, 0.5]])
    replace(router, logits=logits).save(path)
    wanted = {0.0: ["CCCC", "CCCC"], 0.1: ["CCCC", "CCRC"], 0.5: ["CRRC", "RCRC"], 0.9: ["RRRC", "RRRR"], 1.0: ["RRRR", "RRRR"]}
    for theta, rows in wanted.items():
        plan = sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, router=str(path), theta=theta)
        assert ["".join(row[i] for i in (0, 1, 3, 4)) for row in plan.rows] == ["CCCC", rows[0], "CCCC", rows[1]]
        assert (plan.header.policy, plan.header.arguments["theta"]) == ("l2c", theta)
    json.dumps(dict(plan.header.arguments))


def test_the_policy_trains_and_its_plan_runs(model, router):
    arguments = {"iterations": 6, "batch": 8, "pool": 8}
    plan = sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, **arguments)
    modules = [i for i, site in enumerate(plan.sites) if site.kind in ("attn", "ff")]
    reused = torch.tensor([[row[i] == "R" for i in modules] for row in plan.rows])
    assert torch.equal(reused, router.reused(0.5))
    exe = sg.compile(model, plan, sg.example_inputs(model), backend="eager", exact=True)
    assert sg.sample(exe, DDIMScheduler(), noise(), **labels(3)).isfinite().all()


def test_statistics_and_a_router_file_are_enough(model, router, tmp_path):
    router.save(tmp_path / "router.safetensors")
    stats = sg.calibrate(model, DDIMScheduler(), steps=4, samples=1)
    plan = sg.make_plan("l2c", stats, router=str(tmp_path / "router.safetensors"))
    assert plan.header.policy == "l2c"
    with pytest.raises(PlanError, match="routers are trained on the model: pass model= and scheduler="):
        sg.make_plan("l2c", stats)


def test_the_papers_checkpoint_form_reads_back_to_the_same_plan(model, router, tmp_path):
    scattered = replace(router, logits=torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * 3)
    scattered.save(tmp_path / "router.safetensors")
    scattered.export(tmp_path / "router.pt")
    for theta in (0.1, 0.5, 0.9):
        options = {"model": model, "scheduler": DDIMScheduler(), "steps": 4, "theta": theta}
        plan = sg.make_plan("l2c", router=str(tmp_path / "router.safetensors"), **options)
        assert sg.import_plan(tmp_path / "router.pt", **options).rows == plan.rows
        assert any("R" in row for row in plan.rows)


@pytest.mark.parametrize(("steps", "changes"), [(5, {}), (6, {"run": 2}), (6, {"shift": 1})], ids=str)
def test_what_the_papers_form_cannot_say_is_not_written(model, tmp_path, steps, changes):
    trained = train(model, steps=steps, settings=replace(SMALL, iterations=1, **changes))
    with pytest.raises(PlanError, match="L2C's form holds pairs over an even number of steps"):
        trained.export(tmp_path / "router.pt")
    assert not (tmp_path / "router.pt").exists()


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 1.5}, r"theta is 1\.5; expected a probability in 0\.\.1"),
        ({"preset": "nose"}, "unknown preset 'nose'; known: dit, u-vit, quick"),
        ({"router": "none.safetensors"}, r"no file at none\.safetensors; train routers with"),
        ({"router": "none.safetensors", "lam": 1.0}, "the setting 'lam' has no effect"),
        ({"batch": 0}, "batch is 0; expected a whole number of at least 1"),
        ({"lam": -1.0}, r"lam is -1\.0; expected a number of at least 0"),
        ({"lr": 0}, "lr is 0; expected a number above 0"),
        ({"states": "nose"}, "states is 'nose'; expected one of q_sample, trajectory"),
        ({"train": None}, "no argument 'train'"),
        ({"shift": 3}, "with run 1 and shift 3 none of the 4 steps is routed"),
    ],
    ids=str,
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(PlanError, match=message):
        sg.make_plan("l2c", model=model, scheduler=DDIMScheduler(), steps=4, **arguments)


def test_bad_data(model):
    noised = replace(SMALL, states="q_sample")
    with pytest.raises(PlanError, match=r"data is \[2, 3\]; expected clean latents \[N, 4, 8, 8\]"):
        train(model, settings=noised, data=torch.zeros(2, 3))
    with pytest.raises(PlanError, match="conditioning lacks class_labels, which DiTTransformer2DModel needs"):
        train(model, settings=noised, data=noise(2))
    with pytest.raises(PlanError, match=r"conditioning class_labels is \[3\]; expected 2 rows, one per sample"):
        train(model, settings=noised, data=noise(2), conditioning=labels(1, 2, 3))
    with pytest.raises(PlanError, match="states is 'trajectory', where the model samples"):
        train(model, data=noise(2), conditioning=labels(1, 2))


def test_a_model_that_gives_nan_is_named():
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].bias.fill_(float("nan"))
    with pytest.raises(PlanError, match="the loss is nan at iteration 1"):
        train(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_router_of_another_model_or_schedule_is_refused(router, tmp_path):
    router.save(tmp_path / "router.safetensors")
    options = {"scheduler": DDIMScheduler(), "router": str(tmp_path / "router.safetensors")}
    with pytest.raises(PlanError, match="trained for fingerprint"):
        sg.make_plan("l2c", model=tiny_dit(seed=1), steps=4, **options)
    with pytest.raises(PlanError, match="trained for steps 4, but the plan is for 6"):
        sg.make_plan("l2c", model=tiny_dit(), steps=6, **options)
    # One that was trained before contents were told by sums fits its model still.
    old = replace(router, header=replace(router.header, fingerprint=fingerprint(tiny_dit(), like="0/0")))
    old.save(tmp_path / "router.safetensors")
    plans = [sg.make_plan("l2c", model=tiny_dit(), steps=4, **options)]
    router.save(tmp_path / "router.safetensors")
    plans.append(sg.make_plan("l2c", model=tiny_dit(), steps=4, **options))
    assert plans[0].rows == plans[1].rows
    old.save(tmp_path / "router.safetensors")
    with pytest.raises(PlanError, match="trained for fingerprint"):
        sg.make_plan("l2c", model=tiny_dit(seed=1), steps=4, **options)


def test_presets_are_the_papers_settings():
    paper = RouterSettings()
    assert (paper.lr, paper.clamp, paper.label_dropout, paper.batch, paper.loss) == (1e-3, 5.0, 0.1, 64, "mean")
    assert settings_of("dit") == paper
    shifted = settings_of("u-vit")
    assert (shifted.lam, shifted.loss, shifted.clamp, shifted.shift) == (0.1, "sum", None, 1)
    assert all(settings_of(name) for name in PRESETS)
    with pytest.raises(PlanError, match="routers have no setting 'nose'"):
        settings_of("dit", {"nose": 1})


def test_the_uvit_preset_trains_under_its_solver(dit):
    scheduler = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=True)
    settings = settings_of("u-vit", {"iterations": 2, "batch": 4, "pool": 4, "init": 0.0})
    router = sg.train_router(dit, scheduler, steps=6, settings=settings)
    assert router.full == (True, True, False, True, False, True)
    moved = (router.logits != 0).any(dim=1).tolist()
    assert moved == [not full for full in router.full]


def test_a_router_whose_step_is_not_drawn_stands_still(dit):
    def trained(iterations: int) -> torch.Tensor:
        settings = RouterSettings(iterations=iterations, batch=1, pool=2, init=0.0, lr=0.1, states="trajectory")
        return sg.train_router(dit, DDIMScheduler(), steps=8, settings=settings).logits

    before = torch.zeros(8, trained(1).shape[1])
    for iterations in (1, 2, 3, 4):
        now = trained(iterations)
        # One sample per iteration is one routed step: momentum moves no other.
        assert int((now != before).any(dim=1).sum()) == 1
        before = now
