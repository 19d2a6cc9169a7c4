"""The published files themselves, where they are at hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from typer.testing import CliRunner

import stepgraph as sg
from helpers.full_size import full_size
from helpers.paths import PUBLISHED
from helpers.published import T, column, imported
from stepgraph.cli.main import app
from stepgraph.compiler.importers import invardiff_book, invardiff_flux_book, smoothcache_schedule
from stepgraph.compiler.models.dit import DIT
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan


@pytest.fixture(scope="module")
def dit_xl() -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(**DIT.random["dit-xl-2-256"]).eval()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published plan files are not at hand")
def test_the_published_invardiff_book_has_its_published_counts(dit_xl):
    path = PUBLISHED / "invardiff_dit_xl2_50_slow.json"
    plan = sg.import_plan(path, dit_xl, DDIMScheduler(), steps=50)
    steps = "..##.######.####.##...##..##.....##...####.#####.."
    assert column(plan, "hidden").replace("C", ".").replace("R", "#") == steps
    counts = {count.kind: count for count in plan.summary().kinds}
    assert counts["hidden"].reused == 29
    assert (counts["attn"].reused, counts["ff"].reused) == (55, 55)
    assert round(plan.summary().ideal_speedup, 2) == 2.63
    exported, published = invardiff_book.export(plan), json.loads(path.read_text())
    active = [step for step, hit in enumerate(published["step_cache_book"]) if not hit]
    assert exported["step_cache_book"] == published["step_cache_book"]
    for key in ("msa_cache_book", "mlp_cache_book"):
        assert [exported[key][step] for step in active] == [published[key][step] for step in active]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published plan files are not at hand")
def test_the_published_l2c_schedule_has_its_published_share(dit_xl):
    path = PUBLISHED / "smoothcache_dit_xl2_50_l2c.json"
    plan = sg.import_plan(path, dit_xl, DDIMScheduler(), steps=50)
    reused = sum(row.count("R") for row in plan.rows)
    assert round(100 * reused / (25 * 56), 2) == 47.43  # of the module calls of the 25 routed steps
    assert all("R" not in row for row in plan.rows[::2])
    assert smoothcache_schedule.export(plan) == json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published plan files are not at hand")
@pytest.mark.parametrize(
    ("name", "hits", "ideal", "projected"),
    [
        # Of 11 active steps with 19 double and 38 single blocks each; 36 % of the attentions in both files.
        ("fast", {"attn": 76 + 151, "context_attn": 76, "ff": 76, "context_ff": 60, "mlp": 151}, 3.54, 3.98),
        ("med1", {"attn": 76 + 151, "context_attn": 76, "ff": 0, "context_ff": 0, "mlp": 0}, 3.00, 3.00),
    ],
)
def test_the_published_flux_books_have_their_published_counts(name, hits, ideal, projected):
    path = PUBLISHED / f"invardiff_flux_28_{name}.json"
    plan = sg.import_plan(path, full_size("flux-dev"), FlowMatchEulerDiscreteScheduler(), steps=28)
    assert column(plan, "hidden").replace("C", ".").replace("R", "#") == "..#.######.###.#######......"
    counts = {count.kind: count for count in plan.summary().kinds}
    assert counts["hidden"].reused == 17
    assert {kind: counts[kind].reused for kind in hits} == hits
    for kind in ("attn", "context_attn"):
        assert round(100 * counts[kind].reused / (11 * counts[kind].sites)) == 36
    assert (counts["proj_out"].reused, counts["proj_out"].dead) == (0, 17 * 38)
    assert round(plan.summary().ideal_speedup, 2) == ideal
    assert invardiff_flux_book.export(plan) == json.loads(path.read_text())
    # Where both inputs of a single block's projection are stored values, so is what it makes of them.
    blocks = [f"single_transformer_blocks.{i}" for i in range(38)]
    both = {b: zip(column(plan, f"{b}.attn"), column(plan, f"{b}.act_mlp"), strict=True) for b in blocks}
    actions = {site.name: column(plan, site.name).replace(".", "C") for site in plan.sites}
    actions |= {f"{b}.proj_out": "".join("R" if pair == ("R", "R") else "C" for pair in both[b]) for b in blocks}
    header = replace(plan.header, policy="manual")
    assert round(CachePlan.build(header, plan.sites, actions).summary().ideal_speedup, 2) == projected


@pytest.mark.slow
def test_flux_dev_is_planned_for_on_the_command_line(tmp_path: Path):
    """A book for its 19 double and 38 single blocks; no machine has to hold its weights."""
    double = {name: [[s == 1] * 19 for s in range(3)] for name in ("attn", "context_attn", "ff", "context_ff")}
    single = {name: [[s == 1] * 38 for s in range(3)] for name in ("attn", "mlp")}
    data = {"step_cache_book": [False] * 3, "transformer_cache_book": double, "single_transformer_cache_book": single}
    (tmp_path / "book.json").write_text(json.dumps(data))
    command = ["plan", "import", str(tmp_path / "book.json"), "--model", "flux-dev:random", "--steps", "3", "--json"]
    result = CliRunner().invoke(app, [*command, "--dtype", "bfloat16", "-o", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    plan = CachePlan.load(tmp_path / "plan.json")
    assert json.loads(result.output)["kinds"]["mlp"]["reused"] == 38
    assert plan.header.shapes["img_ids"] == (4096, 3)
    # The head, the time embedding, the modulations and the single blocks' projections are what is left at step 1.
    n, c = 4096 + 512, 3072
    left = 38 * n * 5 * c * c
    assert plan.header.macs - sum(
        s.macs for s in plan.sites if s.kind in ("attn", "context_attn", "ff", "context_ff", "mlp")
    ) == (pytest.approx(left, rel=0.01))


def test_keys_of_published_files_are_read_as_they_stand(model, tmp_path: Path):
    routers = [torch.full((4,), 5.0), torch.full((4,), -5.0), torch.full((4,), -5.0), torch.full((4,), -5.0)]
    listed = imported({"routers": routers}, model, tmp_path / "list.pt")
    shuffled = imported({"routers": {str(i): routers[i] for i in (2, 0, 3, 1)}}, model, tmp_path / "shuffled.pt")
    assert shuffled.rows == listed.rows
    whole = {i: torch.randn(4) for i in range(4)}
    uvit = tmp_path / "whole-numbers.pth"
    assert imported(whole, model, uvit).rows == imported({str(i): v for i, v in whole.items()}, model, uvit).rows
    for data, said in [
        ({"routers": [r.int() for r in routers]}, r"routers\[3\] is of dtype torch.int32; expected floating-point"),
        ({"routers": [r.to(torch.complex64) for r in routers]}, "expected floating-point logits"),
    ]:
        with pytest.raises(PlanError, match=said):
            imported(data, model, tmp_path / "dtype.pt")
    one = [1, 0, 1, 0]
    for key in ("attn-00", "attn-\u0661"):
        with pytest.raises(PlanError, match="no known plan format"):
            imported({"attn-0": one, key: one, "mlp-0": one, "mlp-1": one}, model, tmp_path / "a.json")
    (tmp_path / "twice.json").write_text('{"attn": [1, 0, 1, 0], "attn": [1, 1, 1, 1], "mlp": [1, 1, 1, 1]}')
    with pytest.raises(PlanError, match=r"twice\.json: .*'attn' appears more than once"):
        sg.import_plan(tmp_path / "twice.json", model, DDIMScheduler(), steps=T)
