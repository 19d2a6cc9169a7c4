"""Plans on every transformer class that diffusers exports, against an oracle that replaces forwards.

    python -m stepgraph.bench.deploy.zoo [CLASS ...]

Of each class, a tiny model with random weights is traced once and given three plans: full, every second step, and random
reuses. Each is run on the latents, timesteps and prompts of two seeds, exactly and (every second step) with hoisting and fused
operations. Without classes named, the table in docs/families.md is written anew.
"""

import argparse
import random
import re
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.bench.deploy import zoo_images_a, zoo_images_b, zoo_videos_a, zoo_videos_b
from stepgraph.bench.deploy.zoo_draws import MODELS, build_tiny, draw_inputs, stand_in_for_torchvision
from stepgraph.bench.deploy.zoo_oracle import ZooOracle
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.entry.make_plan import plan_traced
from stepgraph.compiler.marking.graphs import live_nodes, macs_of
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.models import FAMILIES
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import StepgraphError
from stepgraph.files.whole_file import whole_file
from stepgraph.inputs import latents_key, timestep_key
from stepgraph.metrics import relative_l2
from stepgraph.node_facts import MARKER, output_of
from stepgraph.plan import MODULE_KINDS, CachePlan
from stepgraph.runtime.executable import Executable

ZOO = (zoo_images_a, zoo_images_b, zoo_videos_a, zoo_videos_b)
STEPS, SEEDS = 4, (1, 2)
TABLE = Path("docs/families.md")
BEGIN, END = "<!-- the zoo's table begins -->", "<!-- the zoo's table ends -->"
COLUMNS = ("class", "sites from", "sites", "share", "result")
# Markdown takes a plain one for the beginning of a link.
BRACKET = "\\["
# Relative L2 of what is not exact.
ROUNDING = 1e-5


def examine(class_name: str) -> dict[str, Any]:
    """Trace, plan, compile and run one class.

    Returns:
        What the table says of it: whose sites they are, how many, their share of the blocks' work, and the result: "exact", how
        far it is off, or why it is refused; also the numbers that this is made of, and seconds.
    """
    started = time.perf_counter()
    adapted = any(class_name in family.classes for family in FAMILIES)
    row: dict[str, Any] = {"class": class_name, "sites from": "adapter" if adapted else "finder"}
    try:
        traced = TracedModel(build_tiny(class_name))
        plans = _plans(traced, draw_inputs(class_name, 1))
        marked = traced.marked(draw_inputs(class_name, 1))
        row |= {"sites": len(marked.sites), "share": f"{share_of_blocks(marked):.0%}"}
        row["off"] = [off for plan in plans for off in _differences(class_name, traced, plan, marked, exact=True)]
        row["rounded"] = max(_differences(class_name, traced, plans[1], marked, exact=False))
        row["result"] = _result(row["off"], row["rounded"])
    except StepgraphError as refusal:
        row |= {"refusal": type(refusal).__name__, "result": f"refused: {_first_words(refusal)}"}
    return row | {"seconds": time.perf_counter() - started}


def _result(off: Sequence[float], rounded: float) -> str:
    if any(off):
        return f"WRONG: off by {max(off):.2g}"
    return "exact" if rounded <= ROUNDING else f"WRONG: fused, off by {rounded:.2g}"


def _plans(traced: TracedModel, inputs: Mapping[str, Any]) -> list[CachePlan]:
    """Full, every second step, and random reuses."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    def plan(policy: str, **arguments: Any) -> CachePlan:
        return plan_traced(policy, None, traced, scheduler, arguments, steps=STEPS, example_inputs=inputs, guidance="none")

    full = plan("full")
    return [full, plan("interval", every=2), plan("manual", actions=random_actions(full))]


def random_actions(plan: CachePlan, seed: int = 0) -> dict[str, str]:
    """Reuses at random places; outputs of one call are reused together, and the whole stack more seldom."""
    choice, rows = random.Random(seed), dict[tuple[str, int], str]()
    actions = {}
    for site in plan.sites:
        letters = "CRR" if site.kind in MODULE_KINDS else "CCCCR"
        row = "C" + "".join(choice.choice(letters) for _ in range(plan.steps - 1))
        actions[site.name] = rows.setdefault((site.path or site.kind, site.call), row)
    return actions


def _differences(class_name: str, traced: TracedModel, plan: CachePlan, marked: MarkedGraph, exact: bool) -> list[float]:
    """How far a plan's run is from the oracle's (relative L2), by seed; 0 where all bits are equal."""
    example = draw_inputs(class_name, 1)
    executable = compile_plan(traced.model, plan, example, CompileConfig("eager", exact), traced=traced)
    return [_difference(class_name, traced.model, executable, marked, seed) for seed in SEEDS]


def _difference(class_name: str, model: nn.Module, executable: Executable, marked: MarkedGraph, seed: int) -> float:
    session, oracle, worst = executable.session(), ZooOracle(model, executable.plan, ends_of(marked)), 0.0
    for step in range(STEPS):
        inputs, other = draw_inputs(class_name, seed), draw_inputs(class_name, 10 * seed + step)
        inputs |= {name: other[name] for name in (latents_key(inputs), timestep_key(inputs)) if name is not None}
        results = pytree.tree_leaves(session(**inputs))
        for result, wanted in zip(results, oracle(**inputs), strict=True):
            if not torch.equal(result, wanted):
                worst = max(worst, relative_l2(result, wanted))
    return worst


def ends_of(marked: MarkedGraph) -> tuple[str, int | None, str, int | None]:
    """Where the sites of the whole stack are, as the oracle takes it."""
    family = marked.family
    blocks = [path for path, call_index in marked.trace.calls if call_index == 0 and family.holds_block(path)]
    return blocks[0], family.tokens_in, blocks[-1], family.tokens


def share_of_blocks(marked: MarkedGraph) -> float:
    """The share of the blocks' multiply-accumulates that is not computed where every module site is reused."""
    output, family = output_of(marked.graph), marked.family
    markers = [n for n in marked.graph.nodes if MARKER in n.meta and marked.sites[n.meta[MARKER]].kind in MODULE_KINDS]
    work = {
        node
        for node in live_nodes([output])
        if any(family.holds_block(path) for path, _ in node.meta.get("nn_module_stack", {}).values())
    }
    return 1 - macs_of(work & live_nodes([output], cut=markers)) / max(1, macs_of(work))


def _first_words(refusal: StepgraphError) -> str:
    """The beginning of a refusal, without where packages lie."""
    packages = sysconfig.get_paths()["purelib"] + "/"
    said = re.sub(r"\S*site-packages/|" + re.escape(packages), "", str(refusal)).replace("|", "/")
    return said.split("; ")[0]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path = TABLE) -> None:
    """Replace the table between its two marks in a page."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(str(row.get(column, '')).replace('[', BRACKET) for column in COLUMNS)} |" for row in rows]
    page = path.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    with whole_file(path) as partial:
        partial.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Examine the classes and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="names of diffusers' classes; all unless given")
    names = parser.parse_args().classes
    torch.set_num_threads(1)
    stand_in_for_torchvision()
    rows = []
    for name in names or sorted(MODELS):
        rows.append(examine(name))
        get_logger("zoo").info("%s: %s, %.1f s", name, rows[-1]["result"], rows[-1]["seconds"])
    show_rows("plans on every class", rows, (*COLUMNS, "seconds"))
    if not names:
        write_table(rows)


if __name__ == "__main__":
    main()
