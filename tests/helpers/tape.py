"""What a CUDA graph is, on a CPU: every operation is recorded with the memory that it saw, and replayed on that.

Whatever Python decided or read while it was recorded stays as it was then. Between replays all memory that the recording
allocated is NaN, as nobody may rely on a graph's scratch. Refused is what a device refuses or what would be wrong there:
waiting for it, memory of the recording that somebody holds afterwards, work on a stream that is not joined again, and random
numbers of a generator that the graph knows nothing of. As on a device, work runs once more before it is recorded.
"""

import gc
import threading
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph import wrapped_models
from stepgraph.compiler.tracing.pause_garbage_collector import older_objects_aside

# What would wait for a device, by the operator it comes down to and by the name it is called by.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_assert_async")
CALLS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "tensor", "as_tensor", "from_numpy")


class HostReadError(RuntimeError):
    """Work that would wait for a device."""


class Stream:
    """`torch.cuda.Stream` while a tape records: work on it belongs to the recording between two calls of `wait_stream`."""

    def __init__(self, *_, **__):
        self.forked = self.pending = False

    def wait_stream(self, other):
        self.forked = self.forked or other.forked
        self.pending, other.pending = self.pending or other.pending, False

    def record_stream(self, *_):
        """Memory is not handed on while a tape records."""


class _Streams:
    """The streams of a recording."""

    def __init__(self):
        self.main = Stream()
        self.main.forked = True
        self.used, self._current = {id(self.main): self.main}, [self.main]

    def see_work(self):
        current = self._current[-1]
        if not current.forked:
            raise RuntimeError("work on a stream that does not wait for the recording's while recording")
        current.pending, self.used[id(current)] = True, current

    @contextmanager
    def _on(self, stream):
        self._current.append(stream)
        yield
        self._current.pop()

    @contextmanager
    def watched(self):
        with mock.patch.multiple(
            torch.cuda, Stream=Stream, stream=self._on, current_stream=lambda *_: self._current[-1]
        ):  # fmt: skip
            yield
        if any(stream.pending for stream in self.used.values() if stream is not self.main):
            raise RuntimeError("work on a stream that is not joined at the end of the recording")


class _Functions(TorchFunctionMode):
    """Refuses what never comes down to an operator of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in CALLS:
            raise HostReadError(f"{name} while recording")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Records every operator, with tensors of its own of the memory that it read and wrote: others can be seen to go."""

    def __init__(self, streams=None):
        super().__init__()
        self.seen, self._streams = [], streams
        self._held, self._allocated = Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READS:
            raise HostReadError(f"{name} while recording")
        if (kwargs or {}).get("generator") is not None:
            raise RuntimeError(f"{name} with a generator that is not registered with the recording")
        if self._streams is None:
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        aliased = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
        # A view stays a view; what is written in place is written again.
        if not aliased or any(alias.is_write for alias in aliased):
            self._streams.see_work()
            self.seen.append((func, self._own(args), self._own(kwargs or {}), None if aliased else self._own(result)))
        if not aliased:
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self._allocated |= {leaf.untyped_storage()._cdata: tuple(leaf.shape) for leaf in leaves}
        return result

    def _own(self, values):
        """The same memory in other tensors."""

        def alias(leaf):
            if not isinstance(leaf, torch.Tensor) or not leaf.untyped_storage().nbytes():
                return leaf
            self._held[leaf.untyped_storage()._cdata] += 1
            return leaf.detach()

        return pytree.tree_map(alias, values)

    def refuse_outliving(self):
        """What was allocated while recording belongs to the graph: nobody else may hold it."""
        gc.collect()
        for storage, shape in self._allocated.items():
            # The tensors of the tape, and the storage as Python knows it.
            if torch._C._storage_Use_Count(storage) > self._held[storage] + 1:
                raise RuntimeError(f"a tensor {list(shape)} that was allocated while recording is held afterwards")


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
        with no_host_reads():
            self.warm_up(run)
        streams = _Streams()
        # What this run leaves in cycles of references is let go, without a walk over all that the process has.
        with older_objects_aside():
            with streams.watched(), _standing_around(streams) as operators:
                run()
            operators.refuse_outliving()
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
    with _standing_around():
        yield


@contextmanager
def _standing_around(streams=None):
    """The modes that refuse and record, which stand in for a device here: runs must not refuse them."""
    harmless = (*wrapped_models.HARMLESS, _Functions.__qualname__, _Operators.__qualname__)
    with mock.patch.object(wrapped_models, "HARMLESS", harmless), _Functions(), _Operators(streams) as operators:
        yield operators
