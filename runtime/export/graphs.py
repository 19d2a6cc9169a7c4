"""Graph exports: what every variant does, as readable source, as a drawing (SVG) and as a graph for Graphviz (DOT)."""

from pathlib import Path
from typing import Any

from stepgraph.fingerprint import fingerprint
from stepgraph.plan.liveness import traffic
from stepgraph.runtime.export.drawing import Picture, draw_dot, draw_svg, operations
from stepgraph.runtime.export.schedule import variant_name
from stepgraph.runtime.program.program import Program
from stepgraph.runtime.session.compiled import Compiled

FORMAT, VERSION = "stepgraph-graph", 1
# How many step numbers a line names.
NAMED = 24


def write_graphs(folder: Path, executable: Compiled, program: Program, **_: Any) -> dict[str, Any]:
    """Write three files per variant; returns which steps each is for (see `stepgraph.runtime.export.export.export`)."""
    variants = []
    for index, variant in enumerate(program.variants):
        name, picture = variant_name(index), picture_of(executable, program, index)
        (folder / f"{name}.py").write_text(variant.graph.print_readable(print_output=False), encoding="utf-8")
        (folder / f"{name}.svg").write_text(draw_svg(picture), encoding="utf-8")
        (folder / f"{name}.dot").write_text(draw_dot(picture), encoding="utf-8")
        steps = [step for step, used in enumerate(program.rows) if used == index]
        variants.append({"name": name, "steps": steps, "row": variant.row, "macs": variant.macs})
    header = executable.plan.header
    facts = {
        "model": header.model,
        "fingerprint": fingerprint(executable.model),
        "policy": header.policy,
        "batch": program.batch,
    }
    sites = [site.name for site in program.plan.sites]
    return {"format": FORMAT, "version": VERSION, **facts, "sites": sites, "variants": variants}


def picture_of(executable: Compiled, program: Program, number: int) -> Picture:
    """What is drawn of a variant."""
    variant, header = program.variants[number], executable.plan.header
    steps = [step for step, used in enumerate(program.rows) if used == number]
    moves, graph = traffic(program.plan)[steps[0]], variant.graph.graph
    share = variant.macs / program.macs_total if program.macs_total else 1.0
    named = ", ".join(map(str, steps[:NAMED])) + (", ..." if len(steps) > NAMED else "")
    when = f"step{'s' if len(steps) > 1 else ''} {named} ({len(steps)} of {len(program.rows)})"
    cost = f"{variant.macs / 1e9:.4g} GMAC a call, {100 * share:.3g} % of a full evaluation"
    moved = (
        f"{len(moves.reads)} stored values read, {len(moves.stores)} kept, {len(variant.tables)} tables from before the loop"
    )
    notes = (
        f"{when}; {header.policy} plan, {header.scheduler}",
        f"{cost}; {len(operations(graph))} operations",
        moved,
    )
    title = f"{header.model}: variant {number} (of 0 to {len(program.variants) - 1})"
    return Picture(program.plan, moves, variant.row, graph, title, notes)
