"""Published plan formats: small files written here, and the published files themselves where they are at hand."""

import argparse
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from typer.testing import CliRunner

import stepgraph as sg
from helpers.full_size import full_size
from helpers.paths import PUBLISHED
from helpers.pixart_sd3 import PIXART
from helpers.tiny import tiny_dit
from stepgraph.cli.main import app
from stepgraph.compiler.importers import EXPORTERS, invardiff_book, invardiff_flux_book, smoothcache_schedule
from stepgraph.compiler.models.dit import DIT
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan

T, BLOCKS = 4, 2


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    return tiny_dit(num_layers=BLOCKS)


def imported(data: object, model, path: Path, steps: int = T, **options: object) -> CachePlan:
    """Write a file of a published format and import it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    else:
        torch.save(data, path)
    return sg.import_plan(path, model, DDIMScheduler(), steps=steps, **options)


def column(plan: CachePlan, site: str) -> str:
    return "".join(row[plan.index(site)] for row in plan.rows)


def book(step=(0, 1, 0, 0), msa=((0, 0), (1, 1), (0, 0), (1, 0)), mlp=((0, 0), (1, 1), (0, 0), (0, 1))) -> dict[str, object]:
    return {
        "step_cache_book": [bool(flag) for flag in step],
        "msa_cache_book": [[bool(flag) for flag in row] for row in msa],
        "mlp_cache_book": [[bool(flag) for flag in row] for row in mlp],
    }


def test_an_invardiff_book_reuses_hidden_and_modules(model, tmp_path: Path):
    plan = imported(book(), model, tmp_path / "book.json")
    assert column(plan, "hidden") == "CRCC"
    assert column(plan, "transformer_blocks.0.attn1") == "C.CR"
    assert column(plan, "transformer_blocks.1.attn1") == "C.CC"
    assert column(plan, "transformer_blocks.0.ff") == "C.CC"
    assert column(plan, "transformer_blocks.1.ff") == "C.CR"
    assert invardiff_book.export(plan) == book()


@pytest.mark.parametrize("per_module", [False, True])
def test_a_smoothcache_schedule_says_what_is_computed(model, tmp_path: Path, per_module: bool):
    schedule = {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]}
    if per_module:
        schedule = {f"{name}-{i}": flags for name, flags in schedule.items() for i in range(BLOCKS)}
    plan = imported(schedule, model, tmp_path / "schedule.json")
    for i in range(BLOCKS):
        assert column(plan, f"transformer_blocks.{i}.attn1") == "CRCR"
        assert column(plan, f"transformer_blocks.{i}.ff") == "CCRR"
    written = smoothcache_schedule.export(plan)
    again = imported(written, model, tmp_path / "again.json")
    assert again.rows == plan.rows
    if per_module:
        assert written == schedule


@pytest.mark.parametrize("flags", [[1, 0, 0, 1], [True, False, False, True]])
@pytest.mark.parametrize("key", ["attn1", "attn", "attn1-0"])
def test_what_a_smoothcache_schedule_does_not_name_is_computed(model, tmp_path: Path, key: str, flags):
    plan = imported({key: flags}, model, tmp_path / "schedule.json")
    for i in range(BLOCKS):
        assert column(plan, f"transformer_blocks.{i}.attn1") == ("CCCC" if i and key.endswith("-0") else "CRRC")
        assert column(plan, f"transformer_blocks.{i}.ff") == "CCCC"


def test_a_smoothcache_schedule_names_the_children_of_other_models_blocks(tmp_path: Path):
    schedule = {"attn1": [1, 0, 1, 0], "attn2": [1, 0, 0, 0], "ff": [1, 1, 0, 1]}
    plan = imported(schedule, PixArtTransformer2DModel(**PIXART).eval(), tmp_path / "schedule.json")
    for name, letters in {"attn1": "CRCR", "attn2": "CRRR", "ff": "CCRC"}.items():
        assert column(plan, f"transformer_blocks.1.{name}") == letters


def test_a_joint_attention_is_reused_as_a_whole(flux, tmp_path: Path):
    plan = imported_flux({"attn": [1, 0, 1, 0], "ff_context": [1, 1, 1, 0]}, flux, tmp_path / "schedule.json")
    assert {column(plan, f"transformer_blocks.1.attn{output}") for output in ("", ":1")} == {"CRCR"}
    assert column(plan, "transformer_blocks.1.ff_context") == "CCCR"
    assert column(plan, "single_transformer_blocks.0.act_mlp") == "CCCC"


def test_what_an_invardiff_book_has_no_table_of_is_computed(model, tmp_path: Path):
    plan = imported({"mlp_cache_book": book()["mlp_cache_book"]}, model, tmp_path / "book.json")
    assert [column(plan, f"transformer_blocks.{i}.ff") for i in range(2)] == ["CRCC", "CRCR"]
    assert column(plan, "transformer_blocks.0.attn1") == column(plan, "hidden") == "CCCC"
    plan = imported({"step_cache_book": [False, True, False, True]}, model, tmp_path / "book.json")
    assert column(plan, "hidden") == "CRCR"


def test_an_l2c_router_is_read_in_sampling_order(model, tmp_path: Path):
    # Ascending timestep index; odd indices are full steps whatever their logits say.
    routers = [torch.tensor([5.0, -5.0, -5.0, 5.0]), torch.full((4,), -5.0), torch.full((4,), -5.0), torch.full((4,), -5.0)]
    data = {"routers": routers, "args": argparse.Namespace(model="DiT-XL/2")}
    plan = imported(data, model, tmp_path / "router.pt")
    # Sampling steps 0..3 are the indices 3, 2, 1, 0.
    assert column(plan, "transformer_blocks.0.attn1") == "CRCC"
    assert column(plan, "transformer_blocks.0.ff") == "CRCR"
    assert column(plan, "transformer_blocks.1.attn1") == "CRCR"
    assert column(plan, "transformer_blocks.1.ff") == "CRCC"
    everything = imported(data, model, tmp_path / "router.pt", theta=0.0)
    assert all(letter == "C" for row in everything.rows for letter in row)


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("a.json", {"steps": [1, 0]}, {}, "with the keys steps is no known plan format"),
        ("a.json", [1, 0, 1, 7], {}, "list is no known plan format"),
        (
            "a.json",
            [1, 0, 1],
            {},
            r"steps_computation_mask holds 3 entries; expected 4, one per step; import it for the steps .*resample\(4",
        ),
        ("a.json", [0, 0, 1, 1], {}, "stack_residual: REUSE before any COMPUTE"),
        ("a.json", {"steps_computation_mask": [1, 0, 2, 1]}, {}, r"steps_computation_mask\[2\] holds 2"),
        (
            "a.json",
            {"steps_computation_mask": [1, 0, 1, 1], "steps_computation_policy": "dynamic"},
            {},
            "'dynamic', which decides at run time",
        ),
        ("a.json", {"steps_computation_mask": [1, 0, 1, 1], "Fn": 1}, {}, "unknown key 'Fn'"),
        ("a.json", book(step=(0, 1, 0)), {}, "step_cache_book holds 3 entries; expected 4"),
        ("a.json", book(msa=((0, 0, 0),) * 4), {}, r"msa_cache_book\[0\] is a list of 3; expected \[4\]\[2\]"),
        ("a.json", {**book(), "mlp_cache_book": [[0, "x"]] * 4}, {}, r"mlp_cache_book\[0\] holds 'x'"),
        ("a.json", book(step=(1, 1, 0, 0)), {}, "hidden: REUSE before any COMPUTE"),
        ("a.json", {"attn2": [1, 0, 1, 0]}, {}, "attn2 names attn2; the blocks of this model have attn1, ff"),
        ("a.json", {"attn": [1, 0, 1, 0], "attn1-1": [1, 1, 0, 0]}, {}, "says of transformer_blocks.1.attn1 what another key"),
        ("a.json", {"attn-0": [1] * 4, "mlp-7": [1] * 4}, {}, "mlp-7 names block 7; this model has 2 blocks"),
        ("a.json", {"attn": [1, 2, 1, 0], "mlp": [1] * 4}, {}, r"attn\[1\] holds 2"),
        ("a.json", book(), {"theta": 0.5}, "has no option 'theta'; it takes none"),
        ("a.pt", {"routers": [torch.zeros(4)] * 3}, {}, "routers holds 3 vectors; expected 4"),
        ("a.pt", {"routers": [torch.zeros(6)] * 4}, {}, r"routers\[3\] is \[6\]; expected \[4\]"),
        ("a.pt", {"routers": [torch.zeros(4)] * 4}, {"theta": 2.0}, "theta is 2.0"),
        ("a.pt", {"routers": [torch.full((4,), float("nan"))] * 4}, {}, r"routers\[3\] holds 4 logits that are NaN"),
        ("a.pt", {"routers": 5}, {}, "routers is int"),
        ("a.pt", [torch.zeros(4)] * 4, {}, "list is no known plan format"),
        ("a.pth", {"0": torch.zeros(4)}, {}, "1 routers for 4 model evaluations; expected an even number"),
        ("a.pth", {str(i): torch.zeros(5) for i in range(4)}, {}, r"'1' is \[5\]; expected \[4\], two logits per block"),
        (
            "a.pth",
            {f"x{i}": torch.zeros(4) for i in (0, 1, 2, 4)},
            {},
            "keys are x0, x1, x2, x4, ...; expected one number from 0",
        ),
        ("a.pt", {"routers": Evil()}, {}, "not a checkpoint that can be read safely"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_key_and_shape(model, tmp_path: Path, capsys, name, data, options, said):
    with pytest.raises(PlanError, match=said) as caught:
        imported(data, model, tmp_path / name, **options)
    assert name in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.json", "cut.pt"])
def test_a_truncated_file_is_refused(model, tmp_path: Path, name: str):
    whole = tmp_path / f"whole{Path(name).suffix}"
    imported(book() if name.endswith("json") else {"routers": [torch.zeros(4)] * 4}, model, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(PlanError, match=name):
        sg.import_plan(tmp_path / name, model, DDIMScheduler(), steps=T)


def test_own_plans_and_missing_files_are_told_apart(model, tmp_path: Path):
    plan = sg.make_plan("full", model=model, scheduler=DDIMScheduler(), steps=T)
    plan.save(tmp_path / "own.json")
    with pytest.raises(PlanError, match=r"read it with CachePlan\.load"):
        sg.import_plan(tmp_path / "own.json", model, DDIMScheduler(), steps=T)
    with pytest.raises(PlanError, match="no plan file"):
        sg.import_plan(tmp_path / "none.json", model, DDIMScheduler(), steps=T)


def test_what_a_format_cannot_say_is_not_written(model):
    plan = sg.make_plan("manual", model=model, scheduler=DDIMScheduler(), steps=T, actions={"output": "CRCR"})
    with pytest.raises(PlanError, match="output"):
        invardiff_book.export(plan)
    with pytest.raises(PlanError, match="holds reuse of attn, ff only; this plan has R at output"):
        smoothcache_schedule.export(plan)


# -- cache-dit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_mask_reuses_the_residual_of_the_stack(model, tmp_path: Path, wrapped: bool):
    mask: object = [1, 0, 1, 0]
    if wrapped:
        mask = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    plan = imported(mask, model, tmp_path / "mask.json")
    assert column(plan, "stack_residual") == "CRCR"
    assert column(plan, "transformer_blocks.0.attn1") == "C.C."
    assert column(plan, "hidden") == "CCCC"
    assert plan.header.policy == "import:cache-dit"


# -- FLUX ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    """Two double and three single blocks, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip


def flux_book(step: str = ".#..", **tables: tuple[str, ...]) -> dict[str, object]:
    """A book of four steps; tables like attn=("..", "##", ".#", ".."), `single_` ones with three letters a step."""
    double = {name: tables.get(name, ("..", "##", "..", "..")) for name in ("attn", "context_attn", "ff", "context_ff")}
    double["ip_attn"] = double["attn"]
    single = {name: tables.get(f"single_{name}", ("...", "###", "...", "...")) for name in ("attn", "mlp")}
    flags = lambda text: [letter == "#" for letter in text]  # noqa: E731
    return {
        "step_cache_book": flags(step),
        "transformer_cache_book": {name: [flags(row) for row in rows] for name, rows in double.items()},
        "single_transformer_cache_book": {name: [flags(row) for row in rows] for name, rows in single.items()},
    }


def imported_flux(data: object, model, path: Path, steps: int = T, **options: object) -> CachePlan:
    path.write_text(json.dumps(data))
    return sg.import_plan(path, model, FlowMatchEulerDiscreteScheduler(), steps=steps, **options)


def test_a_flux_book_speaks_of_both_makes_of_block(flux, tmp_path: Path):
    book = flux_book(
        attn=("..", "##", "..", "##"), context_attn=("..", "##", "..", "##"), ff=("..", "##", "..", "#."),
        context_ff=("..", "##", "..", ".#"), single_attn=("...", "###", "...", "##."), single_mlp=("...", "###", "...", "..#"),
    )  # fmt: skip
    plan = imported_flux(book, flux, tmp_path / "book.json")
    assert column(plan, "hidden") == "CRCC"
    double, single = "transformer_blocks.{}.{}", "single_transformer_blocks.{}.{}"
    assert {name: column(plan, double.format(i, name)) for i in (0, 1) for name in ("attn", "attn:1")} == dict.fromkeys(
        ("attn", "attn:1"), "C.CR"
    )
    assert [column(plan, double.format(i, "ff")) for i in range(2)] == ["C.CR", "C.CC"]
    assert [column(plan, double.format(i, "ff_context")) for i in range(2)] == ["C.CC", "C.CR"]
    assert [column(plan, single.format(i, "attn")) for i in range(3)] == ["C.CR", "C.CR", "C.CC"]
    assert [column(plan, single.format(i, "act_mlp")) for i in range(3)] == ["C.CC", "C.CC", "C.CR"]
    assert {column(plan, single.format(i, "proj_out")) for i in range(3)} == {"C.CC"}
    assert plan.header.policy == "import:invardiff-flux"
    assert invardiff_flux_book.export(plan) == book
    assert CachePlan.from_json(plan.to_json()) == plan


def test_flux_attention_is_skipped_only_where_both_tables_say_so(flux, tmp_path: Path):
    book = flux_book(attn=("..", "##", "#.", "##"), context_attn=("..", "##", ".#", "#."))
    plan = imported_flux(book, flux, tmp_path / "book.json")
    for output in ("attn", "attn:1"):
        assert [column(plan, f"transformer_blocks.{i}.{output}") for i in range(2)] == ["C.CR", "C.CC"]
    # What is written says what is done.
    joint = invardiff_flux_book.export(plan)["transformer_cache_book"]
    assert joint["attn"] == joint["context_attn"] == joint["ip_attn"]
    assert joint["attn"][3] == [True, False]


def test_a_flux_book_computes_the_first_step(flux, tmp_path: Path):
    every = dict.fromkeys(("attn", "context_attn", "ff", "context_ff"), ("##",) * 4)
    every |= {f"single_{name}": ("###",) * 4 for name in ("attn", "mlp")}
    plan = imported_flux(flux_book("##..", **every), flux, tmp_path / "book.json")
    assert set(plan.rows[0]) == {"C"}
    assert column(plan, "hidden") == "CRCC"
    assert column(plan, "single_transformer_blocks.2.act_mlp") == "C.RR"


def test_what_a_flux_book_has_no_table_of_is_computed(flux, tmp_path: Path):
    tables = {"attn": [[0, 0], [1, 1], [0, 0], [0, 0]], "ff": [[0, 0], [1, 0], [0, 0], [0, 0]]}
    plan = imported_flux({"transformer_cache_book": tables}, flux, tmp_path / "part.json")
    # An attention is skipped where its text says so too.
    assert [column(plan, f"transformer_blocks.{i}.ff") for i in range(2)] == ["CRCC", "CCCC"]
    assert {letter for row in plan.rows for letter in row} == {"C", "R"}
    assert sum(row.count("R") for row in plan.rows) == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (flux_book(".#."), "step_cache_book holds 3 entries; expected 4"),
        (flux_book(ff=("...",) * 4), r"transformer_cache_book.ff\[0\] is a list of 3; expected \[4\]\[2\]"),
        (flux_book(single_mlp=("..",) * 4), r"single_transformer_cache_book.mlp\[0\] is a list of 2; expected \[4\]\[3\]"),
        (
            {**flux_book(), "transformer_cache_book": {"attn": [], "mlp": []}},
            r"transformer_cache_book has the keys attn, mlp; expected some of attn, context_attn",
        ),
        (
            {**flux_book(), "single_transformer_cache_book": [1]},
            r"single_transformer_cache_book has the keys list; expected some of attn, mlp",
        ),
        (
            book(),
            "an InvarDiff cache book for DiT is for models with the module kinds attn, ff; this model has attn, context_attn",
        ),
    ],
)
def test_a_flux_book_that_does_not_fit_is_refused_by_key_and_shape(flux, tmp_path: Path, data, said):
    with pytest.raises(PlanError, match=said) as caught:
        imported_flux(data, flux, tmp_path / "flux.json")
    assert "flux.json" in str(caught.value)


def test_a_flux_book_is_for_flux(model, tmp_path: Path):
    with pytest.raises(
        PlanError, match=r"cache book for FLUX is for models with the module kinds attn, context_attn, .*has attn, ff"
    ):
        imported(flux_book(), model, tmp_path / "flux.json")


def test_each_format_writes_plans_of_its_family_only(model, flux, tmp_path: Path):
    dit_plan = imported(book(), model, tmp_path / "dit.json")
    flux_plan = imported_flux(flux_book(), flux, tmp_path / "flux.json")
    with pytest.raises(PlanError, match="a cache book for FLUX is for models with"):
        EXPORTERS["invardiff-flux"](dit_plan)
    for name in ("invardiff", "smoothcache"):
        with pytest.raises(PlanError, match="is for models with the module kinds attn, ff"):
            EXPORTERS[name](flux_plan)
    projected = sg.make_plan(
        "manual", model=flux, scheduler=FlowMatchEulerDiscreteScheduler(), steps=T, actions={"proj_out": "CRCC"}
    )
    with pytest.raises(
        PlanError, match=r"a cache book holds reuse of .* only; this plan has .* at single_transformer_blocks.0"
    ):
        EXPORTERS["invardiff-flux"](projected)


# -- U-ViT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uvit():
    """Five blocks, without weights."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    with torch.device("meta"):
        return UTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
            block_type="pre_norm", pre_layer_norm=True, use_patch_pos_embed=True,
        ).eval()  # fmt: skip


UVIT_BLOCKS = ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0.block", "out_blocks.1.block")


@pytest.mark.parametrize("name", ["{}", "routers.{}.prob"])
def test_uvit_routers_are_shifted_by_half_a_solver_step(uvit, tmp_path: Path, name: str):
    # Eight evaluations are four solver steps: routers 1, 2 and 3 are used, at the evaluations 2, 4 and 6.
    logits = torch.full((8, 10), -9.0)
    logits[1, 0] = 9.0  # block 0's attention is computed at evaluation 2
    logits[2, 5] = 9.0  # the middle block's feed-forward at evaluation 4
    logits[3, 9] = 2.0  # the last block's feed-forward at evaluation 6, if 0.88 is above theta
    # Written in an order that is not theirs.
    data = OrderedDict((name.format(i), logits[i].clone()) for i in (3, 1, 0, 2, 7, 6, 5, 4))
    torch.save(data, tmp_path / "dpm.pth")
    scheduler = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=True)
    plan = sg.import_plan(tmp_path / "dpm.pth", uvit, scheduler, steps=8)
    skipping = {f"transformer_{path}.{child}": "CCRCRCRC" for path in UVIT_BLOCKS for child in ("attn1", "ff")}
    skipping["transformer_in_blocks.0.attn1"] = "CCCCRCRC"
    skipping["transformer_mid_block.ff"] = "CCRCCCRC"
    assert {site.name: column(plan, site.name) for site in plan.sites if site.path} == skipping
    lower = sg.import_plan(tmp_path / "dpm.pth", uvit, scheduler, steps=8, theta=0.5)
    assert column(lower, "transformer_out_blocks.1.block.ff") == "CCRCRCCC"
    # Each reads what the evaluation before it stored, at the point within the solver step before.
    assert scheduler.get_order_list(8)[:6] == [1, 2, 1, 2, 1, 2]
    with pytest.raises(PlanError, match=r"is \[10\]; expected \[4\], two logits per block"):
        sg.import_plan(tmp_path / "dpm.pth", tiny_dit(num_layers=BLOCKS), DDIMScheduler(), steps=8)


# -- published files -----------------------------------------------------------------------------------------------------


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
