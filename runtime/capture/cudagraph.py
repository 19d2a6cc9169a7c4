"""CUDA graphs: work on a device that is launched once and replayed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, TypeVar

import torch

from stepgraph.env import read_env
from stepgraph.errors import CaptureError
from stepgraph.metrics import relative_error
from stepgraph.tolerances import REPLAY, tolerance

T = TypeVar("T")


class Recorder(Protocol):
    """Captures work on one device.

    What a capture allocates is scratch that all captures of a recorder share: nothing in it lasts from one replay to the next.
    What lasts lies in buffers that were there before, and the captured work writes into them.
    """

    def turn(self) -> AbstractContextManager[None]:
        """A time in which nobody else uses the recorder's captures and their buffers, on whatever thread or stream."""

    def warm_up(self, run: Callable[[], T]) -> T:
        """Run work as it will be captured, so that kernels are loaded and tuned; within a turn."""

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """Capture work, and give what replays it; both within a turn.

        Args:
            run: Runs more than once: what it counts or uses up it has to begin anew each time.

        Raises:
            RuntimeError: The work waits for the device, or does something else that a graph cannot hold.
        """


class CudaRecorder:
    """CUDA graphs on a device, with one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.RLock()
        with torch.cuda.device(device):
            self._stream, self._last = torch.cuda.Stream(), torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor: Callable[[], None] | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder`."""
        with self._lock, torch.cuda.device(self._device):
            # Another thread's stream may not have come to the end of its replay.
            torch.cuda.current_stream().wait_event(self._last)
            try:
                yield
            finally:
                self._last.record()

    def warm_up(self, run: Callable[[], T]) -> T:
        """See `Recorder`; on the stream that captures, whose cuBLAS workspace is then there."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """See `Recorder`."""
        self._refuse_waiting(run)
        before = torch.cuda.current_stream()
        try:
            # A pool whose last graph is gone is no longer there for the next one.
            self._anchor = self._anchor or self._captured(lambda: torch.zeros(1, device=self._device))
            return self._captured(run)
        except BaseException:
            self._abandon(before)
            raise

    def _captured(self, run: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate memory meanwhile, which the default mode would take for this one's mistake.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def _refuse_waiting(self, run: Callable[[], object]) -> None:
        """Run the work once more where waiting for the device is an error: a capture that fails is hard to recover from."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(run)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def _abandon(self, stream: torch.cuda.Stream) -> None:
        """After a capture that failed: torch leaves its stream current, and its pool open."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        # The failed capture's error is reported once more by the next call on the device.
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
        self._stream, self._pool, self._anchor = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle(), None


# By kind of device.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def why_not(device: torch.device) -> str:
    """Why nothing can be captured on a device as things are now; empty where it can."""
    if device.type not in RECORDERS:
        return f"the latents are on {device}; graphs are captured on {', '.join(RECORDERS)}"
    if read_env().check:
        return "STEPGRAPH_CHECK=1 looks at every step's values on the host"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured already"
    return ""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Buffers can be written to from anywhere only if they are not made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def refuse_difference(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Compare what a replay gave with what the work itself gives.

    Raises:
        CaptureError: They differ by more than rounding.
    """
    if not torch.equal(got.isnan(), wanted.isnan()):
        raise CaptureError(f"a replay of the captured {what} has NaN where the loop has none, or the other way round")
    most = tolerance(REPLAY, wanted.dtype)
    got, wanted = got.double().nan_to_num(), wanted.double().nan_to_num()
    error = relative_error(got, wanted)
    if error > most:
        raise CaptureError(
            f"a replay of the captured {what} differs from the loop by {error:.1e} of its norm; at most {most:.0e} is expected"
        )
