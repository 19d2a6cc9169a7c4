"""Drawings of a variant: what its blocks do as SVG, and its whole graph as DOT."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor, fx

from stepgraph.node_facts import PROVIDER, op_of, output_of
from stepgraph.plan import COMPUTE, DEAD, MODULE_KINDS, CachePlan
from stepgraph.plan.liveness import StepTraffic
from stepgraph.plan.plot import COLOURS

# What a site's action is called, and the colour of writing on it.
WORDS = {"C": "computed", "R": "reused", "L": "low-rank", "F": "forecast", DEAD: "not needed"}
INK = {"C": "#ffffff", "R": "#3a2b00", "L": "#10240a", "F": "#ffffff", DEAD: "#6b7078"}
# What the operations do that passes put in place of a site's own.
CORRECTIONS = {"linear_combination": "F", "lowrank_delta": "L"}
GREY, LINE, TEXT = "#d9dce1", "#aab0ba", "#2b2f36"
# Sizes in pixels; blocks of a column, at least; columns, at most.
CHIP, HIGH, GAP, LABEL = 118, 36, 10, 40
LEAST_ROWS, MOST_COLUMNS = 6, 4


@dataclass(frozen=True)
class Picture:
    """What is drawn of a variant.

    Attributes:
        plan: The plan.
        traffic: What the variant reads and stores.
        row: One action letter per site.
        graph: Its graph.
        title: A line.
        notes: Lines below it.
    """

    plan: CachePlan
    traffic: StepTraffic
    row: str
    graph: fx.Graph
    title: str
    notes: Sequence[str]

    @property
    def blocks(self) -> dict[str, list[int]]:
        """Path of every block -> indices of its module sites, in order; a module outside blocks is one by itself."""
        stacks = [site.path for site in self.plan.sites if site.kind == "block"]
        blocks: dict[str, list[int]] = {path: [] for path in stacks}
        for i, site in enumerate(self.plan.sites):
            if site.kind in MODULE_KINDS:
                blocks.setdefault(next((path for path in stacks if _inside(site.path, path)), site.path), []).append(i)
        return blocks

    @property
    def stored(self) -> frozenset[int]:
        """Sites of which something is kept for a later step."""
        return frozenset(stored.site for stored in self.traffic.stores)


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def paths_of(node: fx.Node) -> list[str]:
    """The modules that a node belongs to, outermost first; what a pass has made belongs to where it is used."""
    stacks = (modules for n in (node, *node.users) if (modules := n.meta.get("nn_module_stack")))
    stack: Mapping[str, Any] = next(stacks, {})
    return [entry[0] if isinstance(entry, tuple) else key for key, entry in stack.items()]


def owner_of(node: fx.Node, paths: Collection[str]) -> str:
    """The innermost of some modules that a node belongs to, or nothing."""
    return next((path for path in reversed(paths_of(node)) if path in paths), "")


def operations(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that do something."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


# -- SVG: blocks as cards, sites as chips ----------------------------------------------------------------------------------


def draw_svg(picture: Picture) -> str:
    """The blocks of a variant as cards, in columns read downwards, each with what becomes of its sites."""
    blocks = list(picture.blocks.items())
    wide = LABEL + CHIP * max((len(sites) for _, sites in blocks), default=1) + 2 * GAP
    rows = max(min(len(blocks), LEAST_ROWS), -(-len(blocks) // MOST_COLUMNS), 1)
    columns = -(-len(blocks) // rows)
    top = 64 + 18 * len(picture.notes)
    width = max(GAP + columns * (wide + 2 * GAP), 620)
    body = [_text(16, 28, picture.title, 17, TEXT, "bold")]
    body += [_text(16, 50 + 18 * line, note, 12, "#5a616c") for line, note in enumerate(picture.notes)]
    counts = _counts(picture, [path for path, _ in blocks])
    for place, (path, sites) in enumerate(blocks):
        x, y = GAP + place // rows * (wide + 2 * GAP), top + place % rows * (HIGH + 2 * GAP)
        if place % rows < rows - 1 and place < len(blocks) - 1:
            body.append(f'<path d="M{x + 20} {y + HIGH + GAP} v{GAP}" stroke="{LINE}" stroke-width="2"/>')
        body += _card(picture, path, sites, x, y, wide, counts)
    bottom = top + rows * (HIGH + 2 * GAP) + 8
    body += _whole_model(picture, counts[""], bottom)
    body += _legend(bottom + 30)
    height = bottom + 62
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _counts(picture: Picture, blocks: Collection[str]) -> Counter[str]:
    """Operations of every site and block that are left; those of a site do not count for its block."""
    known = {*blocks, *(site.path for site in picture.plan.sites if site.kind in MODULE_KINDS)}
    return Counter(owner_of(node, known) for node in operations(picture.graph))


def _card(picture: Picture, path: str, sites: Sequence[int], x: int, y: int, wide: int, counts: Counter[str]) -> list[str]:
    """A block: its number, the operations between its sites, and a chip per site."""
    of_block = next((i for i, site in enumerate(picture.plan.sites) if site.kind == "block" and site.path == path), None)
    letter = picture.row[of_block] if of_block is not None else COMPUTE
    replaced = letter != COMPUTE
    fill = COLOURS[letter] if replaced else "#f4f5f7"
    body = [f'<rect x="{x}" y="{y}" width="{wide}" height="{HIGH + GAP}" rx="7" fill="{fill}" stroke="{LINE}"/>']
    body.append(f"<title>{escape(path)}</title>")
    ink = INK[letter] if replaced else TEXT
    body.append(_text(x + 9, y + 21, path.rpartition(".")[2] if path else "?", 13, ink, "bold"))
    between = "" if replaced or not counts[path] else _ops(counts[path])
    if replaced or between:
        body.append(_text(x + 9, y + 36, WORDS[letter] if replaced else between, 9, ink if replaced else "#7b828d"))
    for place, index in enumerate(sites):
        if picture.row[index] != DEAD:
            body += _chip(picture, index, x + LABEL + GAP + place * CHIP, y + 5, counts)
    return body


def _chip(picture: Picture, index: int, x: int, y: int, counts: Counter[str]) -> list[str]:
    site, letter = picture.plan.sites[index], picture.row[index]
    ops = counts[site.path]
    words = WORDS[letter] + (f", {_ops(ops)}" if ops and not site.output else "")
    body = [
        f'<rect x="{x}" y="{y}" width="{CHIP - 6}" height="{HIGH}" rx="5" fill="{COLOURS[letter]}"/>',
        _text(x + 8, y + 15, site.kind, 12, INK[letter], "bold"),
        _text(x + 8, y + 29, words, 10, INK[letter]),
    ]
    if index in picture.stored:
        body.append(f'<path d="M{x + CHIP - 22} {y + 7} h10 l-5 8 z" fill="#ffffff" stroke="{TEXT}" stroke-width="0.6"/>')
    return body


def _ops(count: int) -> str:
    return f"{count} op{'s' if count != 1 else ''}"


def _whole_model(picture: Picture, outside: int, y: int) -> list[str]:
    """What is left outside the blocks, and the sites of the whole model that this variant replaces or keeps."""
    words = [f"outside the blocks: {_ops(outside)}"]
    for i, site in enumerate(picture.plan.sites):
        replaced, stored = picture.row[i] not in (COMPUTE, DEAD), i in picture.stored
        if site.kind in ("hidden", "stack_residual", "output") and (replaced or stored):
            words.append(f"{site.name} {WORDS[picture.row[i]]}{', kept' if stored else ''}")
    return [_text(16, y + 12, "; ".join(words), 12, TEXT)]


def _legend(y: int) -> list[str]:
    body = []
    for column, (letter, word) in enumerate(WORDS.items()):
        x = 16 + 100 * column
        body.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{COLOURS[letter]}"/>')
        body.append(_text(x + 20, y + 12, word, 12, TEXT))
    body.append(f'<path d="M521 {y + 3} h10 l-5 8 z" fill="#ffffff" stroke="{TEXT}"/>')
    body.append(_text(538, y + 12, "kept", 12, TEXT))
    return body


def _text(x: int, y: int, words: str, size: int, fill: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(words)}</text>'


# -- DOT: every operation ----------------------------------------------------------------------------------------------------


def draw_dot(picture: Picture) -> str:
    """Every operation of a variant as a graph for Graphviz, in clusters by block, coloured by the site it belongs to."""
    sites = {site.path: i for i, site in enumerate(picture.plan.sites) if site.kind in MODULE_KINDS}
    names = {node: f"n{position}" for position, node in enumerate(picture.graph.nodes)}
    clusters: dict[str, list[str]] = {}
    for node in picture.graph.nodes:
        if node.op not in ("get_attr", "output"):
            block = owner_of(node, picture.blocks) if node.op != "placeholder" else ""
            clusters.setdefault(block, []).append(f"{names[node]} [{_look(picture, node, sites)}];")
    lines = ["digraph variant {", f"  label={_quoted(picture.title)}; labelloc=t; rankdir=TB; fontname=Helvetica;"]
    lines.append('  node [shape=box, style="filled,rounded", fontname=Helvetica, fontsize=10, color="#aab0ba"];')
    for cluster, (block, nodes) in enumerate(clusters.items()):
        if block:
            lines += [f"  subgraph cluster_{cluster} {{", f"    label={_quoted(block)}; color={_quoted(LINE)};"]
        lines += [f"    {node}" for node in nodes]
        lines += ["  }"] if block else []
    output = output_of(picture.graph)
    lines.append(f'  {names[output]} [label="results and stored values", fillcolor="#ffffff"];')
    for node in picture.graph.nodes:
        lines += [f"  {names[source]} -> {names[node]};" for source in node.all_input_nodes if source.op != "get_attr"]
    return "\n".join([*lines, "}", ""])


def _look(picture: Picture, node: fx.Node, sites: dict[str, int]) -> str:
    """Label and colours of an operation."""
    fill, ink = GREY, TEXT
    if node.op == "placeholder":
        fill = COLOURS["R"] if str(node.target).startswith("slot_") else "#ffffff"
    elif (corrects := CORRECTIONS.get(op_of(node))) is not None:
        fill, ink = COLOURS[corrects], INK[corrects]
    else:
        owner = owner_of(node, sites)
        if owner:
            fill, ink = COLOURS[picture.row[sites[owner]]], INK[picture.row[sites[owner]]]
    return f'label={_quoted(_label(node))}, fillcolor="{fill}", fontcolor="{ink}"'


def _label(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = f"\n{list(value.shape)}" if isinstance(value, Tensor) else ""
    if node.op in ("placeholder", "call_module", "call_method"):
        return f"{node.target}{shape}"
    return f"{node.meta.get(PROVIDER) or getattr(node.target, '__name__', node.target)}{shape}"


def _quoted(words: str) -> str:
    return '"' + words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
