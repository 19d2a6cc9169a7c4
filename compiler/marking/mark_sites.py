"""Finding the sites in a traced model and marking them in its graph.

A marker is an identity node behind the value of a site; everything that used the value uses the marker. Passes rewrite
markers and never have to look for a site again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.compiler.marking.graphs import inputs_of, live_nodes, macs_of, storages_of, written_storages
from stepgraph.compiler.tracing.trace import Trace
from stepgraph.errors import CompileError
from stepgraph.node_facts import MACS, MARKER, MUTATES, SITE, output_of
from stepgraph.plan import Site, joint_calls
from stepgraph.runtime.program.copy_graph import copy_nodes


def site_value(value: torch.Tensor, stack_input: torch.Tensor | None = None, *, site: str) -> torch.Tensor:
    """Identity: `value` is the value of `site`. For `stack_residual` the site's value is `value - stack_input`."""
    return value


@dataclass(frozen=True)
class MarkedGraph:
    """A traced graph with a marker for every site.

    Attributes:
        trace: Where it came from; its graph is not changed.
        graph: A copy with markers; a marker's meta holds its site's index as `marker`, and every node that belongs to a
            site holds the innermost one's name as `site`.
        sites: In the order of their markers.
        macs: Multiply-accumulates of the whole graph per sample.
        batch: The batch size that was traced.
        family: Whose sites these are.
    """

    trace: Trace
    graph: fx.Graph
    sites: tuple[Site, ...]
    macs: int
    batch: int
    family: Family


def bound_copy(marked: MarkedGraph, model: nn.Module, copies: dict[fx.Node, fx.Node] | None = None) -> fx.GraphModule:
    """A copy of the marked graph on a model's parameters and modules; `copies` takes down which node is whose copy."""
    graph = fx.Graph()
    graph.output(copy_nodes(marked.graph, graph, {} if copies is None else copies))
    return marked.trace.bind(model, graph)


def unmark(graph: fx.Graph) -> int:
    """Replace every marker by the value it marks; returns how many there were."""
    markers = [node for node in graph.nodes if MARKER in node.meta]
    for marker in markers:
        value = marker.args[0]
        assert isinstance(value, fx.Node)
        marker.replace_all_uses_with(value)
        graph.erase_node(marker)
    return len(markers)


def mark_sites(trace: Trace, family: Family) -> MarkedGraph:
    """Find the sites of a traced model and put markers on them.

    Raises:
        CompileError: The model does not have the blocks that its family describes.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(copy_nodes(trace.graph, graph, copies))
    blocks = _blocks(trace, family)
    # What nothing reads, such as the text output of SD3's last attention, has no value to reuse.
    live = live_nodes([output_of(trace.graph)])
    current: dict[fx.Node, fx.Node] = {}
    ends: dict[fx.Node, fx.Node] = {}
    site_of: dict[fx.Node, Site] = {}

    def mark(original: fx.Node, last: fx.Node, site: Site, *extra: fx.Node) -> None:
        # The value is what the site leaves behind at its end: it may write to it in place after the node that made it.
        value, end = current.get(original, copies[original]), ends.get(last, copies[last])
        with graph.inserting_after(max(value, end)):
            marker = graph.call_function(site_value, (value, *extra), {"site": site.name})
        value.replace_all_uses_with(marker, delete_user_cb=lambda user: marker < user)
        marker.meta |= value.meta | {MUTATES: frozenset(), MACS: 0}
        site_of[marker] = site
        current[original] = ends[last] = marker

    for path, stack in blocks.items():
        for child in stack.children:
            for call_index in range(_calls(trace, f"{path}.{child}")):
                call, kinds = trace.calls[f"{path}.{child}", call_index], stack.kinds(child, call_index)
                _refuse_other_outputs(f"{path}.{child}", len(call.outputs), kinds)
                for position, (node, kind) in enumerate(zip(call.outputs, kinds, strict=True)):
                    if node in live:
                        mark(node, call.last, Site(f"{path}.{child}", kind, call_index, position))
        call = trace.calls[path, 0]
        if stack.streams:
            mark(call.outputs[0], call.last, Site(path, "block"))
    first, last = (trace.calls[list(blocks)[end], 0] for end in (0, -1))
    if family.tokens is not None and family.tokens_in is not None:
        tokens_in = _kept(graph, copies[first.inputs[family.tokens_in]], copies[first.before])
        mark(last.outputs[family.tokens], last.last, Site("", "stack_residual"), tokens_in)
    if family.tokens is not None:
        mark(last.outputs[family.tokens], last.last, Site("", "hidden"))
    output = output_of(trace.graph)
    if len(output.all_input_nodes) == 1:
        mark(output.all_input_nodes[0], output.prev, Site("", "output"))
    graph.lint()
    _name_members(graph, blocks)
    return _measured(trace, graph, family, site_of)


def _kept(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """The node's value behind `before`: a copy of it where the graph writes to it in place."""
    if not storages_of(node) & written_storages(graph):
        return node
    with graph.inserting_after(max(node, before)):
        copy = graph.call_method("clone", (node,))
    copy.meta |= {"val": node.meta["val"].clone()}
    return copy


def _blocks(trace: Trace, family: Family) -> dict[str, Stack]:
    """Paths of the transformer blocks in call order, each with what it holds."""
    paths = [path for path, call in trace.calls if call == 0]
    stacks = {path: stack for path in paths for stack in family.stacks if stack.holds(path)}
    if not stacks:
        places = ", ".join(stack.blocks for stack in family.stacks)
        raise CompileError(f"the model ran no block at {places}, where its family keeps its transformer blocks")
    return stacks


def _refuse_other_outputs(path: str, outputs: int, kinds: tuple[str, ...]) -> None:
    if outputs != len(kinds):
        raise CompileError(
            f"{path} returned {outputs} tensors; expected {len(kinds)} ({', '.join(kinds)}). Another attention processor, such "
            f"as an IP adapter's? Take it off, or teach it to the family in compiler/models"
        )


def _calls(trace: Trace, path: str) -> int:
    return sum(1 for known, _ in trace.calls if known == path)


def _name_members(graph: fx.Graph, blocks: Mapping[str, Stack]) -> None:
    """Write into every node's meta the name of the innermost module site it belongs to."""
    members = {f"{path}.{child}" for path, stack in blocks.items() for child in stack.children}
    members |= {path for path, stack in blocks.items() if stack.streams}
    for node in graph.nodes:
        inside = [key for key, (path, _) in node.meta.get("nn_module_stack", {}).items() if path in members]
        if inside:
            node.meta[SITE] = inside[-1].replace("@", "#")


def _measured(trace: Trace, graph: fx.Graph, family: Family, site_of: Mapping[fx.Node, Site]) -> MarkedGraph:
    """Number the markers in graph order and measure what a reuse of each saves and how large its value is."""
    output = output_of(graph)
    batch = next((value.shape[0] for name, value in trace.inputs.items() if name not in family.unbatched), 1)
    markers = [node for node in graph.nodes if node in site_of]
    for index, marker in enumerate(markers):
        marker.meta[MARKER] = index
    total = macs_of(live_nodes([output]))
    sites = sized(markers, [site_of[marker] for marker in markers], batch)
    return MarkedGraph(trace, graph, sites, total // batch, batch, family)


def sized(markers: Sequence[fx.Node], sites: Sequence[Site], batch: int) -> tuple[Site, ...]:
    """The sites with what a reuse of each saves and how large its value is, per sample, as their markers stand."""
    measured = []
    for node, site, macs in zip(markers, sites, savings(markers, sites, macs_of), strict=True):
        value: torch.Tensor = node.meta["val"]
        size = value.numel() * value.element_size()
        measured.append(replace(site, macs=int(macs) // batch, bytes=size // batch))
    return tuple(measured)


def savings(markers: Sequence[fx.Node], sites: Sequence[Site], measure: Callable[[set[fx.Node]], float]) -> list[float]:
    """What a reuse of each marked site saves, by a measure of sets of nodes.

    Only all outputs of a joint call together save the call itself: their figures add up to that.
    """
    live = LiveGraph(markers[0].graph)
    saved = [measure(live.saved_by([marker])) for marker in markers]
    for members in joint_calls(sites):
        first, *rest = members
        saved[first] = measure(live.saved_by([markers[i] for i in members])) - sum(saved[i] for i in rest)
    return saved


class LiveGraph:
    """What a marked graph runs when nothing is reused, and what reuses take away from that."""

    def __init__(self, graph: fx.Graph) -> None:
        self._output = output_of(graph)
        self._nodes = live_nodes([self._output])
        self._uses = Counter(value for node in self._nodes for value in inputs_of(node))
        self._writes = any(node.meta.get(MUTATES) for node in graph.nodes)

    def saved_by(self, markers: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes that need not run where these markers' sites, and no others, are reused."""
        # A reused stack residual is added to the tokens that go into the stack.
        needed = [value for marker in markers for value in marker.all_input_nodes[1:]]
        if self._writes:
            left = live_nodes([self._output], cut=markers)
            return self._nodes - left.union(*(live_nodes([value]) for value in needed))
        # Without writes in place, a node goes with the last of its users: no more is visited than what goes.
        uses, saved, pending = Counter(needed), set[fx.Node](), list(markers)
        while pending:
            for value in inputs_of(pending.pop()):
                uses[value] -= 1
                if self._uses[value] + uses[value] == 0 and value in self._nodes:
                    saved.add(value)
                    if value not in markers:
                        pending.append(value)
        return saved


def same_sites(planned: tuple[Site, ...], marked: tuple[Site, ...]) -> str | None:
    """What differs between a plan's sites and a model's, in words; None where they agree."""
    plan_names, model_names = [(s.name, s.kind) for s in planned], [(s.name, s.kind) for s in marked]
    if plan_names == model_names:
        return None
    unknown = [name for name, _ in plan_names if name not in dict(model_names)]
    missing = [name for name, _ in model_names if name not in dict(plan_names)]
    if unknown:
        known = ", ".join(name for name, _ in model_names[:6])
        return f"unknown site {unknown[0]!r} in the plan; the model has {known}, ..."
    if missing:
        return f"the plan says nothing about the site {missing[0]!r}"
    return "the plan lists the sites in another order or with other kinds than the model has them"
