"""Graph exports: every variant's source, drawing and DOT, against the rows and graphs that they show."""

import json
import re
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import stepgraph as sg
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.cli.main import app
from stepgraph.compiler.entry.load_model import load_model, load_scheduler
from stepgraph.plan.plot import COLOURS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An executable whose second step reuses, forecasts and computes, and its graph export."""
    model = tiny_dit()
    actions = {"attn": "CRCR", "ff": "CCCC", "hidden": "CCCR"}
    plan = sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=4, actions=actions)
    plan = sg.forecast(plan, sites=["transformer_blocks.0.attn1"])
    exe = sg.compile(model, plan, inputs(2), backend="eager")
    return exe, exe.export(tmp_path_factory.mktemp("graphs") / "out", "graph")


def test_every_variant_has_its_files(exported):
    exe, folder = exported
    manifest = json.loads((folder / "schedule.json").read_text())
    names = [variant["name"] for variant in manifest["variants"]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["schedule.json", *(f"{name}.{ending}" for name in names for ending in ("py", "svg", "dot"))]
    )
    assert {step: number for number, v in enumerate(manifest["variants"]) for step in v["steps"]} == dict(
        enumerate(exe.default.rows)
    )
    for number, name in enumerate(names):
        source = exe.default.variants[number].graph.print_readable(print_output=False)
        assert (folder / f"{name}.py").read_text() == source


def test_the_drawing_shows_the_row(exported):
    exe, folder = exported
    for number, variant in enumerate(exe.default.variants):
        root = ElementTree.parse(folder / f"variant-{number:03d}.svg").getroot()
        texts = [text.text for text in root.iter(f"{SVG}text")]
        chips = Counter(rect.get("fill") for rect in root.iter(f"{SVG}rect") if rect.get("width") == "112")
        letters = [
            letter
            for site, letter in zip(exe.plan.sites, variant.row, strict=True)
            if site.kind in ("attn", "ff") and letter != "."
        ]
        assert chips == Counter(COLOURS[letter] for letter in letters)
        assert texts.count("attn") == texts.count("ff") == (0 if number == exe.default.rows[3] else 2)
        steps = [str(step) for step, own in enumerate(exe.default.rows) if own == number]
        assert any(re.match(rf"steps? {', '.join(steps)} \({len(steps)} of 4\); manual plan", text) for text in texts)
    # Of the second step's blocks nothing of the attention is left; the feed-forward is Linear, GELU and Linear.
    assert variant_texts(folder, exe.default.rows[1]) >= {"forecast", "reused", "computed, 3 ops"}
    assert any("hidden reused" in text for text in variant_texts(folder, exe.default.rows[3]))


def variant_texts(folder, number: int) -> set[str]:
    """What is written in a drawing."""
    root = ElementTree.parse(folder / f"variant-{number:03d}.svg").getroot()
    return {str(text.text) for text in root.iter(f"{SVG}text")}


def test_the_dot_file_has_every_operation_and_edge(exported):
    exe, folder = exported
    for number, variant in enumerate(exe.default.variants):
        text = (folder / f"variant-{number:03d}.dot").read_text()
        nodes = [node for node in variant.graph.graph.nodes if node.op != "get_attr"]
        assert len(re.findall(r"^ *n\d+ \[label=", text, re.M)) == len(nodes)
        edges = sum(len([n for n in node.all_input_nodes if n.op != "get_attr"]) for node in nodes)
        assert len(re.findall(r"^ *n\d+ -> n\d+;$", text, re.M)) == edges
        slots = sum(node.op == "placeholder" and node.target.startswith("slot_") for node in nodes)
        assert text.count(f'fillcolor="{COLOURS["R"]}"') == slots
        assert text.count("{") == text.count("}")


def test_every_action_has_its_colour(tmp_path):
    pydot = pytest.importorskip("pydot")
    model = tiny_dit()
    actions = {"attn": "CCR", "transformer_blocks.0.ff": "CCR"}
    plan = sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=3, actions=actions)
    plan = sg.forecast(sg.lowrank(plan, kinds=["ff"]), sites=["transformer_blocks.0.attn1"])
    factors = sg.factorize(model, method="svd", rank=4)
    plan = replace(plan, header=replace(plan.header, factors=factors.digest))
    exe = sg.compile(model, plan, inputs(2), backend="eager", factors=factors)
    name = f"variant-{exe.default.rows[2]:03d}"
    folder = exe.export(tmp_path / "out", "graph")
    root = ElementTree.parse(folder / f"{name}.svg").getroot()
    chips = [rect.get("fill") for rect in root.iter(f"{SVG}rect") if rect.get("width") == "112"]
    assert chips == [COLOURS[letter] for letter in "FLRC"]
    (graph,) = pydot.graph_from_dot_file(folder / f"{name}.dot")
    colours: dict[str, Counter[str]] = {}
    for cluster in (graph, *graph.get_subgraphs()):
        nodes = [node for node in cluster.get_nodes() if node.get("fillcolor")]
        colours[(cluster.get("label") or "").strip('"')] = Counter(node.get("fillcolor").strip('"') for node in nodes)
    first, second = (colours[f"transformer_blocks.{i}"] for i in range(2))
    # Of the first block: the forecast; the feed-forward's two maps, each with the one of its results that is used, and the
    # GELU between. Of the second: Linear, GELU and Linear.
    assert {letter: first[COLOURS[letter]] for letter in "CRLF"} == {"C": 0, "R": 0, "L": 5, "F": 1}
    assert {letter: second[COLOURS[letter]] for letter in "CRLF"} == {"C": 3, "R": 0, "L": 0, "F": 0}
    slots = [
        node for node in exe.default.variants[exe.default.rows[2]].graph.graph.nodes if str(node.target).startswith("slot_")
    ]
    outside = colours[f"{exe.plan.header.model}: variant {exe.default.rows[2]} (of 0 to {len(exe.default.variants) - 1})"]
    assert outside[COLOURS["R"]] == len(slots) > 0


def test_a_reused_block_is_one_card(tmp_path):
    model = tiny_dit()
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=4, every=2, kinds=["block"])
    exe = sg.compile(model, plan, inputs(2), backend="eager")
    folder = exe.export(tmp_path / "out", "graph")
    # The last block's tokens are reused, so that nobody needs the first block's.
    assert not {"attn", "ff"} & variant_texts(folder, exe.default.rows[1])
    assert {"attn", "ff"} <= variant_texts(folder, exe.default.rows[0])


def test_the_command_exports_a_plan_file(tmp_path):
    model, scheduler = load_model("glyph-dit", torch.device("cpu"), torch.float32), load_scheduler("glyph-dit")
    sg.make_plan("interval", model=model, scheduler=scheduler, steps=4, every=2).save(tmp_path / "plan.json")
    command = [
        "export",
        "glyph-dit",
        "--plan",
        str(tmp_path / "plan.json"),
        "--format",
        "graph",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert facts["variants"] == 2
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 1
    assert "pass force=True (--force) to replace it" in json.loads(again.stdout)["error"]
    unknown = CliRunner().invoke(app, [*command, "--json", "--force", "--format", "gguf"])
    assert "unknown format 'gguf' of exports; expected pt2, aoti, onnx, graph" in json.loads(unknown.stdout)["error"]
