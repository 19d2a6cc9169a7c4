"""The proof on a GPU: rows survive what interrupts them, and each bar is read from the rows it names."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stepgraph.bench import prove
from stepgraph.bench.bars import BARS, against_bars
from stepgraph.bench.ops.in_graphs import MEASURED, many_calls, sets_of
from stepgraph.bench.ops.shapes import Shape
from stepgraph.bench.rows import Rows, write_all
from stepgraph.bench.speed.launches import launches


def test_rows_are_there_when_a_part_is_cut_off(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.read() == {}
    rows.begin("dit1", "cpu")
    rows.add("dit1", "eager", seconds=2.0)
    with rows.path.open("a") as file:
        file.write('{"part": "dit1", "row": "ours"')
    assert rows.read()["dit1"]["eager"] == {"seconds": 2.0}


def test_a_part_that_begins_anew_forgets_its_rows_and_no_others(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    for part in ("dit1", "flux"):
        rows.begin(part, "cpu")
        rows.add(part, "eager", seconds=2.0)
    rows.begin("dit1", "cpu")
    assert set(rows.read()["dit1"]) == {"begun"}
    assert set(rows.read()["flux"]) == {"begun", "eager"}


def test_rows_before_and_behind_a_failure_are_written(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")

    def fails():
        yield "first", {"seconds": 1.0}
        raise torch.OutOfMemoryError("no memory is left")

    write_all(rows, "dit1", "both", fails)
    write_all(rows, "dit1", "next", lambda: iter([("next", {"seconds": 2.0})]))
    written = rows.read()["dit1"]
    assert written["first"] == {"seconds": 1.0}
    assert written["next"] == {"seconds": 2.0}
    assert written["both: failed"] == {"failed": "OutOfMemoryError: no memory is left"}


def verdicts(figures, **options):
    return {row["what"]: (row["measured"], row["verdict"]) for row in against_bars(figures, **options)}


def test_what_is_measured_is_held_against_its_bar():
    graph = "ours full, graph"
    figures = {
        "dit1": {graph: {"seconds": 0.05, "ms_per_step": 1.0}, "ours slow book, graph": {"seconds": 0.025}, "begun": {}},
        "flux": {"begun": {}, "eager": {"seconds": 4.5}, graph: {"seconds": 2.0}, "ours fast book": {"ideal": 2.5},
                 "ours fast book, graph": {"seconds": 1.0}, "regional": {"seconds": 2.1}},
        "whole": {"begun": {}, "reduce-overhead": {"seconds": 0.06}},
        "dit16": {"begun": {}},
    }  # fmt: skip
    table = verdicts(figures)
    assert table["DiT, 1 image: full plan, ms a step"] == (1.0, "met")
    assert table["DiT, 1 image: slow book, x full plan"] == (2.0, "missed")
    assert table["FLUX: fast book, x eager"] == (4.5, "met")
    assert table["FLUX: full plan, x regional compile"] == (1.05, "missed")
    assert table["FLUX: fast book, share of its MAC-ideal"] == (0.8, "missed")
    assert table["DiT, 1 image: full plan, x whole model with reduce-overhead"] == (pytest.approx(1.2), "met")
    assert table["DiT, 1 image: full plan, x eager"] == (None, "not measured")
    assert table["DiT, 16 images: share of the product ceiling"] == (None, "not reached")
    assert table["GPU tests that failed"] == (None, "not reached")
    assert verdicts(figures, rehearsed=True)["FLUX: fast book, x eager"] == (4.5, "rehearsed")


def test_the_least_kernel_counts_and_a_failed_one_is_no_figure():
    rows = {f"modulated_norm, {n}, {n}": {"versus_compile": 1.0 + n, "share_of_copy": 1 / n} for n in (512, 4608, 16384)}
    table = verdicts({"kernels": rows | {"begun": {}, "ceilings": {"copy": 1.0}}})
    assert table["modulated_norm, x torch.compile, least"] == (513.0, "met")
    assert table["modulated_norm, share of the copy bandwidth from 4608 tokens on, least"] == (1 / 16384, "missed")
    rows["modulated_norm, 4608, 4608: failed"] = {"failed": "RuntimeError: wrong"}
    assert verdicts({"kernels": rows})["modulated_norm, x torch.compile, least"] == (None, "not measured")


def test_every_bar_is_of_a_part():
    assert {bar.part for bar in BARS} == {part.name for part in prove.PARTS}
    assert sum(part.limit for part in prove.PARTS) <= 330


@pytest.mark.parametrize("workers", [["-p", "xdist", "-n", "1"], []])
def test_outcomes_of_tests_are_counted_while_they_run(tmp_path, workers, monkeypatch):
    # What other plugins import takes longer than the tests.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 'a::b FAILED' == ''\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-c", "/dev/null", *workers, "."]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    counts = {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_some.py::test_wrong"]}
    assert prove.outcomes(text) == counts
    # Cut off before its summary, as a run that is stopped.
    assert prove.outcomes(text[: text.index("FAILURES")]) == counts


def test_builders_and_what_they_started_are_ended(tmp_path, monkeypatch):
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(prove, "command_of", lambda part, options: [sys.executable, "-c", parent, child])
    seen = tmp_path / "child"
    with prove.building([prove.ProvePart("dit1", 1.0), prove.ProvePart("kernels", 1.0, built=False)], argparse.Namespace()):
        while not (seen.exists() and seen.read_text()):
            time.sleep(0.01)
        assert alive(int(seen.read_text()))
    ends = time.monotonic() + 10
    while alive(int(seen.read_text())) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not alive(int(seen.read_text()))


def alive(process: int) -> bool:
    """Whether a process runs: one that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_or_fails_stops_no_other(tmp_path, monkeypatch):
    codes = {"dit1": "import time; time.sleep(600)", "flux": "raise SystemExit(3)", "whole": "pass"}
    monkeypatch.setattr(prove, "command_of", lambda part, options: [sys.executable, "-c", codes[part]])
    limits = {"dit1": 0.5, "flux": 10.0, "whole": 10.0}
    monkeypatch.setattr(prove, "PARTS", tuple(prove.ProvePart(name, limit) for name, limit in limits.items()))
    monkeypatch.setattr(prove, "LEAST", 0.1)
    assert prove.main([str(tmp_path), "--tiny", "--seconds", "20"]) == 1
    parts = {part["part"]: part["status"] for part in json.loads((tmp_path / "prove.json").read_text())["parts"]}
    assert parts == {"dit1": "stopped after 0.5 s", "flux": "exit status 3", "whole": "ok"}


def test_an_unknown_part_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prove.main([str(tmp_path / "out"), "--tiny", "--only", "dit1,dit2"])
    assert "there is no part 'dit2'; known: tests, dit1, flux, dit16, kernels, whole" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kernels_go_round_several_sets_of_arguments():
    called = []
    assert many_calls([lambda: called.append(0), lambda: called.append(1)], "cpu") > 0
    assert called == [0, 1]
    for op in MEASURED:
        for sets in sets_of(Shape("tiny", 1, 4, 64, 64), torch.float32, "cpu", op):
            values = [next(v for v in case.arguments.values() if isinstance(v, (list, torch.Tensor))) for case in sets]
            tensors = [value[0] if isinstance(value, list) else value for value in values]
            assert len({tensor.data_ptr() for tensor in tensors}) == len(sets) == 2
            assert sets[0].op.name == op


def test_launches_are_counted_per_step():
    x = torch.ones(4)
    counted = launches(lambda: [x.add(1), x.add(2), x.mul(3), x.mul(4)], steps=2)
    calls = {row["name"]: row["calls_per_step"] for row in counted["kernels"]}
    assert calls == {"aten::add": 1, "aten::mul": 1}
    assert counted["launches_per_step"] == 2
