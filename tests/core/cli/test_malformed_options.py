"""Every option of every command, given what it does not take: one clear error and a status other than 0, never a traceback."""

import pytest
import typer

import stepgraph as sg
from helpers.command_line import runner
from helpers.pipes import tiny_pipe
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.cli.main import app

ONE_STEP = ("--steps", "2", "--samples", "1")
# Command -> what it needs beside the option that is malformed; names in braces are files. Commands without options that take a
# value are left out.
BASES = {
    "accelerate": ("{pipe}", "--call", "class_labels=[1]", "--steps", "2", "--backend", "eager", "--out", "{out}"),
    "export": ("{model}", "--plan", "{plan}", "--format", "graph", "--out", "{out}"),
    "demo": ("--device", "nose"),
    "compile": ("{model}", "--plan", "{plan}", "--backend", "eager"),
    "run": ("{model}", "--plan", "{plan}", "--backend", "eager", "--images", "1"),
    "calibrate": ("{model}", *ONE_STEP, "--out", "{out}"),
    "plan make": ("--policy", "interval", "--model", "{model}", "--steps", "2", "--out", "{out}"),
    "plan import": ("{schedule}", "--model", "{model}", "--steps", "2", "--out", "{out}"),
    "plan export": ("{plan}", "--format", "smoothcache", "--out", "{out}"),
    "plan resample": ("{plan}", "--steps", "3", "--out", "{out}"),
    "plan show": ("{plan}",),
    "plan diff": ("{plan}", "{plan}"),
    "plan sweep": ("--policy", "interval", "--knob", "every", "--values", "[2]", "--model", "{model}", *ONE_STEP),
    "plan train-router": ("{model}", "--steps", "2", "-a", "iterations=1", "-a", "pool=1", "-a", "batch=1", "--out", "{out}"),
    "plan correct": ("{plan}", "{model}", "--forecast", "taylor", "--out", "{out}"),
    "factors make": ("{model}", "--method", "svd", "--rank", "1", "--out", "{out}"),
    "factors show": ("{factors}",),
    "factors ranks": ("{model}", "--ranks", "1", "--method", "svd"),
    "cache prune": ("--max-mb", "0"),
}
COMMANDS = {}


def _collect(command, name: str) -> None:
    for part, sub in getattr(command, "commands", {}).items():
        _collect(sub, f"{name} {part}".strip())
    if not hasattr(command, "commands"):
        takes = [p.opts[0] for p in command.params if p.opts[0].startswith("--") and not getattr(p, "is_flag", False)]
        COMMANDS[name] = takes


_collect(typer.main.get_command(app), "")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command-line")
    model, scheduler = tiny_dit(), tiny_scheduler("ddim")
    model.save_pretrained(folder / "model" / "transformer")
    scheduler.save_pretrained(folder / "model" / "scheduler")
    tiny_pipe(model).save_pretrained(folder / "pipe")
    sg.make_plan("interval", model=model, scheduler=scheduler, steps=2).save(folder / "plan.json")
    sg.factorize(model, method="svd", rank=1).save(folder / "factors.safetensors")
    (folder / "schedule.json").write_text('{"attn": [1, 0], "mlp": [1, 1]}')
    (folder / "damaged.json").write_text('{"format": "stepgr')
    names = {
        "model": "model/transformer", "pipe": "pipe", "plan": "plan.json", "out": "written.json",
        "factors": "factors.safetensors",
        "schedule": "schedule.json", "damaged": "damaged.json",
    }  # fmt: skip
    return {name: folder / path for name, path in names.items()}


def refused_or_done(arguments: list[str]) -> None:
    outcome = runner.invoke(app, arguments)
    said = f"stepgraph {' '.join(arguments)}: {outcome.output[-2000:]}"
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), f"{said} {outcome.exception!r}"
    assert "Traceback" not in outcome.output, said
    if outcome.exit_code == 1:
        error = next(line for line in outcome.output.splitlines() if line.startswith("error:"))
        assert 15 < len(error) < 2000, said
    assert outcome.exit_code in (0, 1, 2), said


@pytest.mark.parametrize("command", BASES)
def test_malformed_options(command, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [part.format(**files) for part in BASES[command]]
    bad = ["nose", "-1", "nan", str(files["damaged"]), str(files["damaged"].parent), ""]
    for number, option in enumerate(COMMANDS[command]):
        for value in (bad[number % len(bad)], bad[(number + 3) % len(bad)]):
            refused_or_done([*command.split(), *base, option, value])
    for place, part in enumerate(base):
        if part.startswith(str(files["plan"].parent)):
            for value in ("nose.json", str(files["damaged"]), str(tmp_path)):
                refused_or_done([*command.split(), *base[:place], value, *base[place + 1 :]])
    refused_or_done([*command.split(), *base, "--nose"])


def test_every_command_with_options_is_tried():
    assert {name for name, options in COMMANDS.items() if options} - {"bench runtime"} == set(BASES) - {"factors show"}
