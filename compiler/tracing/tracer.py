"""The tracer: what happens while a model's forward runs on traced tensors. `trace` is how it is used."""

import operator
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from stepgraph.compiler.tracing.fake_values import FakeValues
from stepgraph.compiler.tracing.known_results import leaf_operation
from stepgraph.compiler.tracing.model_location import model_frame, model_location
from stepgraph.compiler.tracing.record_facts import Reads
from stepgraph.compiler.tracing.run_opaque import opaque_modules, run_opaque
from stepgraph.compiler.tracing.spell_calls import ARGUMENTS, mapped, plain, spelled
from stepgraph.compiler.tracing.strengths import STRENGTH, WHOLES, StrengthValue, factors
from stepgraph.compiler.tracing.traced_tensor import TracedTensor, storage_key
from stepgraph.errors import TraceError
from stepgraph.node_facts import MACS, MUTATES, output_of
from stepgraph.runtime.program.facts import NOTHING, forward_of
from stepgraph.weight_kinds import kind_of, own_kinds

DATA = vars(torch._C.TensorBase)["data"]
NO_PAST = "a later call would depend on an earlier one, which a static graph cannot carry"


class KeptStateError(TraceError):
    """The forward keeps something for its next call: a past of its own, or a table that its first call makes."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of an inlined or leaf module.

    Attributes:
        inputs: Nodes of the tensor arguments, in call order.
        outputs: Nodes of the returned tensors.
        before: The last node recorded before the call.
        last: The last node recorded within it.
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    before: fx.Node
    last: fx.Node


@dataclass
class Tracer(TorchFunctionMode):
    """Records one run of a model's forward. Use `trace`.

    Attributes:
        earlier: An earlier trace of the same forward, to see whether this one does the same: as long as it does, its values are
            taken from there, and only what is new runs.
        reads: Takes down what the forward reads.
    """

    model: nn.Module
    mode: FakeTensorMode
    device: torch.device
    earlier: fx.Graph | None = None
    reads: Reads | None = None
    graph: fx.Graph = field(default_factory=fx.Graph)
    calls: dict[tuple[str, int], ModuleCall] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in self.model.named_modules()}
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.attributes = {id(tensor): name for name, tensor in tensors}
        self.opaque = opaque_modules(self.model, is_leaf)
        # Weights that are no plain tensors; the forward sees them as they are, and can ask for shapes and dtypes.
        self.kinds = {id(tensor): name for name, tensor in own_kinds(self.model).items()}
        self.attribute_nodes: dict[str, TracedTensor] = {}
        self.stack: dict[str, tuple[str, type]] = {}
        self.values = FakeValues(self.mode, self.device, self.refuse_parameter_write)
        # Every traced tensor that was made, to see afterwards which of them something outside still holds.
        self.references: list[weakref.ref[TracedTensor]] = []
        self.devices = {"cpu", self.device.type}
        self.call_counts: Counter[str] = Counter()
        # The first error of an operation, which the forward may catch.
        self.raised: RuntimeError | None = None
        # A tensor that is written to in place can change its shape too, so that its value is not yet what it is at the end.
        nodes = list(self.earlier.nodes) if self.earlier is not None else []
        self.expected = nodes if not any(node.meta.get(MUTATES) for node in nodes) else []

    # -- what the forward does ---------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function, tensor method and tensor property that runs during the trace."""
        if self.values.passing:
            return func(*args, **(kwargs or {}))
        try:
            return self.call_torch(func, args, kwargs or {})
        except RuntimeError as error:
            self.raised = self.raised or error
            raise

    def refuse_caught(self) -> None:
        """An error that the forward caught: on real values it may not be raised, and the graph would be that of the fallback.

        Raises:
            TraceError: There was one; a refusal of ours as it was raised.
        """
        if isinstance(self.raised, TraceError):
            raise self.raised
        if self.raised is not None:
            raise TraceError(
                f"the forward catches an error of an operation ({type(self.raised).__name__}: {self.raised}), which may not be "
                f"raised on real values; ask for what the operation needs instead of trying it"
            ) from self.raised

    def call_torch(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation on fake values; record it unless what it returns is plain Python, such as a shape."""
        name = getattr(func, "__name__", "")
        if name == "data_ptr":
            raise TraceError(f"{model_location()}: {name}() is another number in every run, and has no place in a static graph")
        if name == "__set__" and getattr(func, "__self__", None) is DATA:
            raise TraceError(
                f"{model_location()}: assigning to a tensor's .data cannot be part of a static graph; write x = ..."
            )
        if any(type(leaf) is StrengthValue for leaf in (*args, *kwargs.values())):
            product = factors(func, args, kwargs)
            if product is not None:
                return self.scaled(*product)
            args, kwargs = mapped(plain, tuple(args), kwargs)
        if self.kinds:
            asked = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self.kinds]
            if asked:
                return self.ask(func, args, kwargs, asked[0])
        op, target, arguments = spelled(func, args)
        known = self.known(op, target, arguments, kwargs)
        if known is not None:
            return self.record(op, target, arguments, kwargs, *earlier_of(known))
        value, mutates, macs = self.values.run(func, args, kwargs, func)
        if not mutates and not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            return value
        return self.record(op, target, arguments, kwargs, value, mutates, macs)

    def scaled(self, tensor: torch.Tensor, strength: StrengthValue) -> Any:
        """The product of a tensor and a strength, which the graph reads of a constant; rounded once, as with a number."""
        device = tensor.device if tensor.device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
        constant = strength.owner.constant(strength, device, tensor.dtype)
        if id(constant) not in self.attributes:
            name = self.attributes[id(constant)] = f"{STRENGTH}{len(strength.owner.constants) - 1}"
            self.constants[name] = constant
        factor = self.get_attribute(constant)
        if tensor.dtype in WHOLES:
            return self.call_torch(torch.Tensor.mul, (tensor, factor), {})
        product = self.call_torch(torch.Tensor.mul, (self.call_torch(torch.Tensor.float, (tensor,), {}), factor), {})
        return self.call_torch(torch.Tensor.to, (product, tensor.dtype), {})

    def known(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node | None:
        """The node of the earlier trace at this place, where it did the same on the same values."""
        place = len(self.graph.nodes)
        if place >= len(self.expected):
            return None
        node = self.expected[place]
        if node.op != op or node.target != target:
            return None

        def named(leaf: Any) -> Any:
            return leaf.node.name if isinstance(leaf, TracedTensor) else leaf

        wanted = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.name)
        return node if repr(mapped(named, tuple(args), kwargs)) == repr((tuple(wanted[0]), dict(wanted[1]))) else None

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Inline a module, or record it as one node where it is one of torch.nn's own."""
        path = self.paths.get(id(module))
        if self.values.passing or path is None:
            return original(module, *args, **kwargs)
        call_index = self.call_counts[path]
        self.call_counts[path] += 1
        # The slot is taken before the call, so that calls are numbered in the order in which they start.
        before = self.last_node()
        self.calls[path, call_index] = ModuleCall((), (), before, before)
        key = f"{path}@{call_index}" if call_index else path
        self.stack[key] = (path, type(module))
        try:
            opaque = id(module) in self.opaque
            if opaque or is_leaf(module):
                known = self.known("call_module", path, args, kwargs)
                run = self.run_opaque if opaque else self.run_leaf
                value, mutates, macs = run(module, path, args, kwargs) if known is None else earlier_of(known)
                output = self.record("call_module", path, args, kwargs, value, mutates, macs)
            else:
                output = original(module, *args, **kwargs)
        finally:
            del self.stack[key]
        self.calls[path, call_index] = ModuleCall(_nodes((args, kwargs)), _nodes(output), before, self.last_node())
        return output

    def ask(self, func: Callable[..., Any], args: Any, kwargs: Any, weight: torch.Tensor) -> Any:
        """What the forward asks of a weight that is no plain tensor, such as its dtype; its numbers are its module's affair."""
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, TracedTensor) for leaf in leaves):
            with self.values.pass_through(), _disable_current_modes():
                answer = func(*args, **kwargs)
            if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(answer)):
                return answer
        raise TraceError(
            f"{model_location()}: the forward computes with {self.kinds[id(weight)]!r} itself, a {kind_of(weight)}; only a "
            f"module without children that holds such a weight can be called with it; call that, or leave the weight plain"
        )

    def run_opaque(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, frozenset[int], int]:
        """As `run`, of a module whose weights mean what their own classes make of them: it is called once as it is."""

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, TracedTensor):
                return leaf
            return torch.zeros(leaf.value.shape, dtype=leaf.value.dtype, device=leaf.value.device)

        with self.values.pass_through(), _disable_current_modes():
            args, kwargs = mapped(like, args, kwargs)
            output, macs = run_opaque(module, path, args, kwargs)
        with self.values.pass_through():
            return pytree.tree_map_only(torch.Tensor, self.values.mode.from_tensor, output), frozenset(), macs

    def run_leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, frozenset[int], int]:
        """As `run`, of one of torch.nn's own modules, on fake parameters."""
        twin = self.values.twin(module)
        before = {**vars(twin)}
        if self.reads is not None:
            self.reads.note_leaf(module)
        weights = [*twin._parameters.items(), *twin._buffers.items()]
        outcome = self.values.run(twin, args, kwargs, self.values.results.key(leaf_operation(module), weights, {}))
        changed = [name for name, part in vars(twin).items() if before.get(name, self) is not part]
        if changed:
            raise TraceError(f"{model_location()}: calling {path} changes its own {changed[0]!r}; {NO_PAST}")
        return outcome

    def last_node(self) -> fx.Node:
        """The node recorded last."""
        last: fx.Node = output_of(self.graph)
        return last

    def get_attribute(self, value: Any) -> Any:
        """What an attribute read of a module gives during the trace: parameters and buffers become graph nodes."""
        name = self.attributes.get(id(value)) if not self.values.passing and isinstance(value, torch.Tensor) else None
        if name is None or id(value) in self.kinds:
            return value
        if name not in self.attribute_nodes:
            known = self.known("get_attr", name, (), {})
            fake = self.values.of(value) if known is None else known.meta["val"]
            self.attribute_nodes[name] = self.record("get_attr", name, (), {}, fake)
        return self.attribute_nodes[name]

    # -- recording ---------------------------------------------------------------------------------------------------

    def refuse_parameter_write(self, written: torch.Tensor) -> None:
        """An operation in place on a parameter or buffer would make a later call depend on an earlier one."""
        key = storage_key(written)
        if any(key == storage_key(node.meta["val"]) for node in self.graph.nodes if node.op == "placeholder"):
            return
        hollow = [t for t in [*self.model.parameters(), *self.model.buffers()] if isinstance(t, FakeTensor)]
        for owner in [*self.values.kept_alive, *hollow]:
            if storage_key(self.values.of(owner)) == key:
                name = self.attributes.get(id(owner))
                what = f"the model's own {name!r}" if name else "a tensor that it holds"
                raise TraceError(f"{model_location()}: the forward writes to {what}; {NO_PAST}")

    def record(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        value: Any,
        mutates: frozenset[int] = frozenset(),
        macs: int = 0,
    ) -> Any:
        """Append a node; returns the traced tensor for its value, or the like of it for a tuple of tensors."""
        args, kwargs = mapped(self.argument, args, kwargs)
        if any(torch.is_autocast_enabled(device) for device in self.devices):
            raise TraceError(
                f"{model_location()}: the forward switches autocast on, which a static graph cannot carry; convert the model "
                f"or these tensors to the lower precision instead"
            )
        node = self.graph.create_node(op, target)
        # Given to `create_node`, they would be searched for symbols (`copy_graph`).
        node.args, node.kwargs = tuple(args), kwargs
        node.meta |= {"nn_module_stack": dict(self.stack), MUTATES: mutates, MACS: macs}
        place = model_frame() if op.startswith("call") else None
        if self.reads is not None and place is not None:
            self.reads.note_frames()
        if place is not None:
            # In the form that fx reads to print the model's source line over the nodes that come from it.
            node.stack_trace = f'  File "{place[0]}", line {place[1]}, in {place[2]}\n    {place[3]}'
        return self.wrap(value, node)

    def argument(self, leaf: Any) -> Any:
        """What stands for a value among a node's arguments."""
        if isinstance(leaf, torch.Tensor):
            return self.node_of(leaf)
        if type(leaf) is StrengthValue:
            return leaf.decay()
        # Generated code spells numbers out, and numpy's spell themselves with a name that is not known there.
        if isinstance(leaf, np.generic):
            return leaf.item()
        if not isinstance(leaf, ARGUMENTS):
            raise TraceError(f"{model_location()}: a {type(leaf).__name__} cannot be an argument in a static graph")
        return leaf

    def wrap(self, value: Any, node: fx.Node) -> Any:
        """The traced counterpart of a node's value; tuples and lists are taken apart at once."""
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            traced = TracedTensor(value, node)  # type: ignore[arg-type]
            self.references.append(weakref.ref(traced))
            return traced
        if isinstance(value, (tuple, list)):
            parts = [self.record("call_function", operator.getitem, (node, i), {}, v) for i, v in enumerate(value)]
            return type(value)(parts)
        if isinstance(value, dict):
            return {k: self.record("call_function", operator.getitem, (node, k), {}, v) for k, v in value.items()}
        return value

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node of a traced tensor; a plain tensor becomes a constant of the graph."""
        if isinstance(tensor, TracedTensor):
            return tensor.node
        name = self.attributes.get(id(tensor))
        if name is None:
            if isinstance(tensor, FakeTensor) or tensor.is_meta:
                raise TraceError(
                    f"{model_location()}: a tensor without data that is neither a parameter nor a registered buffer "
                    f"is used here; trace the model with its weights, or register the tensor as a buffer"
                )
            self.values.kept_alive.append(tensor)
            name = self.attributes[id(tensor)] = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        traced: TracedTensor = self.get_attribute(tensor)
        return traced.node


def earlier_of(node: fx.Node) -> tuple[Any, frozenset[int], int]:
    """Value, written storages and multiply-accumulates of a node of an earlier trace."""
    return node.meta["val"], node.meta[MUTATES], node.meta[MACS]


def is_leaf(module: nn.Module) -> bool:
    """Modules of torch.nn itself are leaves, but for containers, whose children are visited, and replaced forwards."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.modules")
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and str(getattr(kind.forward, "__globals__", {}).get("__name__")).startswith("torch.")
        and forward_of(module) is NOTHING
    )


def _nodes(values: Any) -> tuple[fx.Node, ...]:
    return tuple(leaf.node for leaf in pytree.tree_leaves(values) if isinstance(leaf, TracedTensor))
