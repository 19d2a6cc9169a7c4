"""The command line, as a user and as a program would call it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.children import environment
from helpers.command_line import error_of, invoke
from helpers.distance import SAME_RUN
from helpers.small_glyphs import save_small_glyph_dit
from stepgraph.cli.sweep import parse_values
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.compiler.policies import POLICIES
from stepgraph.plan import CachePlan


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two of glyph-dit's ten blocks; planning, compiling and running are tried on glyph-dit itself too."""
    return save_small_glyph_dit(tmp_path_factory.mktemp("models") / "small", layers=2)


@pytest.fixture(scope="module")
def plan(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 6, "-a", "every=2", "-o", path)
    return path


@pytest.fixture(scope="module")
def glyph_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    invoke("plan", "make", "--policy", "interval", "--steps", 6, "-a", "every=2", "-o", path)
    return path


def test_plan_make_writes_a_valid_plan(plan: Path):
    made = CachePlan.load(plan)
    assert made.steps == 6
    assert [made.action(step, "transformer_blocks.0.ff").name for step in range(3)] == ["COMPUTE", "REUSE", "COMPUTE"]


def test_plan_show_prints_the_summary_and_draws(plan: Path, tmp_path: Path):
    picture = tmp_path / "plan.png"
    text = invoke("plan", "show", plan, "--plot", picture)
    assert "50.0% not computed" in text
    assert Image.open(picture).size[0] > 500
    facts = json.loads(invoke("plan", "show", plan, "--json"))
    assert facts["kinds"]["ff"]["reused"] == 6
    assert facts["macs"] < facts["macs_total"]


def test_plan_diff_counts_the_changed_pairs(small: Path, plan: Path, tmp_path: Path):
    other = tmp_path / "other.json"
    invoke(
        "plan",
        "make",
        "--model",
        small,
        "--policy",
        "interval",
        "--steps",
        6,
        "-a",
        "every=2",
        "-a",
        'kinds=["ff"]',
        "-o",
        other,
    )
    difference = json.loads(invoke("plan", "diff", plan, other, "--json"))
    assert difference["pairs_changed"] == 2 * 3  # two attention sites, three reused steps each
    before, after = difference["header"]["arguments"]
    assert (before["kinds"], after["kinds"]) == (None, ["ff"])
    assert "6 (step, site) pairs differ" in invoke("plan", "diff", plan, other)


def test_plan_diff_draws_both_plans(small: Path, plan: Path, tmp_path: Path):
    other, longer = tmp_path / "other.json", tmp_path / "longer.json"
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 6, "-a", "every=3", "-o", other)
    invoke("plan", "make", "--model", small, "--policy", "full", "--steps", 9, "-o", longer)
    assert f"wrote {tmp_path / 'diff.png'}" in invoke("plan", "diff", plan, other, "--plot", tmp_path / "diff.png")
    assert Image.open(tmp_path / "diff.png").size[0] > 1000
    text = invoke("plan", "diff", plan, longer)
    assert "6 and 9 evaluations: steps are not compared" in text
    assert "(9 in all)" in text


def test_plan_resample_takes_the_models_scheduler(small: Path, plan: Path, tmp_path: Path):
    out, guessed = tmp_path / "out.json", tmp_path / "guessed.json"
    facts = json.loads(invoke("plan", "resample", plan, "--steps", 10, "--model", small, "-o", out, "--json"))
    assert [w.split(":")[0] for w in facts["warnings"]] == ["the plan was made for 6 steps and is resampled to 10"]
    direct = tmp_path / "direct.json"
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 10, "-a", "every=2", "-o", direct)
    assert CachePlan.load(out).header.timesteps == CachePlan.load(direct).header.timesteps
    assert CachePlan.load(out).rows == CachePlan.load(direct).rows
    assert "sampling refuses it unless the scheduler's agree" in invoke("plan", "resample", plan, "--steps", 4, "-o", guessed)
    assert "steps is 0" in error_of("plan", "resample", plan, "--steps", 0, "-o", guessed)
    assert "needs --model" in error_of("plan", "resample", plan, "--steps", 4, "--scheduler", "ddim", "-o", guessed)
    assert "the plan is for DDIMScheduler" in error_of(
        "plan", "resample", plan, "--steps", 4, "--model", small, "--scheduler", "euler", "-o", guessed
    )


def test_plan_show_warns_of_a_shorter_schedule(small: Path, tmp_path: Path):
    path = tmp_path / "plan.json"
    invoke("plan", "make", "--model", small, "--policy", "interval", "--steps", 6, "-a", 'kinds=["output"]', "-o", path)
    # glyph-dit predicts v, for which it is none.
    assert CachePlan.load(path).header.prediction == "v_prediction"
    assert json.loads(invoke("plan", "show", path, "--json"))["warnings"] == []
    CachePlan.load(path).with_header(prediction="epsilon").save(path)
    assert len(json.loads(invoke("plan", "show", path, "--json"))["warnings"]) == 1
    assert "warning: `output` is reused at 3 of 6 steps." in invoke("plan", "show", path)


def test_policies_are_listed_and_make_help_explains_them():
    text, shown = invoke("plan", "policies"), invoke("plan", "make", "--help")
    records = json.loads(invoke("plan", "policies", "--json"))
    assert list(records) == list(POLICIES)
    for name, record in records.items():
        assert f"{name}: {record['source']}" in text
        assert f"  {name}: {record['source']}\n" in shown
        for argument in record["arguments"]:
            # Lines are kept as they are, not joined to a paragraph.
            assert f"\n      -a {argument['name']}: {argument['type']}" in shown


def test_plan_sweep_measures_draws_and_saves_the_knee(small: Path, tmp_path: Path):
    picture, knee = tmp_path / "sweep.png", tmp_path / "knee.json"
    command = ["plan", "sweep", "--model", small, "--policy", "interval", "--knob", "every", "--steps", 4, "--plot", picture]
    facts = json.loads(invoke(*command, "--samples", 2, "--values", "1,2,4", "--json"))
    assert [point["value"] for point in facts["points"]] == [1, 2, 4]
    errors = [point["error"] for point in facts["points"]]
    assert errors[0] < 1e-6 < errors[1] < errors[2] < 1
    assert Image.open(picture).size[0] > 500
    shown = invoke(*command, "--samples", 1, "--from", 1, "--to", 2, "--points", 2)
    assert "1.00x" in shown
    assert "no knee" in shown
    assert "no knee" in error_of(*command, "--samples", 1, "--values", "1,2", "--save", knee)
    assert not knee.exists()


def test_a_sweep_needs_to_know_what_to_try(small: Path, tmp_path: Path):
    command = [
        "plan",
        "sweep",
        "--model",
        small,
        "--policy",
        "interval",
        "--knob",
        "every",
        "--steps",
        4,
        "--plot",
        tmp_path / "sweep.png",
    ]
    assert "say what to try, either --values" in error_of(*command)
    assert "say what to try, either --values" in error_of(*command, "--values", "2", "--from", 1, "--to", 2)
    assert "--log needs a range above 0; got 0 to 2" in error_of(*command, "--from", 0, "--to", 2, "--log")
    assert parse_values("smoothcache", ("alpha",), None, 0.1, 0.8, 4, True) == [0.1, 0.2, 0.4, 0.8]
    assert parse_values("interval", ("every",), None, 1, 4, 4, False) == [1, 2, 3, 4]


def test_calibrate_feeds_a_policy(small: Path, tmp_path: Path):
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    facts = json.loads(invoke("calibrate", small, "--steps", 5, "--samples", 1, "-o", stats, "--json"))
    assert 0 < facts["mean_relative_change"]["attn"] < 2
    invoke("plan", "make", "--model", small, "--policy", "invardiff", "--stats", stats, "-a", "step=0.5", "-o", plan)
    made = CachePlan.load(plan)
    assert made.steps == 5
    assert made.header.samples == 1
    assert sum(row[made.index("hidden")] == "R" for row in made.rows) > 0
    assert "needs calibration" in error_of(
        "plan", "make", "--model", small, "--policy", "smoothcache", "-o", tmp_path / "other.json"
    )


def test_calibrate_with_guidance_draws_and_cleans_up(small: Path, tmp_path: Path):
    stats, picture = tmp_path / "stats.safetensors", tmp_path / "stats.png"
    common = ("calibrate", small, "--steps", 4, "--samples", 1, "-o", stats)
    facts = json.loads(invoke(*common, "--guidance", 1.5, "--no-channels", "--plot", picture, "--json"))
    assert facts["branches"] == ["cond", "uncond"]
    assert facts["written"] == [str(stats), str(picture)]
    assert Image.open(picture).size[0] > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.png", "stats.safetensors"]
    loaded = CalibrationStats.load(stats)
    assert (loaded.guidance_scale, dict(loaded.channels)) == (1.5, {})
    assert "eta is 0.5: the sampler adds noise" in error_of(*common, "--eta", 0.5)
    assert json.loads(invoke(*common, "--eta", 0.5, "--allow-stochastic", "--json"))["branches"] == ["cond"]


@pytest.mark.slow
def test_a_calibration_that_was_killed_goes_on(small: Path, tmp_path: Path):
    stats, left = tmp_path / "stats.safetensors", tmp_path / "stats.safetensors.unfinished"
    command = [
        sys.executable,
        "-m",
        "stepgraph.cli",
        "calibrate",
        str(small),
        "--steps",
        "8",
        "--samples",
        "12",
        "-o",
        str(stats),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    for _ in range(30000):
        if left.is_file() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert left.is_file()
    assert not stats.exists()
    done = json.loads(safe_open(str(left), framework="pt").metadata()["stepgraph"])["done"]
    assert 1 <= done < 12
    invoke("calibrate", small, "--steps", 8, "--samples", 12, "-o", stats)
    assert not left.exists()
    resumed = CalibrationStats.load(stats)
    whole = calibrate(load_model(str(small)), load_scheduler(str(small)), steps=8, samples=12)
    assert all(torch.equal(resumed.tables[name], table) for name, table in whole.tables.items() if name != "ms")


def test_routers_are_trained_kept_and_used(small: Path, tmp_path: Path):
    router, form, plan, again = (tmp_path / name for name in ("router.safetensors", "router.pt", "plan.json", "again.json"))
    few = ("-a", "iterations=3", "-a", "pool=8", "-a", "batch=4")
    common = ("plan", "train-router", small, "--steps", 4, *few, "-o", router)
    facts = json.loads(invoke(*common, "--export", form, "--json"))
    assert facts["written"] == [str(router), str(form)]
    assert facts["reused_of_routed"]["theta 0.9"] >= facts["reused_of_routed"]["theta 0.1"]
    assert not list(tmp_path.glob("*.unfinished"))
    invoke(
        "plan",
        "make",
        "--model",
        small,
        "--policy",
        "l2c",
        "--steps",
        4,
        "-a",
        f"router={router}",
        "-a",
        "theta=0.9",
        "-o",
        plan,
    )
    invoke("plan", "import", form, "--model", small, "--steps", 4, "-a", "theta=0.9", "-o", again)
    assert CachePlan.load(plan).rows == CachePlan.load(again).rows
    assert any("R" in row for row in CachePlan.load(plan).rows)
    assert "name it .pt or .pth" in error_of(*common, "--export", tmp_path / "router.json")
    assert "unknown preset 'nose'" in error_of(*common, "--preset", "nose")


def test_an_exported_plan_imports_as_it_was(small: Path, plan: Path, tmp_path: Path):
    schedule, again = tmp_path / "schedule.json", tmp_path / "again.json"
    invoke("plan", "export", plan, "--format", "smoothcache", "-o", schedule)
    invoke("plan", "import", schedule, "--model", small, "--steps", 6, "-o", again)
    assert CachePlan.load(again).rows == CachePlan.load(plan).rows
    assert "unknown format 'onnx'" in error_of("plan", "export", plan, "--format", "onnx", "-o", again)


def test_compile_reports_variants_and_dumps_graphs(glyph_plan: Path, tmp_path: Path):
    facts = json.loads(
        invoke("compile", "glyph-dit", "--plan", glyph_plan, "--backend", "eager", "--dump", tmp_path / "graphs", "--json")
    )
    assert facts["variants"] == 2
    assert facts["nodes_per_variant"][1] < facts["nodes_per_variant"][0]
    assert facts["memory"]["peak_slot_bytes"] == 20 * 2 * 36 * 128 * 4
    # Six modulations of each of the ten blocks, two of the head; and what the prompt gives them.
    assert facts["tables"] >= 62
    assert facts["regions"] == 0
    sources = [Path(path).read_text() for path in facts["dumped"]]
    assert "self.transformer_blocks" in sources[0]
    assert "slot_transformer_blocks_0_ff" in sources[1]


def test_run_writes_samples_that_match_the_library(glyph_plan: Path, tmp_path: Path):
    facts = json.loads(
        invoke("run", "glyph-dit", "--plan", glyph_plan, "--images", 2, "--compare", "--out", tmp_path, "--json")
    )
    latents = load_file(tmp_path / "samples.safetensors")["latents"]
    assert latents.shape == (2, 3, 24, 24)
    assert torch.isfinite(latents).all()
    assert 0 < facts["relative_l2"] < 1
    assert Image.open(tmp_path / "samples.png").size == (2 * 24 * 3, 24 * 3)


@pytest.mark.slow
def test_demo_writes_its_table_and_pictures(tmp_path: Path):
    facts = json.loads(invoke("demo", "--steps", 4, "--images", 4, "--rounds", 1, "--out", tmp_path, "--json"))
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["eager diffusers", "full", "FORA N=2", "whole-step N=2"]
    # Fused operations round in their own way.
    assert rows["full"]["relative_l2"] <= SAME_RUN
    assert 0 < rows["FORA N=2"]["relative_l2"] < 1
    assert rows["eager diffusers"]["gmacs"] == pytest.approx(rows["full"]["gmacs"])
    assert rows["FORA N=2"]["gmacs"] < 0.6 * rows["full"]["gmacs"]
    assert rows["FORA N=2"]["peak_slot_mb"] == pytest.approx(20 * 8 * 36 * 128 * 4 / 1e6)
    assert rows["whole-step N=2"]["peak_slot_mb"] == pytest.approx(8 * 36 * 128 * 4 / 1e6)
    assert len(facts["pictures"]) == 4
    for picture in facts["pictures"]:
        low, high = Image.open(picture).convert("L").getextrema()
        assert low < high


def test_doctor_lists_versions_and_advice():
    report = json.loads(invoke("doctor", "--json"))
    assert report["versions"]["torch"] == torch.__version__
    assert {"versions", "devices", "compilers", "caches", "advice"} <= set(report)
    assert torch.__version__ in invoke("doctor")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "show", "nowhere.json"], "no plan file at nowhere.json"),
        (["plan", "make", "--policy", "nonsense"], "unknown policy 'nonsense'; known: deepcache, full, interval, invardiff"),
        (["plan", "make", "--policy", "interval", "-a", "period=2"], "no argument 'period'; it takes every, offset, kinds"),
        (["plan", "make", "--policy", "manual"], "needs the argument 'actions'"),
        (["plan", "make", "--policy", "interval", "-a", "every"], "expected name=value"),
        (["plan", "make", "--policy", "interval", "-a", "every=0"], "every is 0 for attn"),
        (["plan", "make", "--policy", "interval", "--steps", "0"], "steps is 0"),
        (["plan", "make", "--policy", "interval", "--model", "./nowhere"], "no model at './nowhere'"),
        (["plan", "make", "--policy", "interval", "--model", "dit-s-8:random"], "known: dit-xl-2-256:random"),
        (["plan", "make", "--policy", "interval", "--scheduler", "ddpm"], "unknown scheduler 'ddpm'; known: ddim"),
        (["plan", "make", "--policy", "interval", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["demo", "--device", "abacus"], "unknown device 'abacus'"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_scheduler_dtype_or_backend_is_refused(small: Path, plan: Path, tmp_path: Path):
    said = error_of("run", small, "--plan", plan, "--scheduler", "euler", "--out", tmp_path)
    assert "compiled for DDIMScheduler" in said
    assert "EulerDiscreteScheduler" in said
    assert not (tmp_path / "samples.safetensors").exists()
    said = error_of("compile", small, "--plan", plan, "--dtype", "bfloat16")
    assert "float32" in said
    assert "bfloat16" in said
    assert "backend is 'tvm'" in error_of("compile", small, "--plan", plan, "--backend", "tvm")


def test_a_class_without_adapter_is_refused_by_name(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert "'UNet2DModel' has no adapter" in error_of(
        "plan", "make", "--policy", "full", "--model", tmp_path, "-o", tmp_path / "p.json"
    )


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").is_dir(), reason="needs a place that nobody can write to")
def test_a_folder_that_cannot_be_written_is_found_before_sampling(small: Path, plan: Path):
    # /proc refuses new folders even to root.
    assert "/proc/self/out" in error_of("run", small, "--plan", plan, "--out", "/proc/self/out")
    assert "/proc/self/out" in error_of("demo", "--out", "/proc/self/out")


def test_errors_go_to_standard_error_without_a_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "stepgraph.cli", "plan", "show", "nowhere.json"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no plan file at nowhere.json")
    assert "Traceback" not in result.stderr
