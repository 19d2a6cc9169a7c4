"""Lift a piece of a variant into a region: a graph of its own that equal pieces share, so that it is compiled once.

A piece's weights are inputs of its region, so that blocks of one make share it; what a piece hands on is not part of what a
region is: it writes whatever one of its pieces needs (docs/design.md, decision 4).
"""

import copy
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from stepgraph.compiler.lowering.cut import Piece
from stepgraph.ops import INTO
from stepgraph.runtime.program.copy_graph import copy_node, copy_nodes
from stepgraph.runtime.program.packed_linear import packed_columns, packed_linear, packs
from stepgraph.weight_kinds import own_kinds


@dataclass(frozen=True)
class LiftedModule:
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


@dataclass(frozen=True)
class OpaqueModule:
    """A module with its weights, which are no plain tensors: it is called as it is.

    Attributes:
        module: The model's own.
    """

    module: nn.Module

    @property
    def __name__(self) -> str:
        """What torch.fx writes into a graph's source."""
        return type(self.module).__name__

    def __repr__(self) -> str:
        """No other module is the same."""
        return f"{type(self.module).__qualname__} {id(self.module)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        return self.module(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Region:
    """What equal pieces have in common.

    Attributes:
        key: What tells it from others: equal for equal pieces.
        graph: (*inputs, *weights) -> nothing yet; `writing` adds the memory that its results are written to.
        inputs: Examples of its inputs.
        weights: Those of the piece that it was lifted from.
        nodes: Its nodes, in the order of the piece's.
    """

    key: str
    graph: fx.Graph
    inputs: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    nodes: tuple[fx.Node, ...]

    def writing(self, returned: Collection[int]) -> fx.GraphModule:
        """A copy of the graph that writes some values: (*inputs, *weights, *memory for its results) -> nothing.

        Args:
            returned: Numbers of the nodes that have these values; the memory is in their order.
        """
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        copy_nodes(self.graph, graph, copies)
        values = [copies[self.nodes[index]] for index in sorted(returned)]
        _fuse_activations(graph, values)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(placeholders[-1] if placeholders else graph._root):
            # Each goes behind the same node, so the last comes first.
            targets = [graph.placeholder(f"out{i}") for i in reversed(range(len(values)))][::-1]
        for target, value in zip(targets, values, strict=True):
            target.meta |= {"val": value.meta["val"].contiguous()}
            if value.target in INTO:
                with graph.inserting_before(value):
                    graph.call_function(INTO[value.target], value.args, {**value.kwargs, "out": target})
                value.replace_all_uses_with(target)
                graph.erase_node(value)
            else:
                graph.call_method("copy_", (target, value))
        graph.output(())
        return fx.GraphModule({}, graph, class_name="Region")


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
    target = node.target.module if isinstance(node.target, LiftedModule) else node.target
    if target is F.gelu:
        approximate = node.kwargs.get("approximate", "none")
    elif isinstance(target, nn.GELU):
        approximate = target.approximate
    else:
        return "silu" if target is F.silu or isinstance(target, nn.SiLU) else ""
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def lift_region(gm: fx.GraphModule, piece: Piece, prepack: bool) -> Region:
    """A piece as a region of its own; the variant is only read.

    Args:
        gm: The variant.
        piece: Of it.
        prepack: Let linear maps take packed weights where oneDNN has them.
    """
    region = _UnfinishedRegion(gm, piece.inputs, prepack)
    for node in piece.nodes:
        region.add(node)
    region.graph.lint()
    weights = tuple(tensor for tensor, _ in region.weights.values())
    key = "\n".join([*region.lines, *map(_facts, weights)])
    return Region(key, region.graph, tuple(n.meta["val"] for n in piece.inputs), weights, tuple(region.nodes))


class _UnfinishedRegion:
    """A region that nodes of a variant are copied into, one after the other.

    Attributes:
        graph: What it is so far.
        weights: By id, the weights that its nodes read, and their placeholders.
        nodes: The copies.
        lines: What is told of inputs and nodes: equal for equal pieces.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[fx.Node], prepack: bool) -> None:
        self.graph, self.nodes = fx.Graph(), list[fx.Node]()
        self.weights: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self._gm, self._prepack = gm, prepack
        self._copies: dict[fx.Node, fx.Node] = {}
        self._names: dict[fx.Node, str] = {}
        # Weights go behind it.
        self._last_placeholder = self.graph._root
        for position, node in enumerate(inputs):
            placeholder = self.graph.placeholder(f"x{position}")
            placeholder.meta |= {"val": node.meta["val"]}
            self._copies[node], self._names[node], self._last_placeholder = placeholder, f"x{position}", placeholder
        # What pieces hand on is contiguous.
        self.lines = [_facts(_contiguous(node.meta["val"])) for node in inputs]

    def add(self, node: fx.Node) -> None:
        """Copy a node of the variant, whose sources are there."""
        for source in node.all_input_nodes:
            if source not in self._copies:
                self._copies[source] = self._weight(tensor_at(self._gm, str(source.target)))
                self._names[source] = str(self._copies[source].name)
        added, line = self._added(node)
        self._copies[node], self._names[node] = added, f"n{len(self.nodes)}"
        self.lines.append(line)
        self.nodes.append(added)

    def _weight(self, tensor: torch.Tensor) -> fx.Node:
        """The placeholder of a weight."""
        if id(tensor) not in self.weights:
            with self.graph.inserting_after(self._last_placeholder):
                self._last_placeholder = self.graph.placeholder(f"w{len(self.weights)}")
            self.weights[id(tensor)] = tensor, self._last_placeholder
        return self.weights[id(tensor)][1]

    def _added(self, node: fx.Node) -> tuple[fx.Node, str]:
        """A node's copy, and a line that says what it does."""
        named = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(self._names[n]))
        columns = _columns(node) if self._prepack else None
        if columns is not None and packs(node.args[0].meta["val"], tensor_at(self._gm, str(columns[0].target))):  # type: ignore[union-attr]
            stacked, *ends = columns
            x, _, bias = self._arguments(node)
            return self._call(packed_columns, (x, self._copies[stacked], bias, *ends), node), f"{packed_columns} {named!r}"
        if node.op != "call_module":
            return copy_node(node, self.graph, self._copies), f"{node.op} {_target(node)} {named!r}"
        module = self._gm.get_submodule(str(node.target))
        if own_kinds(module):
            opaque = OpaqueModule(module)
            call = self.graph.call_function(opaque, *fx.node.map_arg((node.args, node.kwargs), lambda n: self._copies[n]))
            call.meta |= node.meta
            return call, f"call_module {opaque!r} {named!r}"
        if isinstance(module, nn.Linear):
            return self._linear(node, module, named)
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        weights = [self._weight(tensor) for tensor in tensors.values()]
        template = LiftedModule(_without_weights(module), tuple(tensors), len(node.args))
        call = self._call(template, (*self._arguments(node), *weights), node)
        return call, f"call_module {template!r} {named!r} {[n.name for n in weights]}"

    def _linear(self, node: fx.Node, module: nn.Linear, named: Any) -> tuple[fx.Node, str]:
        """A linear map as a function of its weights."""
        x, *_ = node.all_input_nodes
        run = packed_linear if self._prepack and packs(x.meta["val"], module.weight) else F.linear
        weights = (self._weight(module.weight), self._weight(module.bias) if module.bias is not None else None)
        call = self._call(run, (self._copies[x], *weights), node)
        return call, f"{run} {named!r} {[n.name for n in weights if n is not None]}"

    def _arguments(self, node: fx.Node) -> list[Any]:
        return [self._copies.get(argument) if isinstance(argument, fx.Node) else argument for argument in node.args]

    def _call(self, run: Any, arguments: tuple[Any, ...], original: fx.Node) -> fx.Node:
        call = self.graph.call_function(run, arguments)
        call.meta |= original.meta
        return call


def _columns(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The weight of which a linear map takes some columns, and where these begin and end."""
    part = node.args[1] if node.target is F.linear and len(node.args) == 3 else None
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    stacked, index = part.args
    if not isinstance(stacked, fx.Node) or stacked.op != "get_attr" or not isinstance(index, tuple) or len(index) != 2:
        return None
    rows, columns = index
    if rows != slice(None) or not isinstance(columns, slice) or columns.step is not None:
        return None
    return stacked, int(columns.start), int(columns.stop)


class _Name(str):
    """A node's number in a line, without quotation marks."""

    __slots__ = ()
    __repr__ = str.__str__


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    unnamed = not hasattr(target, "__qualname__") and not isinstance(target, torch._ops.OpOverload)
    identity = f" {id(target)}" if unnamed else ""
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}{identity}"


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # Asked first: of fake tensors the operation takes its time.
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _facts(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"


def tensor_at(gm: fx.GraphModule, path: str) -> torch.Tensor:
    """The tensor that a `get_attr` node of this path stands for."""
    tensor: torch.Tensor = operator.attrgetter(path)(gm)
    return tensor


def _without_weights(module: nn.Module) -> nn.Module:
    """A module of the same make whose weights have no memory."""
    memo = {id(t): torch.empty_like(t, device="meta") for t in (*module.parameters(), *module.buffers())}
    weightless: nn.Module = copy.deepcopy(module, memo)
    return weightless
