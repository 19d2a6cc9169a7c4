"""Published plan formats: small files written here, and the published files themselves where they are at hand."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_dit
from diffusers import DDIMScheduler, DiTTransformer2DModel

import stepgraph as sg
from stepgraph.compiler.importers import invardiff_book, smoothcache_schedule
from stepgraph.compiler.models.dit import DIT
from stepgraph.plan import CachePlan, PlanError

PUBLISHED = Path(__file__).parents[2] / "shared" / "plans"
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
        ("a.json", [1, 0, 1, 0], {}, "list is no known plan format"),
        ("a.json", book(step=(0, 1, 0)), {}, r"step_cache_book is a list of 3; expected \[4\]"),
        ("a.json", book(msa=((0, 0, 0),) * 4), {}, r"msa_cache_book\[0\] is a list of 3; expected \[4\]\[2\]"),
        ("a.json", {**book(), "mlp_cache_book": [[0, "x"]] * 4}, {}, r"mlp_cache_book\[0\] holds 'x'"),
        ("a.json", book(step=(1, 1, 0, 0)), {}, "hidden: REUSE before any COMPUTE"),
        ("a.json", {"attn": [1, 0, 1, 0]}, {}, "expected attn and mlp"),
        ("a.json", {"attn-0": [1] * 4, "mlp-7": [1] * 4}, {}, "mlp-7 names block 7; this model has 2 blocks"),
        ("a.json", {"attn": [1, 2, 1, 0], "mlp": [1] * 4}, {}, r"attn\[1\] holds 2"),
        ("a.json", book(), {"theta": 0.5}, "has no option 'theta'; it takes none"),
        ("a.pt", {"routers": [torch.zeros(4)] * 3}, {}, "routers holds 3 vectors; expected 4"),
        ("a.pt", {"routers": [torch.zeros(6)] * 4}, {}, r"routers\[3\] is \[6\]; expected \[4\]"),
        ("a.pt", {"routers": [torch.zeros(4)] * 4}, {"theta": 2.0}, "theta is 2.0"),
        ("a.pt", {"routers": 5}, {}, "routers is int"),
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
    with pytest.raises(PlanError, match="holds reuse of attn and ff only"):
        smoothcache_schedule.export(plan)


@pytest.fixture(scope="module")
def full_size() -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(**DIT.random["dit-xl-2-256"]).eval()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published plan files are not at hand")
def test_the_published_invardiff_book_has_its_published_counts(full_size):
    path = PUBLISHED / "invardiff_dit_xl2_50_slow.json"
    plan = sg.import_plan(path, full_size, DDIMScheduler(), steps=50)
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
def test_the_published_l2c_schedule_has_its_published_share(full_size):
    path = PUBLISHED / "smoothcache_dit_xl2_50_l2c.json"
    plan = sg.import_plan(path, full_size, DDIMScheduler(), steps=50)
    reused = sum(row.count("R") for row in plan.rows)
    assert round(100 * reused / (25 * 56), 2) == 47.43  # of the module calls of the 25 routed steps
    assert all("R" not in row for row in plan.rows[::2])
    assert smoothcache_schedule.export(plan) == json.loads(path.read_text())
