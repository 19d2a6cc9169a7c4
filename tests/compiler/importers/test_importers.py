"""Published plan formats for DiT and PixArt: small files written here."""

import argparse
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    PixArtTransformer2DModel,
)

import stepgraph as sg
from helpers.pixart_sd3 import PIXART
from helpers.published import BLOCKS, T, book, column, imported, imported_flux
from stepgraph.compiler.importers import invardiff_book, smoothcache_schedule
from stepgraph.errors import PlanError


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
