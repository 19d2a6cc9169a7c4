"""Reused values that are only ever added up are stored as their sum (docs/design.md, decision 7).

Where reused sites have no gate, as PixArt's cross-attentions and U-ViT's branches have none, the steps that reuse a run of them
read x + C_1 + C_2 + ...: one stored sum takes the place of the values.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, factors_of, slot_name
from stepgraph.compiler.interfaces.program_context import ProgramContext, RowGraphs
from stepgraph.node_facts import op_of, output_of
from stepgraph.ops import gated_residual
from stepgraph.plan.liveness import VALUE


def fold_sums(program: RowGraphs, ctx: ProgramContext) -> int:
    """Store sums in place of values that every row reads as one of the same ungated terms, or not at all.

    Before, in the row that stores, and in the one that reads::

        return (%sample, %attn2_0, %attn2_1)
        %x1 = gated_residual(%x, [%gate, %ones, %gate_1, %ones], [%slot_attn1_0, %slot_attn2_0, %slot_attn1_1, %slot_attn2_1])

    After::

        %sum = add(%attn2_1, %attn2_0)
        return (%sample, %sum)
        %x1 = gated_residual(%x, [%gate, %ones, %gate_1], [%slot_attn1_0, %slot_attn2_0, %slot_attn1_1])

    The contexts follow, and `program.folded` names the sites whose values are now part of another's; returns how many.
    """
    groups = _groups(program)
    folded = frozenset(site for _, *others in groups for site in others)
    if not folded:
        return 0
    contexts = []
    for gm, context in zip(program.graphs, program.contexts, strict=True):
        _store_sums(gm, context, groups, ctx.results)
        _read_sums(gm, context, folded)
        reads = tuple(read for read in context.reads if read.part != VALUE or read.site not in folded)
        stores = tuple((site, part) for site, part in context.stores if part != VALUE or site not in folded)
        contexts.append(replace(context, reads=reads, stores=stores))
    program.contexts, program.folded = tuple(contexts), folded
    return len(folded)


def _groups(program: RowGraphs) -> list[list[int]]:
    """Sites whose stored values go together everywhere, in the model's order."""
    told: dict[int, list[object]] = {}
    for variant, (gm, context) in enumerate(zip(program.graphs, program.contexts, strict=True)):
        run_of = {site: (variant, i) for i, run in enumerate(_runs(gm, context)) for site in run}
        for read in context.reads:
            # What is read in any other way stays alone.
            told.setdefault(read.site, []).append(run_of.get(read.site, (variant, "alone", read.site)))
        for site, part in context.stores:
            told.setdefault(site, []).append((variant, part))
    together: dict[tuple[object, ...], list[int]] = {}
    for site in sorted(told):
        together.setdefault(tuple(told[site]), []).append(site)
    return [group for group in together.values() if len(group) > 1]


def _runs(gm: fx.GraphModule, context: PassContext) -> list[list[int]]:
    """Sites whose stored values a graph adds up without gates, and reads for nothing else."""
    slots = _slots(gm, context)
    runs: list[list[int]] = []
    ends: dict[fx.Node, list[int]] = {}
    for node in gm.graph.nodes:
        if _is_residual(node):
            runs.append([slots[value] for value in _ungated(node, slots)])
        for value, x in factors_of(node, "add"):
            if value in slots and len(value.users) == 1 and x not in slots:
                # A sum that only the next one reads goes on.
                run = ends.get(x, []) if len(x.users) == 1 else []
                ends[node] = [*run, slots[value]]
                runs = [known for known in runs if known is not run] + [ends[node]]
    return [run for run in runs if len(run) > 1]


def _slots(gm: fx.GraphModule, context: PassContext) -> dict[fx.Node, int]:
    """The inputs of a graph that are sites' last stored values."""
    names = {slot_name(context.sites[read.site]): read.site for read in context.reads if read.part == VALUE and read.age == 1}
    return {node: names[str(node.target)] for node in gm.graph.find_nodes(op="placeholder") if str(node.target) in names}


def _is_residual(node: fx.Node) -> bool:
    return op_of(node) == gated_residual.name


def _ungated(node: fx.Node, slots: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The stored values that a run of residuals adds with gates of ones."""
    _, gates, values = node.args
    pairs = zip(gates, values, strict=True)  # type: ignore[arg-type]
    return [value for gate, value in pairs if _is_one(gate) and value in slots and len(value.users) == 1]


def _is_one(gate: fx.Node) -> bool:
    return gate.target is torch.ones_like or (gate.target is torch.full and gate.args[1] in (1, 1.0))


def _store_sums(gm: fx.GraphModule, context: PassContext, groups: Iterable[Sequence[int]], results: int) -> None:
    """Replace the stored values of each group by their sum, which is added up where each is made."""
    output = output_of(gm.graph)
    nodes: list[fx.Node | None] = list(output.args[0])
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    places = _places(context, results)
    for group in groups:
        if (group[0], VALUE) not in places:
            continue
        first, *others = (places[site, VALUE] for site in group)
        total, *rest = sorted((output.args[0][place] for place in (first, *others)), key=order.__getitem__)
        for value in rest:
            with gm.graph.inserting_after(value):
                added = gm.graph.call_function(torch.add, (value, total))
            added.meta |= {key: entry for key, entry in value.meta.items() if key in ("val", "nn_module_stack")}
            total = added
        nodes[first] = total
        for place in others:
            nodes[place] = None
    output.args = (tuple(node for node in nodes if node is not None),)


def _places(context: PassContext, results: int) -> dict[tuple[int, str], int]:
    """Where each stored value is among the outputs, for values before any of several tensors."""
    places, at = {}, results
    for site, part in context.stores:
        places[site, part] = at
        at += 1 if part == VALUE else sum(len(group.maps) + 1 for group in context.groups.get(site, ())) or 1
    return places


def _read_sums(gm: fx.GraphModule, context: PassContext, folded: Collection[int]) -> None:
    """Take out all values but the first of each group, which is the sum now."""
    gone = [node for node, site in _slots(gm, context).items() if site in folded]
    if not gone:
        return
    for node in list(gm.graph.nodes):
        if _is_residual(node):
            x, gates, values = node.args
            left = [(gate, value) for gate, value in zip(gates, values, strict=True) if value not in gone]
            node.args = (x, [gate for gate, _ in left], [value for _, value in left])
        rest = next((x for value, x in factors_of(node, "add") if value in gone), None)
        if rest is not None:
            node.replace_all_uses_with(rest)
            gm.graph.erase_node(node)
    for node in gone:
        gm.graph.erase_node(node)
