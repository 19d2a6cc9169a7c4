"""The tracer: what happens while a model's forward runs on traced tensors. `trace` is how it is used."""

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stepgraph.compiler.tracing.known_results import KnownResults, leaf_operation
from stepgraph.compiler.tracing.model_location import model_frame, model_location
from stepgraph.compiler.tracing.record_facts import Reads
from stepgraph.compiler.tracing.run_opaque import opaque_modules, run_opaque
from stepgraph.compiler.tracing.spell_calls import ARGUMENTS, mapped, plain, spelled
from stepgraph.compiler.tracing.strengths import STRENGTH, WHOLES, StrengthValue, factors
from stepgraph.errors import TraceError
from stepgraph.node_facts import MACS, MUTATES, output_of
from stepgraph.runtime.program.facts import NOTHING, forward_of
from stepgraph.weight_kinds import is_plain, kind_of, own_kinds

DATA = vars(torch._C.TensorBase)["data"]
NO_PAST = "a later call would depend on an earlier one, which a static graph cannot carry"


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


class TracedTensor(torch.Tensor):
    """Stands for a tensor during tracing: `value` is its fake tensor, `node` the graph node that makes it."""

    value: FakeTensor
    node: fx.Node

    @staticmethod
    def __new__(cls: type["TracedTensor"], value: FakeTensor, node: fx.Node) -> "TracedTensor":
        """A wrapper of the value's shape, strides, dtype and device, without storage."""
        traced: TracedTensor = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=value.device,
        )  # fmt: skip
        traced.value, traced.node = value, node
        return traced

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function here and calls a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reached only by code that goes around torch's function protocol."""
        raise TraceError(f"{func} was called on a traced tensor past torch's function protocol, at {model_location()}")


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
        self.fakes: dict[int, FakeTensor] = {}
        self.kept_alive: list[torch.Tensor] = []
        self.stack: dict[str, tuple[str, type]] = {}
        self.inside = False
        # Every traced tensor that was made, to see afterwards which of them something outside still holds.
        self.made: list[weakref.ref[TracedTensor]] = []
        self.devices = {"cpu", self.device.type}
        # Attention on the CPU is one operator that torch's counter does not know by this name.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.flops = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
        self.call_counts: Counter[str] = Counter()
        self.results = KnownResults(self.hollow)
        # A tensor that is written to in place can change its shape too, so that its value is not yet what it is at the end.
        nodes = list(self.earlier.nodes) if self.earlier is not None else []
        self.expected = nodes if not any(node.meta.get(MUTATES) for node in nodes) else []

    # -- what the forward does ---------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function, tensor method and tensor property that runs during the trace."""
        return func(*args, **(kwargs or {})) if self.inside else self.call_torch(func, args, kwargs or {})

    def call_torch(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation on fake values; record it unless what it returns is plain Python, such as a shape."""
        if getattr(func, "__name__", "") == "__set__" and getattr(func, "__self__", None) is DATA:
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
        value, mutates, macs = self.run(func, args, kwargs, func)
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
        if self.inside or path is None:
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
                result = self.record("call_module", path, args, kwargs, value, mutates, macs)
            else:
                result = original(module, *args, **kwargs)
        finally:
            del self.stack[key]
        self.calls[path, call_index] = ModuleCall(_nodes((args, kwargs)), _nodes(result), before, self.last_node())
        return result

    def ask(self, func: Callable[..., Any], args: Any, kwargs: Any, weight: torch.Tensor) -> Any:
        """What the forward asks of a weight that is no plain tensor, such as its dtype; its numbers are its module's affair."""
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, TracedTensor) for leaf in leaves):
            with self.pass_through(), _disable_current_modes():
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

        with self.pass_through(), _disable_current_modes():
            args, kwargs = mapped(like, args, kwargs)
            result, macs = run_opaque(module, path, args, kwargs)
        with self.pass_through():
            return pytree.tree_map_only(torch.Tensor, self.mode.from_tensor, result), frozenset(), macs

    def run_leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, frozenset[int], int]:
        """As `run`, of one of torch.nn's own modules, on fake parameters."""
        twin = self.twin(module)
        before = {**vars(twin)}
        if self.reads is not None:
            self.reads.note_leaf(module)
        weights = [*twin._parameters.items(), *twin._buffers.items()]
        result = self.run(twin, args, kwargs, self.results.key(leaf_operation(module), weights, {}))
        changed = [name for name, part in vars(twin).items() if before.get(name, self) is not part]
        if changed:
            raise TraceError(f"{model_location()}: calling {path} changes its own {changed[0]!r}; {NO_PAST}")
        return result

    def last_node(self) -> fx.Node:
        """The node recorded last."""
        last: fx.Node = output_of(self.graph)
        return last

    def twin(self, module: nn.Module) -> nn.Module:
        """The module with fake parameters; the module itself may be running in another thread."""
        twin = object.__new__(type(module))
        tensors = {
            kind: {name: None if t is None else self.fake(t) for name, t in getattr(module, kind).items()}
            for kind in ("_parameters", "_buffers")
        }
        children = {name: None if child is None else self.twin(child) for name, child in module._modules.items()}
        twin.__dict__ = {**vars(module), **tensors, "_modules": children}
        return twin

    def get_attribute(self, value: Any) -> Any:
        """What an attribute read of a module gives during the trace: parameters and buffers become graph nodes."""
        name = self.attributes.get(id(value)) if not self.inside and isinstance(value, torch.Tensor) else None
        if name is None or id(value) in self.kinds:
            return value
        if name not in self.attribute_nodes:
            known = self.known("get_attr", name, (), {})
            fake = self.fake(value) if known is None else known.meta["val"]
            self.attribute_nodes[name] = self.record("get_attr", name, (), {}, fake)
        return self.attribute_nodes[name]

    # -- recording ---------------------------------------------------------------------------------------------------

    def run(
        self, func: Callable[..., Any], args: Any, kwargs: Any, operation: Hashable | None = None
    ) -> tuple[Any, frozenset[int], int]:
        """The operation's result on fake values, the storages it wrote to, and its multiply-accumulates.

        What is called `operation`, if anything, is run once for arguments of the same kinds.
        """
        tensors: list[FakeTensor] = []

        def faked(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return plain(leaf)
            tensors.append(self.fake(leaf))
            return tensors[-1]

        args, kwargs = mapped(faked, args, kwargs)
        key = self.results.key(operation, args, kwargs)
        with self.pass_through():
            known = self.results.find(key)
        if known is not None:
            return known
        versions, flops = [t._version for t in tensors], self.total_flops
        try:
            with self.pass_through():
                value = func(*args, **kwargs)
        except TraceError:
            raise
        except RuntimeError as error:
            name = getattr(func, "__name__", type(func).__name__)
            if not isinstance(error, FAKE_ERRORS) and "tensor subclasses" not in str(error):
                raise
            raise TraceError(
                f"{model_location()}: {name.strip('_')}() needs the tensor's values, so the result depends on data and "
                f"cannot be part of a static graph; compute it from shapes, or outside the model's forward"
            ) from error
        with self.pass_through():
            written = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        for tensor in written:
            self.refuse_parameter_write(tensor)
        result = value, frozenset(map(storage_key, written)), (self.total_flops - flops) // 2
        self.results.keep(key, result, tensors)
        return result

    @property
    def total_flops(self) -> int:
        """What has been counted so far: two for every multiply-accumulate."""
        return int(self.flops.get_total_flops())

    def refuse_parameter_write(self, written: torch.Tensor) -> None:
        """An operation in place on a parameter or buffer would make a later call depend on an earlier one."""
        key = storage_key(written)
        if any(key == storage_key(node.meta["val"]) for node in self.graph.nodes if node.op == "placeholder"):
            return
        hollow = [t for t in [*self.model.parameters(), *self.model.buffers()] if isinstance(t, FakeTensor)]
        for owner in [*self.kept_alive, *hollow]:
            if storage_key(self.fake(owner)) == key:
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
        node = self.graph.create_node(op, target, tuple(args), kwargs)
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
            self.made.append(weakref.ref(traced))
            return traced
        if isinstance(value, (tuple, list)):
            parts = [self.record("call_function", operator.getitem, (node, i), {}, v) for i, v in enumerate(value)]
            return type(value)(parts)
        if isinstance(value, dict):
            return {k: self.record("call_function", operator.getitem, (node, k), {}, v) for k, v in value.items()}
        return value

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """The fake value of any tensor that turns up during the trace."""
        if isinstance(tensor, TracedTensor):
            return tensor.value
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode and not tensor.requires_grad:
            return tensor
        if id(tensor) not in self.fakes:
            self.kept_alive.append(tensor)
            if not is_plain(tensor):
                raise TraceError(
                    f"{model_location()}: a {kind_of(tensor)} is used here, which is neither a plain tensor nor a weight of "
                    f"the model; convert it with .as_subclass(torch.Tensor), or register it in the module that uses it"
                )
            with self.pass_through():
                # Meta tensors stand for ones on the device; inference tensors have no version counter, their fakes need one.
                hollow = tensor.device.type == "meta" or tensor.is_inference()
                self.fakes[id(tensor)] = self.hollow(tensor) if hollow else self.mode.from_tensor(_without_grad(tensor))
        return self.fakes[id(tensor)]

    def hollow(self, tensor: torch.Tensor) -> FakeTensor:
        """A fake tensor with the layout of another, which is not looked at any further."""
        device = self.device if tensor.device.type == "meta" else tensor.device
        # There is nothing to count or to fake in making one, which the modes would look at twice.
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
            return FakeTensor(self.mode, meta, device)

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """Within it, operations run as they are and are not recorded."""
        previous, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = previous

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
            self.kept_alive.append(tensor)
            name = self.attributes[id(tensor)] = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        traced: TracedTensor = self.get_attribute(tensor)
        return traced.node


FAKE_ERRORS = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


def _without_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; views that a forward takes of parameters would ask for a gradient function."""
    if not tensor.requires_grad:
        return tensor
    with _disable_current_modes():
        return tensor.detach()


def earlier_of(node: fx.Node) -> tuple[Any, frozenset[int], int]:
    """Value, written storages and multiply-accumulates of a node of an earlier trace."""
    return node.meta["val"], node.meta[MUTATES], node.meta[MACS]


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for all views of one (fake) storage, while one of them lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def is_leaf(module: nn.Module) -> bool:
    """Modules of torch.nn itself are leaves, but for containers, whose children are visited, and replaced forwards."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.modules")
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and str(getattr(kind.forward, "__globals__", {}).get("__name__")).startswith("torch.")
        and forward_of(module) is NOTHING
    )


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _nodes(values: Any) -> tuple[fx.Node, ...]:
    return tuple(leaf.node for leaf in pytree.tree_leaves(values) if isinstance(leaf, TracedTensor))
