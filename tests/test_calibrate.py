"""Calibration: its tables against forward hooks on the eager model, and its file."""

import json

import pytest
import torch
from conftest import tiny_dit, tiny_scheduler
from oracle import run_loop
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stepgraph as sg
from stepgraph.compiler.stats import table_shapes
from stepgraph.plan import PlanError

STEPS, SAMPLES, SEED = 3, 2, 4


@pytest.fixture(scope="module")
def stats(dit):
    return sg.calibrate(dit, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED)


def watched_values(model, scheduler, samples: int, steps: int = STEPS, seed: int = SEED) -> list[list[dict[str, torch.Tensor]]]:
    """Values of all sites by sample and step, from forward hooks."""
    blocks = model.transformer_blocks
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, args, kwargs, out: seen.update({name: (out[0] if isinstance(out, tuple) else out).clone()})

    def first_tokens(module, args, kwargs):
        seen["tokens_in"] = args[0].clone()

    hooks = [blocks[0].register_forward_pre_hook(first_tokens, with_kwargs=True)]
    for number, block in enumerate(blocks):
        path = f"transformer_blocks.{number}"
        for name, module in ((f"{path}.attn1", block.attn1), (f"{path}.ff", block.ff), (path, block)):
            hooks.append(module.register_forward_hook(keep(name), with_kwargs=True))
    hooks.append(model.register_forward_hook(keep("output"), with_kwargs=True))
    generator, runs = torch.Generator().manual_seed(seed), []
    for sample in range(samples):
        taken: list[dict[str, torch.Tensor]] = []

        def predict(taken=taken, **given):
            out = model(**given)
            seen["hidden"] = seen[f"transformer_blocks.{len(blocks) - 1}"]
            seen["stack_residual"] = seen["hidden"] - seen["tokens_in"]
            taken.append(dict(seen))
            return out

        noise = torch.randn(1, 4, 8, 8, generator=generator)
        run_loop(predict, scheduler, noise, steps, 1.0, {"class_labels": torch.tensor([sample])})
        runs.append(taken)
    for hook in hooks:
        hook.remove()
    return runs


def test_tables_are_those_of_forward_hooks(dit, stats):
    runs = watched_values(dit, tiny_scheduler("ddim"), SAMPLES)
    for column, site in enumerate(stats.sites):
        for step in range(STEPS):
            values = [run[step][site.name] for run in runs]
            magnitude = sum(v.double().abs().mean() for v in values) / SAMPLES
            assert stats.magnitude[step, column].item() == pytest.approx(magnitude.item(), rel=1e-6), site.name
            before = [run[step - 1][site.name] for run in runs] if step else values
            change = sum((v - b).double().abs().mean() for v, b in zip(values, before, strict=True)) / SAMPLES
            assert stats.change[step, column].item() == pytest.approx(change.item(), rel=1e-6), site.name
    assert stats.magnitude.dtype == stats.change.dtype == torch.float64
    assert torch.equal(stats.change[0], torch.zeros(len(stats.sites), dtype=torch.float64))
    assert torch.allclose(stats.relative_change, stats.change / stats.magnitude)
    assert (stats.header.seed, stats.header.samples, stats.header.guidance) == (SEED, SAMPLES, "none")


def test_it_repeats_itself_and_leaves_the_model_alone(dit, stats):
    seen = []
    again = sg.calibrate(
        dit, tiny_scheduler("ddim"), steps=STEPS, samples=SAMPLES, seed=SEED, on_step=lambda *progress: seen.append(progress)
    )
    for name in table_shapes(0, 0):
        assert torch.equal(getattr(again, name), getattr(stats, name)), name
    assert torch.equal(again.change, stats.change)
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
    with pytest.raises(PlanError, match="samples is 0; expected a whole number of at least 1"):
        sg.calibrate(dit, ddim, steps=2, samples=0)


# -- the file ------------------------------------------------------------------------------------------------------------


def test_file_round_trip(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    loaded = sg.CalibrationStats.load(tmp_path / "stats.safetensors")
    assert (loaded.header, loaded.sites) == (stats.header, stats.sites)
    assert torch.equal(loaded.magnitude, stats.magnitude)
    assert torch.equal(loaded.change, stats.change)


def test_truncated_files_are_refused(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match=r"stats\.safetensors: not a complete statistics file"):
            sg.CalibrationStats.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "expected stepgraph-stats version 1; got stepgraph-stats 9"),
        ({"format": "book"}, "expected stepgraph-stats version 1; got book 1"),
        ({"sites": []}, r"magnitude is not a table of shape \[3, 0\]"),
        ({"header": {"model": "x"}}, "stats.safetensors"),
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
