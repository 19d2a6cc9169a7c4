"""The runtime benchmark on small models: what it counts, compares and refuses. Nothing here looks at a clock."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import stepgraph as sg
from helpers.children import environment
from helpers.oracle import Oracle, run_loop
from helpers.small_glyphs import save_small_glyph_dit
from helpers.tiny import noise, tiny_dit, tiny_scheduler
from stepgraph.bench.speed import books, compile_once, runtime, runtime_costs
from stepgraph.bench.speed.contenders import CONTENDERS, Contender, Setting, chosen, hooked, mask_macs, ours
from stepgraph.bench.speed.hook_runtime import HookRuntime
from stepgraph.bench.speed.interleave import Timed, loop_of, refuse_wrong_results, take_turns
from stepgraph.bench.speed.peer_cache_dit import CacheDit, FirstBlockAndResidual
from stepgraph.cli.main import app
from stepgraph.errors import CompileError, PlanError

BLOCKS, T = 2, 8
# A DiT block has six linear maps in its sites (q, k, v, out; two of the feed-forward), and four beside them.
IN_ATTN, IN_FF = 4, 2
COND, UNCOND = {"class_labels": torch.tensor([3])}, {"class_labels": torch.tensor([1000])}


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Path:
    """A folder with a book and a schedule in the published formats, 4 steps and 2 blocks, written by hand."""
    folder = tmp_path_factory.mktemp("plans")
    book = {
        "step_cache_book": [False, False, True, False],
        "msa_cache_book": [[False, False], [True, False], [False, False], [True, True]],
        "mlp_cache_book": [[False, False], [False, True], [False, False], [False, True]],
    }
    schedule = {"attn-0": [1, 0, 1, 0], "attn-1": [1, 1, 1, 1], "mlp-0": [1, 0, 1, 1], "mlp-1": [1, 0, 1, 0]}
    (folder / books.BOOK).write_text(json.dumps(book))
    (folder / books.L2C).write_text(json.dumps(schedule))
    return folder


@pytest.fixture
def setting(dit, ddim, plans: Path) -> Setting:
    return Setting(dit, ddim, 4, 2, "eager", plans)


def column(plan, site: str) -> str:
    return "".join(row[plan.index(site)] for row in plan.rows)


# -- the hook runtime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", books.NAMES)
def test_hooks_give_what_the_oracle_gives(dit, ddim, plans: Path, name: str):
    plan = books.plan_named(name, dit, ddim, 4, plans)
    runtime_, oracle = HookRuntime(dit, plan), Oracle.of(dit, plan)
    given, _ = run_loop(runtime_, ddim, noise(), 4, 2.0, COND, UNCOND)
    expected, _ = run_loop(oracle, ddim, noise(), 4, 2.0, COND, UNCOND)
    assert torch.equal(given, expected)
    runtime_.refuse_other_counts()


def test_a_reused_module_does_not_run(dit, ddim, plans: Path):
    hooks = HookRuntime(dit, books.plan_named("slow", dit, ddim, 4, plans))
    inside = Counter()
    for path, module in hooks.model.named_modules():
        kind = next((kind for kind in ("attn1", "ff") if f".{kind}." in path), "beside")
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, __, kind=kind: inside.update([kind]))
    run_loop(hooks, ddim, noise(), 4, 1.0, COND)
    # By the book: attention 0 runs in step 0, attention 1 in 0 and 1; feed-forward 0 in 0, 1 and 3, feed-forward 1 in 0.
    assert inside["attn1"] == 3 * IN_ATTN
    assert inside["ff"] == 4 * IN_FF
    assert [sum(ran.values()) for ran in hooks.ran] == [6, 4, 0, 3]


def test_the_model_keeps_its_forwards_and_shares_its_weights(dit, ddim, plans: Path):
    hooks = HookRuntime(dit, books.plan_named("fora2", dit, ddim, 4, plans))
    assert "forward" not in vars(dit.transformer_blocks[0].attn1)
    assert all(a is b for a, b in zip(dit.parameters(), hooks.model.parameters(), strict=True))


def test_counts_that_differ_from_the_plan_are_refused(dit, ddim, plans: Path):
    hooks = HookRuntime(dit, books.plan_named("fora2", dit, ddim, 4, plans))
    run_loop(hooks, ddim, noise(), 4, 1.0, COND)
    hooks.ran[1]["transformer_blocks.1.ff"] += 1
    with pytest.raises(PlanError, match=r"step 1: transformer_blocks\.1\.ff ran 1 times; the plan says 0"):
        hooks.refuse_other_counts()


def test_a_plan_that_hooks_do_not_know_is_refused(dit, ddim):
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=2, actions={"stack_residual": "CR"})
    with pytest.raises(PlanError, match="step 1: the hook runtime cannot run R at stack_residual"):
        HookRuntime(dit, plan)


def test_a_run_has_as_many_steps_as_the_plan(dit, ddim, plans: Path):
    hooks = HookRuntime(dit, books.plan_named("full", dit, ddim, 1, plans))
    run_loop(hooks, ddim, noise(), 1, 1.0, COND)
    with pytest.raises(PlanError, match="all 1 steps"):
        hooks(hidden_states=noise(), timestep=torch.tensor([1]), **COND)


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_books_are_read_at_equal_distances(dit, ddim, plans: Path):
    slow = books.plan_named("slow", dit, ddim, 8, plans)
    # Every step of the file twice.
    assert column(slow, "hidden") == "CCCCRRCC"
    assert column(slow, "transformer_blocks.0.attn1") == "CCRR..RR"
    assert column(books.plan_named("mask", dit, ddim, 2, plans), "hidden") == "CR"
    l2c = books.plan_named("l2c", tiny_dit(num_layers=4), ddim, 4, plans)
    # Every block of the file twice.
    assert [column(l2c, f"transformer_blocks.{i}.ff") for i in range(4)] == ["CRCC", "CRCC", "CRCR", "CRCR"]


def test_missing_books_and_unknown_names_are_errors(dit, ddim, tmp_path: Path):
    with pytest.raises(PlanError, match=r"no published plan at .*--plans"):
        books.plan_named("slow", dit, ddim, 4, tmp_path)
    with pytest.raises(PlanError, match="unknown plan 'fast'; known: full"):
        books.plan_named("fast", dit, ddim, 4, tmp_path)


@pytest.mark.slow
def test_the_published_books_have_the_published_ideals():
    if not books.PUBLISHED.is_dir():
        pytest.skip("the published plans are not beside the checkout")
    model = compile_once.load_model("dit-xl-2-256:random", "meta", torch.bfloat16)
    scheduler = tiny_scheduler("ddim")
    slow, l2c = (books.plan_named(name, model, scheduler, 50) for name in ("slow", "l2c"))
    assert round(slow.summary().ideal_speedup, 2) == 2.63
    assert round(l2c.summary().ideal_speedup, 2) == 1.31
    found = runtime_costs.memory(slow, 2)
    # 28 blocks of two modules, and the tokens behind them, in 50 steps.
    assert (found["tensor_steps"], found["tensor_steps_always"]) == (248, 57 * 50)
    # All values have one size: 256 tokens of 1152 channels in two bytes.
    assert found["byte_steps"] == 248 * 2 * 256 * 1152 * 2


# -- turns and checks ----------------------------------------------------------------------------------------------------


def test_contenders_agree_and_take_turns(setting: Setting):
    names = chosen(["stepgraph: full", "stepgraph: slow", "stepgraph: fora2"], "eager")
    loop = loop_of(setting.model, setting.scheduler, 4, 2, 2.0)
    timed = take_turns([CONTENDERS[name](setting) for name in names], loop, 4, 2)
    refuse_wrong_results(timed, 1e-5)
    for entry in timed:
        assert sum(len(own) for own in entry.samples.values()) == 2 * 4
        assert set(entry.samples) == set(entry.contender.kinds)
        assert (entry.error is None) == (entry.contender.reference is None)
    expected, _ = run_loop(setting.model, setting.scheduler, loop.noise, 4, 2.0, *halves(loop))
    assert torch.equal(timed[names.index("eager")].latents, expected)


def halves(loop) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    parts = {name: value.chunk(2) for name, value in loop.conditioning.items()}
    return {name: own[0] for name, own in parts.items()}, {name: own[1] for name, own in parts.items()}


def test_a_loop_is_put_together_from_medians_by_kind():
    contender = Contender("x", lambda: None, ["a", "b", "a", "b"], [10, 5, 10, 5], 10)
    timed = Timed(contender, {"a": [3.0, 1.0, 100.0], "b": [0.5, 0.5]})
    assert timed.seconds(4) == 3.0 + 0.5 + 3.0 + 0.5
    assert timed.seconds(3) == 6.5
    assert contender.ideal(4) == 40 / 30
    assert contender.ideal(1) == 1


def test_a_wrong_result_is_refused(setting: Setting):
    other = replace(setting, made={"slow": setting.plan("fora2")})
    wrong = ours("slow", other)
    assert wrong.reference == "hooks: slow"
    loop = loop_of(setting.model, setting.scheduler, 4, 2, 1.0)
    timed = take_turns([hooked("slow", setting), wrong], loop, 4, 1)
    with pytest.raises(CompileError, match=r"stepgraph: slow is .* from hooks: slow"):
        refuse_wrong_results(timed, 1e-3)
    timed[1].latents, timed[1].error = timed[0].latents * float("nan"), None
    with pytest.raises(CompileError, match="nan from hooks: slow"):
        refuse_wrong_results(timed, 1e-3)


def test_a_wrong_output_shows_on_the_trajectory_of_the_reference(setting: Setting):
    other = replace(setting, made={"slow": setting.plan("fora2")})
    loop = loop_of(setting.model, setting.scheduler, 4, 2, 1.0)
    right, wrong = (
        take_turns([hooked("slow", setting), ours("slow", given)], loop, 4, 1, forced=True)[1] for given in (setting, other)
    )
    assert right.error < 1e-5
    assert wrong.error > 1e-3


def test_the_small_check_fails_before_anything_is_timed(setting: Setting, monkeypatch):
    def another(given: Setting) -> Contender:
        return replace(ours("fora3", given), name="stepgraph: full", reference="eager")

    monkeypatch.setitem(CONTENDERS, "stepgraph: full", another)
    with pytest.raises(CompileError, match=r"stepgraph: full is .* from eager"):
        runtime.check_small(["eager", "stepgraph: full"], setting)


def test_hooks_that_ran_other_modules_stop_the_run(setting: Setting):
    contender = hooked("fora2", setting)
    begin = contender.start

    def tampered():
        hooks = begin()
        hooks.letters[1]["transformer_blocks.0.ff"] = "C"
        return hooks

    loop = loop_of(setting.model, setting.scheduler, 4, 2, 1.0)
    with pytest.raises(PlanError, match=r"step 1: transformer_blocks\.0\.ff ran 1 times; the plan says 0"):
        take_turns([replace(contender, start=tampered)], loop, 4, 1)


def test_rows_bring_their_references():
    assert chosen(["stepgraph: slow"], "eager") == ["stepgraph: slow", "hooks: slow"]
    assert chosen(["stepgraph: full"], "eager") == ["eager", "stepgraph: full"]
    assert "torch.compile" not in chosen([], "eager")
    assert chosen([], "inductor") == list(CONTENDERS)
    with pytest.raises(CompileError, match=r"unknown row 'tea'; known: eager; torch\.compile"):
        chosen(["tea"], "eager")


def test_guidance_needs_an_even_batch(dit, ddim):
    with pytest.raises(CompileError, match="batch is 3"):
        loop_of(dit, ddim, 4, 3, 2.0)


def test_ablations_leave_one_pass_out(setting: Setting):
    loop = loop_of(setting.model, setting.scheduler, 4, 2, 1.0)
    names = chosen([name for name in CONTENDERS if ", without " in name], "eager")
    timed = take_turns([CONTENDERS[name](setting) for name in names], loop, 4, 1)
    refuse_wrong_results(timed, 1e-5)
    fused = {e.contender.name: e.contender.facts.get("fused_operations") for e in timed}
    assert not any("modulated_norm" in op for op in fused["stepgraph: slow, without fuse_modulated_norm"])
    assert any("modulated_norm" in op for op in fused["stepgraph: slow, without fuse_gated_residual"])


# -- cache-dit -----------------------------------------------------------------------------------------------------------


def test_a_masked_step_runs_the_first_block_only(setting: Setting):
    full = setting.plan("full")
    site = {site.name: site.macs for site in full.sites}
    inside = site["transformer_blocks.1.attn1"] + site["transformer_blocks.1.ff"]
    whole, masked = mask_macs(full, [True, False])
    assert whole == full.header.macs
    # Besides its modules, the second block has the maps of its modulation.
    assert 0 < whole - masked - inside < 0.35 * inside


@pytest.mark.parametrize("steps", [3, 4])
def test_cache_dit_computes_first_block_and_residual(setting: Setting, steps: int):
    pytest.importorskip("cache_dit")
    names = chosen(["cache-dit: mask, eager"], "eager")
    loop = loop_of(setting.model, setting.scheduler, 4, 2, 2.0)
    timed = take_turns([CONTENDERS[name](setting) for name in names], loop, steps, 2)
    refuse_wrong_results(timed, 1e-6)
    assert "forward" not in vars(setting.model)


def test_cache_dit_that_used_its_cache_elsewhere_is_refused(dit, ddim):
    pytest.importorskip("cache_dit")
    runner = CacheDit(dit, [True, False, True], regional=False)
    run_loop(runner.start(), ddim, noise(), 3, 1.0, COND)
    runner.refuse_other_steps(3)
    runner.mask = [True, True, False]
    with pytest.raises(PlanError, match=r"at the steps \[1\]; the mask says \[2\]"):
        runner.refuse_other_steps(3)


def test_residual_of_the_other_blocks_by_hand(dit):
    runner = FirstBlockAndResidual(dit, [True, False]).start()
    x, t = noise(), torch.tensor([500])
    with torch.no_grad():
        first = runner(hidden_states=x, timestep=t, **COND, return_dict=False)[0]
        assert torch.equal(first, dit(x, t, **COND, return_dict=False)[0])
        # With the same input the residual is what the second block adds, up to the rounding of a difference.
        again = runner(hidden_states=x, timestep=t, **COND, return_dict=False)[0]
    assert torch.allclose(again, first, atol=1e-5)
    assert runner.ran == BLOCKS + 1


# -- costs, record, command ----------------------------------------------------------------------------------------------


def test_overheads_are_measured_for_each_kind(setting: Setting):
    found = runtime_costs.overheads(setting, rounds=1, least=4)
    assert {name: row["calls"] for name, row in found.items()} == {"output": 3, "hidden": 3, "modules": 3}


@pytest.fixture
def _around_children(monkeypatch):
    """What the product starts has around it what the tests' own processes have."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("_around_children")
def test_a_fresh_process_compiles(plans: Path, tmp_path: Path):
    found = runtime_costs.in_fresh_process(
        {
            "model": str(save_small_glyph_dit(tmp_path / "model")),
            "plan": "fora2",
            "steps": 4,
            "dtype": "float32",
            "backend": "eager",
        },
        str(plans),
    )
    assert found["variants"] == 2


def test_one_size_is_varied_at_a_time(monkeypatch):
    asked = []

    def noted(arguments, cache):
        asked.append(arguments)
        return {"number": len(asked)}

    monkeypatch.setattr(runtime_costs, "in_fresh_process", noted)
    rows = list(runtime_costs.scaled({"model": "m"}, {"tokens": (256, 1024), "blocks": (28, 7)}))
    assert [(row["varied"], row["value"], row["number"]) for row in rows] == [
        ("tokens", 256, 1), ("tokens", 1024, 2), ("blocks", 28, 1), ("blocks", 7, 3),
    ]  # fmt: skip
    assert [(given["tokens"], given["blocks"]) for given in asked] == [(256, 28), (1024, 28), (256, 7)]


def test_sizes_of_random_models():
    with torch.device("meta"):
        model = compile_once.sized_model("dit-xl-2-256:random", "meta", torch.bfloat16, blocks=3, tokens=1024)
    assert len(model.transformer_blocks) == 3
    assert model.config.sample_size == 64
    with pytest.raises(CompileError, match="glyph-dit has the size it has"):
        compile_once.sized_model("glyph-dit", "cpu", torch.float32, blocks=2)


@pytest.mark.slow
def test_the_record_and_the_pictures(plans: Path, tmp_path: Path, capsys):
    rows = ["stepgraph: full", "stepgraph: fora2"]
    runtime.main(
        ["--model", "glyph-dit", "--batch", "1", "--dtype", "float32", "--backend", "eager", "--steps", "4",
         "--plans", str(plans), "--out", str(tmp_path), "--name", "small", "--part", "table", "memory", "--json",
         "--rows", *rows]
    )  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "small.json").read_text())
    assert record["results"] == printed
    table = printed["table"]
    assert [row["name"] for row in table["rows"]] == chosen(rows, "eager")
    by_name = {row["name"]: row for row in table["rows"]}
    full, fora = by_name["stepgraph: full"], by_name["stepgraph: fora2"]
    assert fora["over_full"] == full["seconds"] / fora["seconds"]
    assert fora["ideal"] == pytest.approx(sg.CachePlan.summary(_fora()).ideal_speedup)
    assert max(row["error"] for row in table["rows"] if row["error"] is not None) <= table["tolerance"] == 1e-5
    assert {(row["faster"], row["than"]) for row in table["ratios"]} == {
        ("stepgraph: full", "eager"), ("stepgraph: fora2", "stepgraph: full"),
    }  # fmt: skip
    for row in table["ratios"]:
        assert row.keys() == {"faster", "than", "ratio", "ideal"}
        assert row["ratio"] == pytest.approx(by_name[row["than"]]["seconds"] / by_name[row["faster"]]["seconds"])
        assert row["ideal"] == by_name[row["faster"]]["ideal"]
    text = io.StringIO()
    runtime.show_table(Console(file=text, width=150), table, "a title")
    assert "comparisons" in text.getvalue()
    assert table["whole_loop"]["sample_error"] <= 1e-5
    assert printed["memory"]["fora2"]["tensor_steps_always"] == (2 * 10 + 1) * 4
    assert (tmp_path / "small.png").stat().st_size > 1000


def _fora():
    model, scheduler = compile_once.load_model("glyph-dit"), compile_once.load_scheduler("glyph-dit")
    return sg.make_plan("interval", model=model, scheduler=scheduler, steps=4, every=2)


def test_a_segment_is_its_own_ideal(setting: Setting):
    contender = CONTENDERS["stepgraph: fora2"](setting)
    assert contender.ideal(1) == 1
    assert 1 < contender.ideal(3) < contender.ideal(4)


@pytest.mark.slow
@pytest.mark.usefixtures("_around_children")
def test_the_command_hands_its_arguments_on(capfd):
    assert CliRunner().invoke(app, ["bench", "runtime", "--steps", "1"]).exit_code == 2
    # The benchmark is a process of its own.
    assert "--steps is at least 2" in capfd.readouterr().err


def test_another_class_of_models_is_refused_before_its_weights_are_drawn(monkeypatch):
    monkeypatch.setattr(runtime, "sized_model", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(SystemExit, match=r"flux-dev:random is a FluxTransformer2DModel; .* pass dit-xl-2-256:random"):
        runtime.main(["--model", "flux-dev:random", "--part", "overhead"])
