"""What a CUDA graph is, on a CPU: every operation is recorded with the very tensors that it saw, and replayed on those.

Whatever Python decided or read while it was recorded stays as it was then. Between replays all memory that the recording
allocated is NaN, as nobody may rely on a graph's scratch.
"""

import threading
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What would wait for a device, by the operator it comes down to and by the name it is called by.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_assert_async")
CALLS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "tensor", "as_tensor", "from_numpy")


class HostReadError(RuntimeError):
    """Work that would wait for a device."""


class _Functions(TorchFunctionMode):
    """Refuses what never comes down to an operator of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in CALLS:
            raise HostReadError(f"{name} while recording")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Records every operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READS:
            raise HostReadError(f"{name} while recording")
        result = func(*args, **(kwargs or {}))
        aliased = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
        # A view stays a view; what is written in place is written again.
        if not aliased or any(alias.is_write for alias in aliased):
            self.seen.append((func, args, kwargs or {}, None if aliased else result))
        return result


class Tape:
    """A recorder (`stepgraph.runtime.capture.cudagraph.Recorder`) for the CPU."""

    def __init__(self, device=None):
        self._lock = threading.RLock()
        self.recorded, self.replayed = [], []

    @contextmanager
    def turn(self):
        with self._lock:
            yield

    def warm_up(self, run):
        return run()

    def record(self, run):
        with _Functions(), _Operators() as operators:
            run()
        number = len(self.recorded)
        self.recorded.append(operators.seen)

        def replay():
            self.replayed.append(number)
            with torch.no_grad():
                replay_operators(operators.seen)

        return replay


def replay_operators(seen):
    for _, _, _, result in seen:
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))
    for func, args, kwargs, result in seen:
        again = func(*args, **kwargs)
        if result is not None:
            for tensor, value in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(tensor, torch.Tensor):
                    tensor.copy_(value)


@contextmanager
def no_host_reads():
    """Refuse what would wait for a device."""
    with _Functions(), _Operators():
        yield
