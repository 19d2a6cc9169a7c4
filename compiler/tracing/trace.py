"""Value-carrying tracing: a model's forward becomes a torch.fx graph in which every node knows its shape and dtype.

While the forward runs, every tensor in it is a `TracedTensor`: a tensor without data that carries the graph node it
came from and a fake tensor as its value. All of torch's functions, methods and properties pass through one place,
`Tracer.call_torch`: it runs the operation on the fake values and records a node for it. Shapes, dtypes and devices are
plain Python values, so control flow on them needs no special care; what asks for data is refused by file and line.

torch.nn modules stay `call_module` nodes, everything else is inlined. No weight is read: a model on the meta device or
of fake tensors traces like a real one, and `Trace.bind` puts the graph on any model of the same structure.
"""

import gc
import operator
import threading
import time
import traceback
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from stepgraph.adapters import in_training
from stepgraph.compiler.tracing.forward_errors import ForwardErrors, own_error
from stepgraph.compiler.tracing.pause_garbage_collector import older_objects_aside, pause_garbage_collector
from stepgraph.compiler.tracing.record_facts import Reads
from stepgraph.compiler.tracing.refuse_changed_state import module_attributes, refuse_changed_state
from stepgraph.compiler.tracing.refuse_other_operations import refuse_other_operations
from stepgraph.compiler.tracing.refuse_survivors import forget_in_memos, refuse_survivors
from stepgraph.compiler.tracing.saved_state import SavedState, drop_traced
from stepgraph.compiler.tracing.strengths import STRENGTH, Strengths, restore
from stepgraph.compiler.tracing.traced_tensor import TracedTensor
from stepgraph.compiler.tracing.tracer import KeptStateError, ModuleCall, Tracer
from stepgraph.env import get_logger
from stepgraph.errors import TraceError
from stepgraph.fingerprint import has_data
from stepgraph.inputs import flat_inputs, like_flat
from stepgraph.runtime.attach.attach import own_forward
from stepgraph.runtime.program.facts import Facts
from stepgraph.runtime.program.lazy_graph import lazy_graph
from stepgraph.wrapped_models import refuse_modes, refuse_offload, uncompiled

# Two traces at once would see each other's patches of nn.Module.
TRACE_LOCK = threading.RLock()


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
        facts: What the graph depends on beside them and the contents of weights.
        seconds: How long tracing took.
    """

    graph: fx.Graph
    calls: dict[tuple[str, int], ModuleCall]
    constants: dict[str, torch.Tensor]
    output_spec: pytree.TreeSpec
    inputs: dict[str, FakeTensor]
    facts: Facts
    seconds: float = 0.0

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The constants but for those that stand for strengths."""
        return {name: value for name, value in self.constants.items() if not name.startswith(STRENGTH)}

    def bind(self, model: nn.Module, graph: fx.Graph | None = None) -> fx.GraphModule:
        """The graph (or a rewritten one) on a model's parameters and modules, which are shared and not copied."""
        graph = graph or self.graph
        attributes: dict[str, Any] = dict(self.constants)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in attributes:
                attributes[node.target] = uncompiled(operator.attrgetter(node.target)(model))
        return lazy_graph(attributes, graph, type(model).__name__)


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Trace a model's forward for inputs of fixed shapes.

    Args:
        model: In evaluation mode; real, on the meta device, or built of fake tensors.
        inputs: Keyword arguments of the forward. Tensors (real or fake) become inputs of the graph, named like the
            argument; tensors inside dicts, lists and tuples become inputs too (`stepgraph.inputs`). Everything else is a
            constant of the graph. Where the forward fills a table of its own in its first call, it is called with them once.

    Raises:
        TraceError: The forward depends on data, on its own past or on anything else but its inputs and weights (it is traced
            twice to see that), the model is in training mode, or an input holds tensors inside something else than such
            containers.
        CompileError: Hooks move or cast the model's weights, or a mode of torch's stands around.
        Exception: Whatever the model's own code raises (`forward_errors.is_own`), as it is.
    """
    training = in_training(model)
    if training is not None:
        raise TraceError(f"{training} is in training mode, where dropout is random; call model.eval() first")
    for name, value in flat_inputs(inputs).items():
        leaves = pytree.tree_leaves(value)
        if any(isinstance(leaf, nn.Module) for leaf in leaves):
            raise TraceError(
                f"the input {name} brings a module, whose weights and values a graph would not follow; make it a part of "
                f"the model"
            )
        if not isinstance(value, torch.Tensor) and any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise TraceError(
                f"the input {name} holds tensors inside a {type(value).__name__}, which would become constants of the "
                f"graph; only inputs that are tensors themselves, or dicts by name, lists and tuples of these, can change from "
                f"call to call"
            )
    refuse_offload(model)
    refuse_modes(besides=("FakeTensorMode",))
    started = time.perf_counter()
    with TRACE_LOCK, pause_garbage_collector(), torch.inference_mode(False), torch.no_grad():
        before = SavedState(model)
        try:
            recorded, error = _record_or_refuse(model, inputs, before)
        except KeptStateError:
            if not _have_values(model, inputs):
                raise
            recorded, error = _record_warm(model, inputs, before)
    if error is not None:
        # Outside of the handler, so that it does not name the refusal as what it came from.
        raise error
    assert recorded is not None
    return replace(recorded, seconds=time.perf_counter() - started)


def _have_values(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the forward could be called as it is."""
    examples = [value for value in flat_inputs(inputs).values() if isinstance(value, torch.Tensor)]
    return all(has_data(tensor) for tensor in (*model.parameters(), *model.buffers(), *examples))


def _record_or_refuse(model: nn.Module, inputs: Mapping[str, Any], before: SavedState) -> tuple[Trace | None, Exception | None]:
    """The trace, or the error of the model's own code; the model is as it was `before` after a refusal.

    Raises:
        TraceError: A refusal.
    """
    references = list[weakref.ref[TracedTensor]]()

    def leave_no_trace() -> None:
        before.restore()
        forget_in_memos(references)
        drop_traced(references)

    try:
        recorded = _record_twice(model, inputs, references, Strengths())
        if recorded is None:
            leave_no_trace()
            recorded = _record_twice(model, inputs, references, Strengths(denied=None))
    except BaseException as refusal:
        # The model that was refused is still the user's, to run without us.
        leave_no_trace()
        error = own_error(refusal)
        if error is None:
            raise
        return None, error
    return recorded, None


def _record_warm(model: nn.Module, inputs: Mapping[str, Any], before: SavedState) -> tuple[Trace | None, Exception | None]:
    """`_record_or_refuse` behind a call of the forward as it is, in which it makes the tables that its first call makes.

    Raises:
        KeptStateError: It keeps something of every call.
    """
    get_logger("trace").info("%s keeps what its first call makes: it is called once", type(model).__name__)
    forward = own_forward(model) or model.forward
    try:
        with torch.random.fork_rng():
            forward(**inputs)
        recorded, error = _record_or_refuse(model, inputs, SavedState(model))
    except BaseException:
        before.restore(called=True)
        raise
    if error is not None:
        before.restore(called=True)
    return recorded, error


def _record_twice(
    model: nn.Module, inputs: Mapping[str, Any], references: list["weakref.ref[TracedTensor]"], strengths: Strengths
) -> Trace | None:
    """Run the forward twice, the second time with other strengths.

    Returns:
        None where it did something else then, or could do nothing with a number that is no float of C.

    Raises:
        TraceError: It did something else although there are no strengths.
    """
    try:
        first = _record(model, inputs, references, strengths)
    except TraceError:
        if not strengths.places:
            raise
        return None
    if strengths.fixed & strengths.tensors:
        # A number is baked in that is written to in place.
        return None
    # What was not asked for either: it must make no difference.
    followed = (frozenset(place for place, _ in strengths.constants) | strengths.unread) - strengths.fixed
    try:
        second = _record(model, inputs, references, Strengths(other=followed, denied=strengths.denied), first)
        refuse_other_operations(first.graph, second.graph, first.tensors, second.constants)
    except TraceError:
        if not followed:
            raise
        return None
    return first


def _record(
    model: nn.Module,
    inputs: Mapping[str, Any],
    references: list["weakref.ref[TracedTensor]"],
    strengths: Strengths,
    earlier: Trace | None = None,
) -> Trace:
    """Run the forward once on traced tensors, and see to it that none of them stays behind."""
    with older_objects_aside():
        try:
            recorded = _run(model, inputs, references, strengths, earlier)
        except TraceError as error:
            _forget_locals(error)
            raise
        finally:
            if any(ref() is not None for ref in references):
                gc.collect()
    refuse_survivors(references)
    return recorded


def _forget_locals(error: BaseException | None) -> None:
    """Let go of the traced tensors that an error's frames hold, and those of the errors it came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    references: list["weakref.ref[TracedTensor]"],
    strengths: Strengths,
    earlier: Trace | None,
) -> Trace:
    """Run the forward once on traced tensors."""
    examples = {name: value for name, value in flat_inputs(inputs).items() if isinstance(value, torch.Tensor)}
    tensors = [*model.parameters(), *model.buffers(), *examples.values()]
    fake = [*(earlier.inputs.values() if earlier is not None else ()), *tensors]
    mode = next((t.fake_mode for t in fake if isinstance(t, FakeTensor)), None) or FakeTensorMode(allow_non_fake_inputs=True)
    device = next((t.device for t in reversed(tensors) if t.device.type != "meta"), torch.device("cpu"))
    reads = Reads(model, strengths, again=earlier is not None)
    tracer = Tracer(model, mode, device, earlier=None if earlier is None else earlier.graph, reads=reads)
    tracer.references = references
    before = module_attributes(model)
    call, getattribute, read = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__getattribute__
    # Other threads may run this very model meanwhile; for them nothing changes.
    this_thread = threading.get_ident()

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == this_thread
        # What torch.compile keeps beside a module is not its forward.
        return tracer.call_module(nn.Module._call_impl, module, args, kwargs) if mine else call(module, *args, **kwargs)

    def traced_getattr(module: nn.Module, name: str) -> Any:
        if not tracer.values.passing:
            reads.note_absent(module, name)
        value = getattribute(module, name)
        return tracer.get_attribute(value) if threading.get_ident() == this_thread else value

    def traced_read(module: nn.Module, name: str) -> Any:
        value = read(module, name)
        # What twins of leaves read is noted of the leaves; modules that are called as they are read it in every run.
        return value if tracer.values.passing else reads.read(module, name, value)

    with ExitStack() as stack:
        stack.callback(restore, model)
        # A thread that is just reading an attribute may keep the tracer alive a little longer.
        stack.callback(tracer.attribute_nodes.clear)
        # Under autocast a traced operation would have other dtypes than the graph's run has.
        for kind in tracer.devices:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(mode)
        stack.enter_context(tracer.values.flops)
        placeholders = {
            name: tracer.record("placeholder", name, (), {}, tracer.values.of(value)) for name, value in examples.items()
        }
        stack.enter_context(mock.patch.object(nn.Module, "__call__", traced_call))
        stack.enter_context(mock.patch.object(nn.Module, "__getattr__", traced_getattr))
        stack.enter_context(mock.patch.object(nn.Module, "__getattribute__", traced_read))
        stack.enter_context(tracer)
        # A model that an executable is attached to is traced as it was before. Hooks of the model itself are no part of its
        # graph: they run around what stands in for its forward.
        forward = own_forward(model) or model.forward
        with ForwardErrors():
            result = tracer.call_module(lambda _, **arguments: forward(**arguments), model, (), like_flat(inputs, placeholders))
            tracer.refuse_caught()
    refuse_changed_state(model, before)
    leaves, spec = pytree.tree_flatten(result)
    if not all(isinstance(leaf, TracedTensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, TracedTensor)}))
        raise TraceError(f"{type(model).__name__} returns {kinds} beside tensors; only tensors can be outputs of a graph")
    tracer.graph.output(tuple(leaf.node for leaf in leaves))
    fakes = {name: traced.value for name, traced in placeholders.items()}
    return Trace(
        tracer.graph, tracer.calls, tracer.constants, spec, fakes, earlier.facts if earlier is not None else reads.facts()
    )


__all__ = ["Trace", "TraceError", "trace"]
