"""What the launchers share: the machine's limits, tensors as rows of channels, launching, and choosing the fastest tile."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from stepgraph.env import get_logger
from stepgraph.ops import rows
from stepgraph.triton_kernels.settings import interpreting
from stepgraph.tuning import may_tune

# Layouts of an operation's arguments that are remembered; a server meets no more than that by far.
MOST_LAYOUTS = 4096


@dataclass(frozen=True)
class Machine:
    """What tiles are chosen by.

    Attributes:
        processors: Streaming multiprocessors or compute units; 132 where unknown.
        shared: Bytes of shared memory that one program may use.
        hip: An AMD device.
    """

    processors: int = 132
    shared: int = 227 * 1024
    hip: bool = False


@cache
def machine(device: torch.device) -> Machine:
    """The limits of a device; those of an H200 for the interpreter."""
    if device.type != "cuda":
        return Machine()
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    shared = 64 * 1024 if hip else getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Machine(properties.multi_processor_count, shared, hip)


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: values of its constexpr parameters, warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int = 1

    @property
    def block(self) -> dict[str, int]:
        """The constexpr parameters by name."""
        return dict(self.blocks)

    @classmethod
    def of(cls, warps: int, stages: int = 1, **blocks: int) -> "Config":
        """From keywords."""
        return cls(tuple(blocks.items()), warps, stages)


class Launch:
    """A kernel with everything that is the same for all tensors of one layout: grid, config, and what follows tensors."""

    def __init__(
        self, device: torch.device, kernel: Any, grid: tuple[int, ...], config: Config, *fixed: object, **constants: object
    ) -> None:
        """Put it together.

        Args:
            device: Where the tensors are.
            kernel: Its parameters are tensors and tuples of such (None where there is none), then `fixed`, then constexprs.
            grid: How many programs.
            config: Constexpr parameters that are chosen, warps and stages.
            *fixed: Strides and sizes.
            **constants: The other constexpr parameters, and options of the compiler.
        """
        self._device = device if device.type == "cuda" else None
        self._start, self._fixed = kernel[grid], fixed
        options = {"num_warps": config.warps, "num_stages": config.stages}
        self._named: dict[str, object] = {**constants, **config.block, **options}

    def __call__(self, *tensors: object) -> None:
        """Launch it on the tensors' device, whichever is the current one."""
        if self._device is None or self._device.index == torch.cuda.current_device():
            self._start(*tensors, *self._fixed, **self._named)
        else:
            with torch.cuda.device(self._device):
                self._start(*tensors, *self._fixed, **self._named)


L = TypeVar("L")
_tables: list["Launches[Any]"] = []


class Launches(Generic[L]):
    """What was prepared for arguments of a layout: a call looks it up and computes nothing of shapes and strides."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[L, bool]] = {}
        _tables.append(self)

    def obtain(self, layout: Hashable, prepare: Callable[[], L]) -> L:
        """What was prepared for a layout; prepared anew where a best guess may now be replaced by what was tried.

        Args:
            layout: All that `prepare` goes by.
            prepare: Makes it.
        """
        known = self._known.get(layout)
        if known is not None and (known[1] or not may_tune()):
            return known[0]
        tried, prepared = may_tune() and not cannot_time(), prepare()
        if len(self._known) >= MOST_LAYOUTS:
            self._known.clear()
        self._known[layout] = (prepared, tried)
        return prepared

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()


# Of a tensor; mapped, they take no Python.
_shape, _strides = attrgetter("shape"), Tensor.stride


def layout_of(*tensors: Tensor) -> Hashable:
    """Shapes, strides, dtype and device of arguments that are of one dtype and on one device."""
    first = tensors[0]
    return (*map(_shape, tensors), *map(_strides, tensors), first.dtype, first.device)


# How a candidate is timed: milliseconds of a call. None where nothing can be timed.
clock: Callable[[Callable[[], object]], float] | None = None if interpreting() else partial(do_bench, warmup=5, rep=20)
_fastest: dict[Hashable, Config] = {}


def cannot_time() -> bool:
    """Whether candidates are not timed now, allowed or not."""
    return clock is None or torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()


def fastest(
    key: Hashable, candidates: Sequence[Config], make: Callable[[Config], Launch], trial: Callable[[], Sequence[object]]
) -> Launch:
    """The launch that runs fastest, measured once per key; that of the first candidate where nothing is measured.

    Measured is within `tuning` only; not in the interpreter, while a CUDA graph is captured, or under deterministic algorithms.

    Args:
        key: What the choice depends on: the operation, shapes, dtypes, the device.
        candidates: The best guess first.
        make: The launch with a candidate.
        trial: The tensors to measure with. Candidates run on them many times, so what is written to is scratch: memory that
            the call itself reads or writes must not be among it.

    Raises:
        OutOfResources: No candidate fits the device.
    """
    if key in _fastest:
        return make(next(candidate for candidate in candidates if candidate == _fastest[key]))
    if len(candidates) == 1 or not may_tune() or cannot_time():
        return make(candidates[0])
    assert clock is not None
    seconds, refused, tensors = {}, None, trial()
    for candidate in candidates:
        launch = make(candidate)
        try:
            seconds[candidate] = clock(lambda launch=launch: launch(*tensors))  # type: ignore[misc]
        except OutOfResources as error:
            refused = error
    if refused is not None and not seconds:
        raise refused
    _fastest[key] = min(seconds, key=lambda candidate: seconds[candidate])
    get_logger("triton").debug("%s: %s, of %s", key, _fastest[key], {str(c): f"{ms:.4f} ms" for c, ms in seconds.items()})
    return make(_fastest[key])


def forget() -> None:
    """Forget what was prepared and measured: for whoever changes what it was chosen by."""
    _fastest.clear()
    for table in _tables:
        table.clear()


def empty_rows(x: Tensor) -> Tensor:
    """Memory for a result like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """A tensor [..., C] as [B, N, C], without a copy."""
    if x.ndim <= 2:
        return x.view(1, -1, x.shape[-1]) if x.ndim < 2 else x.unsqueeze(0)
    return x if x.ndim == 3 else x.view(1, -1, x.shape[-1])


def row_strides(x: Tensor) -> tuple[int, int]:
    """Elements from one batch to the next, and from one token to the next."""
    viewed = as_rows(x)
    return viewed.stride(0), viewed.stride(1)


def modulation_strides(modulation: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Elements from one batch, token and channel to the next of what broadcasts against x [B, N, C]; 0 where it is repeated."""
    viewed = as_rows(rows(modulation, x).expand(x.shape))
    # The stride of a dimension of size 1 is arbitrary; as 0 it makes no kernel of its own.
    batch, token, channel = (0 if size == 1 else stride for size, stride in zip(viewed.shape, viewed.stride()))
    return batch, token, channel


def power_of_2(n: int) -> int:
    """The smallest one that is no smaller than n."""
    return 1 << (n - 1).bit_length()


def precision_setting(x: Tensor) -> bool:
    """What `input_precision` goes by beside the tensor."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def input_precision(x: Tensor) -> str:
    """Of matrix products: float32 is rounded to tf32 only where torch's own products are."""
    return "tf32" if precision_setting(x) and not machine(x.device).hip else "ieee"
