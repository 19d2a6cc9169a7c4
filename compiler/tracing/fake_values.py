"""Fake values: tensors without data that stand for those of a trace, and what operations make of them."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stepgraph.compiler.tracing.known_results import KnownResults
from stepgraph.compiler.tracing.model_location import model_location
from stepgraph.compiler.tracing.spell_calls import mapped, plain
from stepgraph.compiler.tracing.traced_tensor import TracedTensor, storage_key
from stepgraph.errors import TraceError
from stepgraph.weight_kinds import is_plain, kind_of

FAKE_ERRORS = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


class FakeValues:
    """The fake tensors of one trace.

    Attributes:
        mode: What the fake tensors belong to.
        device: Where tensors on the meta device are taken to be.
        on_write: Called with the fake tensors that an operation wrote to.
        passing: Operations run as they are and are not recorded.
        kept_alive: The tensors that have a fake one; its key is their identity.
    """

    def __init__(self, mode: FakeTensorMode, device: torch.device, on_write: Callable[[FakeTensor], None]) -> None:
        self.mode, self.device, self.on_write = mode, device, on_write
        self.passing = False
        self.kept_alive: list[torch.Tensor] = []
        self.fakes: dict[int, FakeTensor] = {}
        self.results = KnownResults(self.hollow)
        # Attention on the CPU is one operator that torch's counter does not know by this name.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.flops = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})

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
            tensors.append(self.of(leaf))
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
            self.on_write(tensor)
        outcome = value, frozenset(map(storage_key, written)), (self.total_flops - flops) // 2
        self.results.keep(key, outcome, tensors)
        return outcome

    @property
    def total_flops(self) -> int:
        """What has been counted so far: two for every multiply-accumulate."""
        return int(self.flops.get_total_flops())

    def of(self, tensor: torch.Tensor) -> FakeTensor:
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
        previous, self.passing = self.passing, True
        try:
            yield
        finally:
            self.passing = previous

    def twin(self, module: nn.Module) -> nn.Module:
        """The module with fake parameters; the module itself may be running in another thread."""
        twin = object.__new__(type(module))
        tensors = {
            kind: {name: None if t is None else self.of(t) for name, t in getattr(module, kind).items()}
            for kind in ("_parameters", "_buffers")
        }
        children = {name: None if child is None else self.twin(child) for name, child in module._modules.items()}
        twin.__dict__ = {**vars(module), **tensors, "_modules": children}
        return twin


def _without_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; views that a forward takes of parameters would ask for a gradient function."""
    if not tensor.requires_grad:
        return tensor
    with _disable_current_modes():
        return tensor.detach()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


__all__ = ["FakeValues"]
