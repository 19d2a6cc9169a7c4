"""InvarDiff's books for FLUX."""

from pathlib import Path

import pytest
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)

import stepgraph as sg
from helpers.published import T, book, column, flux_book, imported, imported_flux
from stepgraph.compiler.importers import EXPORTERS, invardiff_flux_book
from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan


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
