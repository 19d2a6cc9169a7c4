"""Outlining: a variant is cut into pieces, and equal pieces are one region, compiled once (docs/design.md, decision 4).

A piece is what lies within one transformer block, before the first or behind the last. Runs of reused sites, which are one
operation across blocks, stand between them. A piece's weights are inputs of its region, so that blocks of one make share it;
what a piece hands on is not part of what a region is: it writes whatever one of its pieces needs.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from stepgraph.compiler.tracing.graphs import written_storages
from stepgraph.node_facts import op_of
from stepgraph.ops import INTO, gated_residual
from stepgraph.runtime.program.packed_linear import packed_columns, packed_linear, packs


@dataclass(frozen=True)
class Lifted:
    """A module's forward with its parameters and buffers as arguments.

    Attributes:
        module: Without weights of its own: it is on the meta device.
        names: Of the parameters and buffers, in the order of the arguments behind the first `inputs`.
        inputs: How many arguments are the module's own.
    """

    module: nn.Module
    names: tuple[str, ...]
    inputs: int

    @property
    def __name__(self) -> str:
        """What torch.fx writes into a graph's source."""
        return type(self.module).__name__

    def __repr__(self) -> str:
        """What tells one make of module from another."""
        kind = type(self.module)
        return f"{kind.__module__}.{kind.__qualname__}({self.module.extra_repr()})"

    def __call__(self, *tensors: Any) -> Any:
        """The module's result with these weights."""
        return functional_call(self.module, dict(zip(self.names, tensors[self.inputs :], strict=True)), tensors[: self.inputs])


@dataclass
class Piece:
    """A run of nodes of a variant.

    Attributes:
        nodes: In order.
        kernel: Whether it is a single operation, which needs no compiling.
        inputs: Nodes of the variant whose values it reads.
        weights: Weights it reads, behind its inputs.
        results: Nodes of its own whose values are read outside.
        key: What its region is told by.
    """

    nodes: list[fx.Node]
    kernel: bool = False
    inputs: list[fx.Node] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)
    key: str = ""


@dataclass
class Region:
    """What equal pieces have in common.

    Attributes:
        graph: (*inputs, *weights) -> nothing yet; `finish` adds the memory that its results are written to.
        examples: Of its inputs and weights.
        nodes: Its nodes, in the order of a piece's.
        returned: Numbers of the nodes whose values some piece returns.
    """

    graph: fx.Graph
    examples: tuple[torch.Tensor, ...]
    nodes: list[fx.Node]
    returned: set[int] = field(default_factory=set)

    def finish(self) -> fx.GraphModule:
        """The region's graph: (*inputs, *weights, *memory for its results) -> nothing."""
        values = [self.nodes[number] for number in sorted(self.returned)]
        _fuse_activations(self.graph, values)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(placeholders[-1] if placeholders else self.graph._root):
            # Each goes behind the same node, so the last comes first.
            targets = [self.graph.placeholder(f"out{i}") for i in reversed(range(len(values)))][::-1]
        for target, value in zip(targets, values, strict=True):
            target.meta |= {"val": value.meta["val"].contiguous()}
            if value.target in INTO:
                with self.graph.inserting_before(value):
                    self.graph.call_function(INTO[value.target], value.args, {**value.kwargs, "out": target})
                value.replace_all_uses_with(target)
                self.graph.erase_node(value)
            else:
                self.graph.call_method("copy_", (target, value))
        self.graph.output(())
        return fx.GraphModule({}, self.graph, class_name="Region")


def _fuse_activations(graph: fx.Graph, returned: Sequence[fx.Node]) -> None:
    """Let packed linear maps apply the activation behind them, if nothing else reads what they give."""
    for node in list(graph.nodes):
        activation, (source,) = _activation(node), node.all_input_nodes[:1] or (None,)
        if not activation or source is None or source.target is not packed_linear or source in returned:
            continue
        if len(source.users) == 1 and node not in returned and len(source.args) == 3:
            source.args = (*source.args, activation)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _activation(node: fx.Node) -> str:
    """Which of the activations of `packed_linear` a node is."""
    target = node.target.module if isinstance(node.target, Lifted) else node.target
    if target is F.gelu:
        approximate = node.kwargs.get("approximate", "none")
    elif isinstance(target, nn.GELU):
        approximate = target.approximate
    else:
        return "silu" if target is F.silu or isinstance(target, nn.SiLU) else ""
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def cut(gm: fx.GraphModule, is_block: Callable[[str], bool]) -> list[Piece]:
    """The pieces of a variant, in order; a graph that writes in place is one piece."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    whole = bool(written_storages(gm.graph))
    places = {node: "" if whole else _place(node, is_block) for node in nodes}
    runs = _runs(nodes, places)
    pieces = [Piece(run, kernel=_is_kernel(run)) for run in runs]
    owner = {node: piece for piece in pieces for node in piece.nodes}
    for piece in pieces:
        own = set(piece.nodes)
        read = dict.fromkeys(n for node in piece.nodes for n in node.all_input_nodes if n not in own)
        piece.inputs = [node for node in read if node.op != "get_attr"]
        piece.results = [n for n in piece.nodes if any(owner.get(user) is not piece for user in n.users)]
    return pieces


def _place(node: fx.Node, is_block: Callable[[str], bool]) -> str:
    """The path of the block that a node belongs to, or a place of its own for one pass over several reused sites."""
    if _passes_over_several(node):
        return f"run {node.name}"
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return next((path for path in _paths(stack) if is_block(path)), "")


def _paths(stack: Mapping[str, Any]) -> Iterable[str]:
    for key, entry in stack.items():
        yield entry[0] if isinstance(entry, tuple) else key


def _passes_over_several(node: fx.Node) -> bool:
    return op_of(node) == gated_residual.name and len(node.args[1]) > 1  # type: ignore[arg-type]


def _is_kernel(run: Sequence[fx.Node]) -> bool:
    return len(run) == 1 and _passes_over_several(run[0])


def _runs(nodes: Sequence[fx.Node], places: Mapping[fx.Node, str]) -> list[list[fx.Node]]:
    """Neighbours of one place together. A tuple is taken apart where it is made."""
    home: dict[fx.Node, list[fx.Node]] = {}
    runs = [list(run) for _, run in groupby(nodes, key=lambda node: places[node])]
    for run in runs:
        for node in run:
            home[node] = run
    for node in nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, fx.Node) or isinstance(source.meta.get("val"), torch.Tensor):
            continue
        if home.get(source, home[node]) is not home[node]:
            home[node].remove(node)
            home[source].append(node)
            home[node] = home[source]
    return [run for run in runs if run]


def lift(gm: fx.GraphModule, piece: Piece, prepack: bool) -> Region:
    """A piece as a region of its own; its key and weights are noted in the piece.

    Args:
        gm: The variant.
        piece: Of it.
        prepack: Let linear maps take packed weights where oneDNN has them.
    """
    graph, copies, weights = fx.Graph(), dict[fx.Node, fx.Node](), dict[int, tuple[torch.Tensor, fx.Node]]()
    for number, node in enumerate(piece.inputs):
        copies[node] = graph.placeholder(f"x{number}")
        copies[node].meta |= {"val": node.meta["val"]}

    def weight(tensor: torch.Tensor) -> fx.Node:
        if id(tensor) not in weights:
            with graph.inserting_after(last[0]):
                last[0] = graph.placeholder(f"w{len(weights)}")
            weights[id(tensor)] = tensor, last[0]
        return weights[id(tensor)][1]

    last = [list(copies.values())[-1] if copies else graph._root]
    # What pieces hand on is contiguous.
    lines, numbers = (
        [_facts(_contiguous(node.meta["val"])) for node in piece.inputs],
        {n: f"x{i}" for i, n in enumerate(piece.inputs)},
    )
    nodes = []
    for number, node in enumerate(piece.nodes):
        for value in node.all_input_nodes:
            if value not in copies:
                copies[value] = weight(attribute(gm, str(value.target)))
                numbers[value] = str(copies[value].name)
        copies[node], line = _copied(gm, graph, node, copies, numbers, weight, prepack)
        numbers[node] = f"n{number}"
        lines.append(line)
        nodes.append(copies[node])
    piece.weights = [tensor for tensor, _ in weights.values()]
    piece.key = "\n".join([*lines, *(_facts(tensor) for tensor in piece.weights)])
    graph.lint()
    return Region(graph, tuple(n.meta["val"] for n in piece.inputs) + tuple(piece.weights), nodes)


def _copied(
    gm: fx.GraphModule,
    graph: fx.Graph,
    node: fx.Node,
    copies: Mapping[fx.Node, fx.Node],
    numbers: Mapping[fx.Node, str],
    weight: Callable[[torch.Tensor], fx.Node],
    prepack: bool,
) -> tuple[fx.Node, str]:
    """A node's copy in a region, and a line that says what it does there."""
    named = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(numbers[n]))
    columns = _columns(node) if prepack else None
    if columns is not None and packs(node.args[0].meta["val"], attribute(gm, str(columns[0].target))):  # type: ignore[union-attr]
        whole, *ends = columns
        x, _, bias = (copies.get(n) if isinstance(n, fx.Node) else n for n in node.args)
        made = graph.call_function(packed_columns, (x, copies[whole], bias, *ends))
        made.meta |= node.meta
        return made, f"{packed_columns} {named!r}"
    if node.op != "call_module":
        made = graph.node_copy(node, lambda n: copies[n])
        return made, f"{node.op} {_target(node)} {named!r}"
    module = gm.get_submodule(str(node.target))
    if isinstance(module, nn.Linear):
        return _linear(graph, node, copies, named, module, weight, prepack)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    given = [weight(tensor) for tensor in tensors.values()]
    template = Lifted(_without_weights(module), tuple(tensors), len(node.args))
    own = [copies[n] if isinstance(n, fx.Node) else n for n in node.args]
    made = graph.call_function(template, (*own, *given))
    made.meta |= node.meta
    return made, f"call_module {template!r} {named!r} {[n.name for n in given]}"


def _linear(
    graph: fx.Graph,
    node: fx.Node,
    copies: Mapping[fx.Node, fx.Node],
    named: Any,
    module: nn.Linear,
    weight: Callable[[torch.Tensor], fx.Node],
    prepack: bool,
) -> tuple[fx.Node, str]:
    """A linear map as a function of its weights."""
    x, *_ = node.all_input_nodes
    run = packed_linear if prepack and packs(x.meta["val"], module.weight) else F.linear
    given = (weight(module.weight), weight(module.bias) if module.bias is not None else None)
    made = graph.call_function(run, (copies[x], *given))
    made.meta |= node.meta
    return made, f"{run} {named!r} {[n.name for n in given if n is not None]}"


def _columns(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The weight of which a linear map takes some columns, and where these begin and end."""
    part = node.args[1] if node.target is F.linear and len(node.args) == 3 else None
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    whole, index = part.args
    if not isinstance(whole, fx.Node) or whole.op != "get_attr" or not isinstance(index, tuple) or len(index) != 2:
        return None
    rows, columns = index
    if rows != slice(None) or not isinstance(columns, slice) or columns.step is not None:
        return None
    return whole, int(columns.start), int(columns.stop)


class _Name(str):
    """A node's number in a line, without quotation marks."""

    __slots__ = ()
    __repr__ = str.__str__


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    kept = f" {id(target)}" if not hasattr(target, "__qualname__") and not isinstance(target, torch._ops.OpOverload) else ""
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}{kept}"


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # Asked first: of fake tensors the operation takes its time.
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _facts(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"


def attribute(gm: fx.GraphModule, path: str) -> torch.Tensor:
    """The tensor that a `get_attr` node of this path stands for."""
    found: torch.Tensor = operator.attrgetter(path)(gm)
    return found


def _without_weights(module: nn.Module) -> nn.Module:
    """A module of the same make whose weights have no memory."""
    memo = {id(t): torch.empty_like(t, device="meta") for t in (*module.parameters(), *module.buffers())}
    made: nn.Module = copy.deepcopy(module, memo)
    return made
