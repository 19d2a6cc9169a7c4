"""Covariances of increments, against forward hooks on the same sampling runs."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.corrections import measured_errors
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.compiler.lowrank.covariance_passes import SpilledTensors, bytes_of, plan_passes
from stepgraph.compiler.lowrank.covariance_sums import SketchSum
from stepgraph.compiler.lowrank.covariances import Covariances, measure_covariances
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.compiler.lowrank.increments import find_maps, find_single_map_sites, find_targets
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.errors import PlanError
from stepgraph.runtime.sampling.sample import sample

STEPS, SAMPLES, SEED, SCALE = 5, 2, 3, 2.0
SETTINGS = {"steps": STEPS, "samples": SAMPLES, "seed": SEED, "guidance_scale": SCALE}


@pytest.fixture(scope="module")
def whole(dit) -> Covariances:
    return measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, whole=True)


def watched(model, paths: list[str]) -> list[list[dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    """(input, output) of some modules at every step of every run."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: seen.update({path: ((args or [kwargs["hidden_states"]])[0], out)}),
            with_kwargs=True,
        )
        for path in paths
    ]
    generator, runs = torch.Generator().manual_seed(SEED), []
    for number in range(SAMPLES):
        start, taken = torch.randn(1, 4, 8, 8, generator=generator), []
        given = {
            "class_labels": torch.tensor([number]),
            "negative_class_labels": torch.tensor([model.config.num_embeds_ada_norm]),
        }
        sample(
            model,
            tiny_scheduler("ddim"),
            start,
            SCALE,
            steps=STEPS,
            on_step=lambda *_, taken=taken: taken.append(dict(seen)),
            **given,
        )
        runs.append(taken)
    for hook in hooks:
        hook.remove()
    return runs


def increments(runs, path: str, side: int, period: int) -> torch.Tensor:
    """[rows, C] float64 of all skipped steps."""
    found = []
    for run in runs:
        for step, values in enumerate(run):
            if step % period:
                stored = run[step - step % period][path][side]
                found.append((values[path][side] - stored).double().flatten(0, -2))
    return torch.cat(found)


def test_covariances_are_those_of_the_increments_that_hooks_see(dit, whole):
    linears = [path for path in whole.inputs if isinstance(dit.get_submodule(path), nn.Linear)]
    runs = watched(dit, linears)
    assert len(linears) == 2 * 6
    for path in linears:
        dx = increments(runs, path, 0, 2)
        wanted = dx.T @ dx / len(dx)
        assert torch.allclose(whole.matrix(path), wanted, rtol=1e-4, atol=1e-6 * float(wanted.diagonal().max())), path
        numbers = whole.numbers[whole.name_of(path)]
        assert numbers["rows"] == len(dx) == SAMPLES * 2 * 2 * 16
        assert numbers["trace"] == pytest.approx(float(dx.square().sum(1).mean()), rel=1e-5)
        assert numbers["fourth"] == pytest.approx(float(dx.square().sum(1).square().mean()), rel=1e-5)
    # q, k and v read one value, as does the site that they lie in.
    for block in range(2):
        names = [f"transformer_blocks.{block}.attn1{end}" for end in ("", ".to_q", ".to_k", ".to_v")]
        assert len({whole.name_of(name) for name in names}) == 1
    assert sum(name.startswith("xx/") for name in whole.tensors) == 2 * 4


def test_several_periods_are_pooled(dit):
    found = measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, period=(3, 2))
    path = "transformer_blocks.1.ff.net.2"
    runs = watched(dit, [path])
    dx = torch.cat([increments(runs, path, 0, period) for period in (2, 3)])
    wanted = dx.T @ dx / len(dx)
    assert found.periods == (2, 3)
    assert torch.allclose(found.matrix(path), wanted, rtol=1e-4, atol=1e-6 * float(wanted.diagonal().max()))


def test_whole_modules_have_the_cross_moments_of_their_inputs_and_outputs(dit, whole):
    sites = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in ("attn1", "ff")]
    runs = watched(dit, sites)
    for site in sites:
        dx, dy = (increments(runs, site, side, 2) for side in (0, 1))
        cross, square = whole.cross(site)
        assert torch.allclose(cross, dy.T @ dx / len(dx), rtol=1e-4, atol=1e-6), site
        assert torch.allclose(whole.matrix(site), dx.T @ dx / len(dx), rtol=1e-4, atol=1e-6), site
        assert square == pytest.approx(float(dy.square().sum(1).mean()), rel=1e-5)


def test_a_memory_limit_makes_several_passes_with_the_same_result(dit, whole, monkeypatch, caplog):
    monkeypatch.setenv("STEPGRAPH_LOG", "info")
    progress, limit = [], 150e-6
    with caplog.at_level("INFO", logger="stepgraph.covariances"):
        found = measure_covariances(
            dit, tiny_scheduler("ddim"), **SETTINGS, whole=True, memory_gb=limit, on_step=lambda *p: progress.append(p)
        )
    assert found.passes > 1
    assert f"measured in {found.passes} passes of {SAMPLES * STEPS} evaluations" in caplog.text
    total = found.passes * SAMPLES * STEPS
    assert progress == [(n + 1, total) for n in range(total)]
    assert isinstance(found.tensors, SpilledTensors)
    assert set(found.tensors) == set(whole.tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert (found.inputs, found.numbers) == (whole.inputs, whole.numbers)
    targets = find_targets(dit, marked_graph(dit, sg.example_inputs(dit, 2)), whole=True)
    groups = plan_passes(targets, limit, None)
    assert len(groups) == found.passes
    assert [target for group in groups for target in group] == targets
    assert all(sum(bytes_of(target, None) for target in group) <= limit * 1e9 for group in groups)
    with pytest.raises(
        PlanError, match=r"measuring transformer_blocks\.0\.\S+ alone takes .* GB, more than the 1e-09 GB allowed"
    ):
        measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, memory_gb=1e-9)


@pytest.mark.parametrize("size", [4, 11, 24])
@pytest.mark.parametrize("rows", [3, 20, 200])
def test_a_sketch_lacks_no_more_than_it_says(size, rows):
    torch.manual_seed(0)
    spread = torch.logspace(0, -3, 24)
    parts = [torch.randn(rows, 24) * spread for _ in range(5)]
    sums = SketchSum(24, size, torch.device("cpu"))
    for part in parts:
        sums.add([part], {})
    dx = torch.cat(parts).double()
    covariance = dx.T @ dx / len(dx)
    sketch, numbers = sums.tensors("x")["sketch/x"].double(), sums.numbers()
    lacking = torch.linalg.eigvalsh(covariance - sketch.T @ sketch)
    slack = 1e-5 * float(covariance.diagonal().sum())
    assert sketch.shape == (size, 24)
    assert -slack <= float(lacking.min())
    assert float(lacking.max()) <= numbers["removed"] + slack
    # Frequent directions: (l - k) * removed never exceeds what the best sketch of k directions would lack.
    values = torch.linalg.eigvalsh(covariance).flip(0)
    for k in range(size):
        assert (size - k) * numbers["removed"] <= float(values[k:].sum()) + slack
    assert numbers["trace"] == pytest.approx(float(covariance.diagonal().sum()), rel=1e-5)
    if size == 24:
        assert torch.allclose(sketch.T @ sketch, covariance, atol=slack)


def test_sketched_covariances_are_close_and_keep_the_trace(dit, whole):
    found = measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, sketch=12)
    assert set(found.sketch_errors) == set(found.inputs.values())
    for path in found.inputs:
        exact, given = whole.matrix(path), found.matrix(path)
        numbers = found.numbers[found.name_of(path)]
        assert float(given.diagonal().sum()) == pytest.approx(float(exact.diagonal().sum()), rel=1e-4)
        assert float(torch.linalg.matrix_norm(given - exact, 2)) <= numbers["removed"] * 1.01 + 1e-6
        assert found.directions(path) == 12
        assert whole.directions(path) is None


def test_round_trip_and_damaged_files(whole, tmp_path):
    path = tmp_path / "covariances.safetensors"
    whole.save(path)
    read = Covariances.load(path)
    for name in ("header", "guidance_scale", "periods", "conditioning", "inputs", "numbers", "passes"):
        assert getattr(read, name) == getattr(whole, name), name
    assert set(read.tensors) == set(whole.tensors)
    assert all(torch.equal(read.tensors[name], whole.tensors[name]) for name in whole.tensors)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PlanError, match="not a complete stepgraph-covariances file"):
        Covariances.load(path)
    with pytest.raises(PlanError, match=r"no file at .*make covariances with"):
        Covariances.load(tmp_path / "none")


FF = "transformer_blocks.0.ff.net.2"
ATTN = "transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("tensors", "numbers", "message"),
    [
        ({f"xx/{FF}": torch.zeros(128)}, {}, rf"xx/{FF} is float32 \[128\]; expected float32 \[rows, C\]"),
        ({f"xx/{FF}": torch.zeros(128, 64)}, {}, rf"xx/{FF} is float32 \[128, 64\]; expected float32 \[C, C\]"),
        ({f"xx/{FF}": torch.zeros(128, 128).double()}, {}, "is float64"),
        ({f"xx/{FF}": None}, {}, rf"the covariance of '{FF}' is missing; expected a tensor xx/{FF} or sketch/{FF}"),
        ({f"yx/{ATTN}": torch.zeros(32, 31)}, {}, rf"yx/{ATTN} is float32 \[32, 31\]; expected float32 \[rows, 32\]"),
        ({"yx/nose": torch.zeros(32, 32)}, {}, "yx/nose is given, but no input of 'nose'"),
        ({}, {FF: {"rows": 1, "trace": 1.0}}, rf"the numbers of '{FF}' are .*; expected a finite number 'fourth' among them"),
        ({}, {ATTN: {}}, rf"the numbers of '{ATTN}' are .*; expected a finite number"),
    ],
)
def test_refuses_damaged_tensors_and_numbers(whole, tmp_path, tensors, numbers, message):
    path = tmp_path / "covariances.safetensors"
    kept = {name: tensor for name, tensor in {**whole.tensors, **tensors}.items() if tensor is not None}
    replace(whole, tensors=kept, numbers={**whole.numbers, **numbers}).save(path)
    with pytest.raises(PlanError, match=r"covariances\.safetensors: .*" + message):
        Covariances.load(path)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rows": 1, "trace": "1", "fourth": 1}, r"\['trace'\] is '1'; expected a number"),
        (None, " is None; expected a mapping by name"),
    ],
)
def test_numbers_that_are_none_are_refused_where_they_are_given(whole, numbers, message):
    with pytest.raises(PlanError, match="the covariances' numbers.*" + message):
        replace(whole, numbers={**whole.numbers, FF: numbers})


def test_a_covariance_of_another_size_than_its_map_is_refused(dit, whole):
    other = replace(whole, tensors={**whole.tensors, f"xx/{FF}": torch.eye(64)})
    with pytest.raises(PlanError, match=rf"{FF}: the covariance is \[64, 64\]; expected \[128, 128\]"):
        factorize(dit, other, rank=4)
    with pytest.raises(PlanError, match=rf"{FF}: the covariance is \[64, 64\]; expected \[128, 128\]"):
        measured_errors(dit, factorize(dit, method="svd", rank=4), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"period": 1}, "period is 1; expected a whole number of at least 2"),
        ({"period": ()}, r"period is \(\)"),
        ({"samples": 0}, "samples is 0"),
        ({"steps": 1}, "1 steps are 1 evaluation of the model, in which nothing changes"),
        ({"memory_gb": 0}, "memory_gb is 0; expected a number above 0"),
        ({"sketch": 1}, "sketch is 1; expected a whole number of at least 2"),
        ({"sketch": 8, "whole": True}, "whole modules need whole covariances"),
        ({"kinds": ["mlp"]}, r"kinds is \['mlp'\]; this model's module sites are of the kinds attn, ff"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
    ],
)
def test_refuses_what_cannot_be_measured(dit, changes, message):
    with pytest.raises(PlanError, match=message):
        measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS | changes)


def test_kinds_leave_the_other_sites_out(dit):
    found = measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS | {"samples": 1}, kinds=["ff"])
    assert {path.split(".")[2] for path in found.inputs} == {"ff"}
    with pytest.raises(PlanError, match=r"no covariance of 'transformer_blocks\.0\.attn1\.to_q' was measured"):
        found.matrix("transformer_blocks.0.attn1.to_q")
    with pytest.raises(
        PlanError, match=r"the outputs of 'transformer_blocks\.0\.ff' were not measured; measure with whole=True"
    ):
        found.cross("transformer_blocks.0.ff")


def test_noise_that_does_not_come_from_the_seed_is_refused(dit):
    with pytest.raises(PlanError, match="is stochastic"):
        measure_covariances(dit, diffusers.EulerAncestralDiscreteScheduler(), **SETTINGS)


class InPlace(nn.Module):
    """A feed-forward that writes to its input behind its first map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        h = x * 1.0
        out = self.inner(h)
        h.mul_(0.0)
        return out + h


def test_values_that_are_written_to_are_taken_as_the_map_reads_them():
    model = tiny_dit(seed=1)
    model.transformer_blocks[0].ff = InPlace(model.transformer_blocks[0].ff).eval()
    path = "transformer_blocks.0.ff.inner.net.0.proj"
    found = measure_covariances(model, tiny_scheduler("ddim"), **SETTINGS)
    plain = tiny_dit(seed=1)
    wanted = measure_covariances(plain, tiny_scheduler("ddim"), **SETTINGS)
    assert torch.allclose(found.matrix(path), wanted.matrix("transformer_blocks.0.ff.net.0.proj"), rtol=1e-5)


def tiny_flux() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def test_joint_attention_has_maps_but_no_whole_map():
    model, tokens, text = tiny_flux(), 6, 5
    marked = marked_graph(model, {
        "hidden_states": torch.zeros(1, tokens, 4), "encoder_hidden_states": torch.zeros(1, text, 32),
        "pooled_projections": torch.zeros(1, 32), "timestep": torch.zeros(1), "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
    })  # fmt: skip
    maps = set(find_maps(model, marked, ["attn"]))
    joint = {f"transformer_blocks.0.attn.{name}" for name in ("to_q", "add_q_proj", "to_out.0", "to_add_out")}
    assert joint | {"single_transformer_blocks.0.attn.to_q"} <= maps
    assert "single_transformer_blocks.0.proj_out" in find_maps(model, marked)
    assert set(find_single_map_sites(marked)) == {
        "transformer_blocks.0.ff", "transformer_blocks.0.ff_context", "single_transformer_blocks.0.attn",
        "single_transformer_blocks.0.act_mlp", "single_transformer_blocks.0.proj_out",
    }  # fmt: skip
    with pytest.raises(PlanError, match=r"transformer_blocks\.0\.attn has several calls or outputs.*leave out attn"):
        find_single_map_sites(marked, ["attn"])
    # Projected before the module that is the site.
    assert set(find_maps(model, marked, ["mlp"])) == {"single_transformer_blocks.0.proj_mlp"}
    with pytest.raises(PlanError, match="sites of kind context_attn hold no linear map; those of attn"):
        find_maps(model, marked, ["context_attn"])
    text_maps = [t for t in find_targets(model, marked) if "transformer_blocks.0.ff_context.net.0.proj" in t.readers]
    assert [t.rows for t in text_maps] == [text]


def test_a_value_that_never_changes_is_a_degenerate_covariance(dit, whole):
    path = "transformer_blocks.0.ff.net.2"
    name = whole.name_of(path)
    still = replace(
        whole,
        tensors={**whole.tensors, f"xx/{name}": torch.zeros(128, 128)},
        numbers={**whole.numbers, name: {"rows": 1, "trace": 0.0}},
    )
    with pytest.raises(
        PlanError, match=r"covariance of 'transformer_blocks\.0\.ff\.net\.2' is degenerate: what it reads never changes"
    ):
        still.matrix(path)
    broken = replace(whole, tensors={**whole.tensors, f"xx/{name}": torch.full((128, 128), torch.nan)})
    with pytest.raises(PlanError, match="degenerate: it holds NaN or infinite values"):
        broken.matrix(path)
