"""A trace by its modules: what each of them computes, from what, and whether that depends on the latents."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx, nn

from stepgraph.compiler.marking.graphs import storages_of
from stepgraph.compiler.tracing.trace import Trace
from stepgraph.compiler.tracing.tracer import ModuleCall, is_leaf
from stepgraph.inputs import is_of_latents
from stepgraph.node_facts import MACS, MUTATES

KEYED = frozenset(("scaled_dot_product_attention", "flex_attention"))
PRODUCTS = frozenset(("matmul", "bmm", "einsum", "baddbmm", "__matmul__", "__rmatmul__"))


class TracedModules:
    """The modules of a traced model.

    Attributes:
        trace: Their trace.
        moving: The nodes that depend on the latents, the model's first input.
        inside: The nodes of every module, of all its calls, in graph order.
        products: The nodes that multiply what is made of inputs with each other: attention.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self._model = trace, model
        names = tuple(trace.inputs)
        placeholders = [node for node in trace.graph.nodes if node.op == "placeholder"]
        self.moving = _reached(trace.graph, {node for node in placeholders if is_of_latents(str(node.target), names)})
        given = _reached(trace.graph, set(placeholders))
        self.inside: dict[str, list[fx.Node]] = defaultdict(list)
        self.products: set[fx.Node] = set()
        for node in trace.graph.nodes:
            for path in dict.fromkeys(path for path, _ in node.meta.get("nn_module_stack", {}).values()):
                self.inside[path].append(node)
            if node in self.moving and is_product(node) and all(n in given for n in tensors_read(node)):
                self.products.add(node)

    def module(self, path: str) -> nn.Module:
        """The module of a path."""
        return self._model.get_submodule(path)

    def call(self, path: str, call_index: int = 0) -> ModuleCall:
        """One call of a module."""
        return self.trace.calls[path, call_index]

    def calls(self, path: str) -> int:
        """How often a module was called."""
        return sum(1 for known, _ in self.trace.calls if known == path)

    def macs(self, path: str) -> int:
        """Multiply-accumulates of all calls of a module."""
        return sum(node.meta.get(MACS, 0) for node in self.inside[path])

    def children(self, path: str) -> Iterator[str]:
        """The nearest modules below a module that were called; containers that are only looped over are passed through."""
        for name, _ in self.module(path).named_children():
            child = f"{path}.{name}" if path else name
            if (child, 0) in self.trace.calls:
                yield child
            else:
                yield from self.children(child)

    def is_leaf(self, path: str) -> bool:
        """Whether a module is one node of the graph."""
        return is_leaf(self.module(path))

    def moving_maps(self, path: str) -> list[fx.Node]:
        """The linear maps and convolutions below a module that work on what depends on the latents."""
        return [node for node in self.inside[path] if self.is_map(node)]

    def is_map(self, node: fx.Node) -> bool:
        """Whether a node multiplies what depends on the latents with weights."""
        return bool(node.meta.get(MACS)) and node in self.moving and node not in self.products

    def attends(self, path: str, call_index: int | None = None) -> list[fx.Node]:
        """The products of tokens with tokens below a module; of one of its calls, if asked."""
        products = [node for node in self.inside[path] if node in self.products]
        key = f"{path}@{call_index}" if call_index else path
        return [node for node in products if call_index is None or key in node.meta["nn_module_stack"]]


def is_product(node: fx.Node) -> bool:
    """Whether a node is an attention, or a product of tensors as attentions consist of."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op != "call_module" and name in KEYED | PRODUCTS


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """The tensors that a product multiplies: of an attention, the queries, keys and values."""
    named = [node.kwargs[name] for name in ("query", "key", "value") if name in node.kwargs]
    flat = [part for arg in (*node.args, *named) for part in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    return [part for part in flat if isinstance(part, fx.Node)][:3]


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    value: torch.Tensor = node.meta["val"]
    return tuple(value.shape)


def _reached(graph: fx.Graph, roots: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on some, through memory that is written to in place too."""
    reached, written = set(roots), set[int]()
    for node in graph.nodes:
        if node in reached or any(n in reached for n in node.all_input_nodes) or (written and storages_of(node) & written):
            reached.add(node)
            written |= node.meta.get(MUTATES, frozenset())
    return reached
