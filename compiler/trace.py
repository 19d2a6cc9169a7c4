"""Value-carrying tracing: a model's forward becomes a torch.fx graph in which every node knows its shape and dtype.

While the forward runs, every tensor in it is a `TracedTensor`: a tensor without data that carries the graph node it
came from and a fake tensor as its value. All of torch's functions, methods and properties pass through one place,
`Tracer.call_torch`: it runs the operation on the fake values and records a node for it. Shapes, dtypes and devices are
plain Python values, so control flow on them needs no special care; what asks for data is refused by file and line.

torch.nn modules stay `call_module` nodes, everything else is inlined. No weight is read: a model on the meta device or
of fake tensors traces like a real one, and `Trace.bind` puts the graph on any model of the same structure.
"""

import inspect
import linecache
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stepgraph.runtime.attach import own_forward

TORCH_FOLDER = str(Path(torch.__file__).parent)
# Two traces at once would see each other's patches of nn.Module.
TRACE_LOCK = threading.RLock()


class TraceError(RuntimeError):
    """A model whose forward cannot be turned into a faithful static graph; the message names the file and line."""


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
class Trace:
    """A traced forward.

    Attributes:
        graph: Placeholders are the tensor inputs by name; the output is the flat tuple of returned tensors. Node meta:
            `val` (fake tensor), `nn_module_stack`, `macs`, `mutates` (keys of the storages the node writes to).
        calls: Every module call by (path, how many calls of that path came before).
        constants: Tensors that the forward holds outside parameters and buffers, by attribute name in the graph.
        output_spec: Rebuilds what the forward returned from the flat outputs.
        inputs: The example inputs' fake values by name.
        seconds: How long tracing took.
    """

    graph: fx.Graph
    calls: dict[tuple[str, int], ModuleCall]
    constants: dict[str, torch.Tensor]
    output_spec: pytree.TreeSpec
    inputs: dict[str, FakeTensor]
    seconds: float = 0.0

    def bind(self, model: nn.Module, graph: fx.Graph | None = None) -> fx.GraphModule:
        """The graph (or a rewritten one) on a model's parameters and modules, which are shared and not copied."""
        graph = graph or self.graph
        attributes: dict[str, Any] = dict(self.constants)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in attributes:
                attributes[node.target] = operator.attrgetter(node.target)(model)
        return fx.GraphModule(attributes, graph, class_name=type(model).__name__)


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


def model_frame() -> tuple[str, int, str, str] | None:
    """File, line, function and source of the innermost frame outside torch and this module: the model's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((TORCH_FOLDER, "<")):
            return file, frame.f_lineno, frame.f_code.co_name, linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back
    return None


def model_location() -> str:
    """ "file:line (source)" of the place in the model's own code that is running."""
    found = model_frame()
    return f"{found[0]}:{found[1]}" + (f" ({found[3]})" if found[3] else "") if found else "an unknown place"


@dataclass
class Tracer(TorchFunctionMode):
    """Records one run of a model's forward. Use `trace`."""

    model: nn.Module
    mode: FakeTensorMode
    graph: fx.Graph = field(default_factory=fx.Graph)
    calls: dict[tuple[str, int], ModuleCall] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in self.model.named_modules()}
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.attributes = {id(tensor): name for name, tensor in tensors}
        self.attribute_nodes: dict[str, TracedTensor] = {}
        self.fakes: dict[int, FakeTensor] = {}
        self.kept_alive: list[torch.Tensor] = []
        self.stack: dict[str, tuple[str, type]] = {}
        self.inside = False
        # Attention on the CPU is one operator that torch's counter does not know by this name.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.flops = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})

    # -- what the forward does ---------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function, tensor method and tensor property that runs during the trace."""
        return func(*args, **(kwargs or {})) if self.inside else self.call_torch(func, args, kwargs or {})

    def call_torch(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation on fake values; record it unless what it returns is plain Python, such as a shape."""
        value, mutates, macs = self.run(func, args, kwargs)
        if not mutates and not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            return value
        op, target, arguments = _spelling(func, args)
        return self.record(op, target, arguments, kwargs, value, mutates, macs)

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Inline a module, or record it as one node where it is one of torch.nn's own."""
        path = self.paths.get(id(module))
        if self.inside or path is None:
            return original(module, *args, **kwargs)
        number = sum(1 for known, _ in self.calls if known == path)
        # The slot is taken before the call, so that calls are numbered in the order in which they start.
        before = self.last_node()
        self.calls[path, number] = ModuleCall((), (), before, before)
        key = f"{path}@{number}" if number else path
        self.stack[key] = (path, type(module))
        try:
            if is_leaf(module):
                fakes: dict[str, torch.Tensor] = {
                    name: self.fake(t) for name, t in [*module.named_parameters(), *module.named_buffers()]
                }
                value, mutates, macs = self.run(lambda *a, **k: torch.func.functional_call(module, fakes, a, k), args, kwargs)
                result = self.record("call_module", path, args, kwargs, value, mutates, macs)
            else:
                result = original(module, *args, **kwargs)
        finally:
            del self.stack[key]
        self.calls[path, number] = ModuleCall(_nodes((args, kwargs)), _nodes(result), before, self.last_node())
        return result

    def last_node(self) -> fx.Node:
        """The node recorded last."""
        last: fx.Node = next(iter(reversed(self.graph.nodes)))
        return last

    def get_attribute(self, value: Any) -> Any:
        """What an attribute read of a module gives during the trace: parameters and buffers become graph nodes."""
        name = self.attributes.get(id(value)) if not self.inside and isinstance(value, torch.Tensor) else None
        if name is None:
            return value
        if name not in self.attribute_nodes:
            self.attribute_nodes[name] = self.record("get_attr", name, (), {}, self.fake(value))
        return self.attribute_nodes[name]

    # -- recording ---------------------------------------------------------------------------------------------------

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, frozenset[int], int]:
        """The operation's result on fake values, the storages it wrote to, and its multiply-accumulates."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        versions, flops = [t._version for t in tensors], self.flops.get_total_flops()
        try:
            with self.pass_through():
                value = func(*args, **kwargs)
        except TraceError:
            raise
        except RuntimeError as error:
            name = getattr(func, "__name__", str(func))
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
        return value, frozenset(map(storage_key, written)), (self.flops.get_total_flops() - flops) // 2

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
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.node_of, (args, kwargs))
        # Generated code spells numbers out, and numpy's spell themselves with a name that is not known there.
        args, kwargs = pytree.tree_map_only(np.generic, lambda number: number.item(), (args, kwargs))
        node = self.graph.create_node(op, target, tuple(args), kwargs)
        node.meta |= {"nn_module_stack": dict(self.stack), "mutates": mutates, "macs": macs}
        place = model_frame() if op.startswith("call") else None
        if place is not None:
            # In the form that fx reads to print the model's source line over the nodes that come from it.
            node.stack_trace = f'  File "{place[0]}", line {place[1]}, in {place[2]}\n    {place[3]}'
        return self.wrap(value, node)

    def wrap(self, value: Any, node: fx.Node) -> Any:
        """The traced counterpart of a node's value; tuples and lists are taken apart at once."""
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            return TracedTensor(value, node)  # type: ignore[arg-type]
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
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        if id(tensor) not in self.fakes:
            self.kept_alive.append(tensor)
            with self.pass_through():
                self.fakes[id(tensor)] = self.mode.from_tensor(tensor)
        return self.fakes[id(tensor)]

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
            if isinstance(tensor, FakeTensor):
                raise TraceError(
                    f"{model_location()}: a tensor without data that is neither a parameter nor a registered buffer "
                    f"is used here; trace the model with its weights, or register the tensor as a buffer"
                )
            self.kept_alive.append(tensor)
            name = self.attributes[id(tensor)] = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        traced: TracedTensor = self.get_attribute(tensor)
        return traced.node


NO_PAST = "a later call would depend on an earlier one, which a static graph cannot carry"
FAKE_ERRORS = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for all views of one (fake) storage, while one of them lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def is_leaf(module: nn.Module) -> bool:
    """torch.nn's own modules are leaves, apart from containers, whose children are visited."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _spelling(func: Any, args: Any) -> tuple[str, Any, Any]:
    """How a node writes an intercepted call: (op, target, args)."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in OPERATORS:
        return "call_function", OPERATORS[name], args
    if torch.overrides.is_tensor_method_or_property(func):
        return "call_method", name, args
    return "call_function", func, args


OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "getitem",
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
    )
}


def _nodes(values: Any) -> tuple[fx.Node, ...]:
    return tuple(leaf.node for leaf in pytree.tree_leaves(values) if isinstance(leaf, TracedTensor))


def _state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, to see afterwards whether the forward changed one."""
    state: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in ("_buffers", "_parameters", "_modules")}
        for name, value in {**own, **module._buffers, **module._parameters, **module._modules}.items():
            members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            plain = isinstance(value, (int, float, str, bool))
            state[path, name] = (value if plain else id(value), [id(member) for member in members])
    return state


def _refuse_changed_state(model: nn.Module, before: Mapping[tuple[str, str], Any]) -> None:
    """A forward that writes to its module computes with a past that a graph would not have."""
    for (path, name), value in _state_of(model).items():
        if value == before.get((path, name)):
            continue
        module = model.get_submodule(path)
        lines, start = inspect.getsourcelines(type(module).forward)
        hits = [start + i for i, line in enumerate(lines) if f"self.{name}" in line]
        where = f"{inspect.getsourcefile(type(module).forward)}:{hits[0] if hits else start}"
        raise TraceError(f"{where}: the forward of {path or type(module).__name__} changes its own {name!r}; {NO_PAST}")


def _clear_memos(model: nn.Module) -> None:
    """Empty the functools caches of the model's classes: what they hold from before would be a constant of the graph, and
    what they hold from the trace has no data.
    """
    for kind in {type(module) for module in model.modules()}:
        for name in dir(kind):
            clear = getattr(inspect.getattr_static(kind, name), "cache_clear", None)
            if callable(clear):
                clear()


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Trace a model's forward for inputs of fixed shapes.

    Args:
        model: In evaluation mode; real, on the meta device, or built of fake tensors.
        inputs: Keyword arguments of the forward. Tensors (real or fake) become inputs of the graph, named like the
            argument; everything else is a constant of the graph.

    Raises:
        TraceError: The forward depends on data or on its own past, the model is in training mode, or an input holds
            tensors inside a tuple, list or dict.
    """
    training = next((path or type(model).__name__ for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise TraceError(f"{training} is in training mode, where dropout is random; call model.eval() first")
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) and any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)):
            raise TraceError(
                f"the input {name} holds tensors inside a {type(value).__name__}, which would become constants of the "
                f"graph; only inputs that are tensors themselves can change from call to call"
            )
    started = time.perf_counter()
    parameters = [*model.parameters(), *model.buffers()]
    modes = [t.fake_mode for t in [*parameters, *inputs.values()] if isinstance(t, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode()
    tracer = Tracer(model, mode)
    _move_meta(tracer, parameters, inputs)
    before = _state_of(model)
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    with ExitStack() as stack:
        stack.enter_context(TRACE_LOCK)
        _clear_memos(model)
        stack.callback(_clear_memos, model)
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        stack.enter_context(tracer.flops)
        placeholders = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                fake = tracer.fake(value)
                placeholders[name] = tracer.record("placeholder", name, (), {}, fake)
        # Other threads may run this very model meanwhile; for them nothing changes.
        own = threading.get_ident()

        def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            mine = threading.get_ident() == own
            return tracer.call_module(call, module, args, kwargs) if mine else call(module, *args, **kwargs)

        def traced_getattr(module: nn.Module, name: str) -> Any:
            value = getattribute(module, name)
            return tracer.get_attribute(value) if threading.get_ident() == own else value

        stack.enter_context(mock.patch.object(nn.Module, "__call__", traced_call))
        stack.enter_context(mock.patch.object(nn.Module, "__getattr__", traced_getattr))
        stack.enter_context(tracer)
        # A model that an executable is attached to is traced as it was before.
        forward = own_forward(model)
        run = call if forward is None else lambda _, **arguments: forward(**arguments)
        result = tracer.call_module(run, model, (), {**inputs, **placeholders})
    _refuse_changed_state(model, before)
    leaves, spec = pytree.tree_flatten(result)
    if not all(isinstance(leaf, TracedTensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, TracedTensor)}))
        raise TraceError(f"{type(model).__name__} returns {kinds} beside tensors; only tensors can be outputs of a graph")
    tracer.graph.output(tuple(leaf.node for leaf in leaves))
    fakes = {name: traced.value for name, traced in placeholders.items()}
    return Trace(tracer.graph, tracer.calls, tracer.constants, spec, fakes, time.perf_counter() - started)


def _move_meta(tracer: Tracer, parameters: list[torch.Tensor], inputs: Mapping[str, Any]) -> None:
    """Let meta parameters stand for parameters on the inputs' device."""
    devices = {v.device for v in inputs.values() if isinstance(v, torch.Tensor) and v.device.type != "meta"}
    device = next(iter(devices), torch.device("cpu"))
    for tensor in [*parameters, *(v for v in inputs.values() if isinstance(v, torch.Tensor))]:
        if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor):
            tracer.kept_alive.append(tensor)
            tracer.fakes[id(tensor)] = FakeTensor(tracer.mode, tensor.detach(), device)
