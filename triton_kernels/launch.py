"""What the launchers share: the machine's limits, tensors as rows of channels, launching, and choosing the fastest tile."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stepgraph.env import get_logger
from stepgraph.ops import rows
from stepgraph.triton_kernels.settings import interpreting

T = TypeVar("T")


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


def launch(device: torch.device, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Run a kernel with a config on a device, whichever is the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants, **config.block, num_warps=config.warps, num_stages=config.stages)


_fastest: dict[Any, Any] = {}


def fastest(key: Any, candidates: Sequence[T], run: Callable[[T], object]) -> T:
    """The candidate that runs fastest, measured once per key; the first where nothing can be measured.

    Nothing is measured in the interpreter, while a CUDA graph is captured, and under deterministic algorithms.

    Args:
        key: What the choice depends on: the operation, shapes, dtypes, the device.
        candidates: The best guess first.
        run: Launches with a candidate, as often as wanted.

    Raises:
        OutOfResources: No candidate fits the device.
    """
    if key in _fastest:
        return next(candidate for candidate in candidates if candidate == _fastest[key])
    fixed = interpreting() or torch.are_deterministic_algorithms_enabled()
    if len(candidates) == 1 or fixed or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    seconds, refused = {}, None
    for candidate in candidates:
        try:
            seconds[candidate] = triton.testing.do_bench(lambda chosen=candidate: run(chosen), warmup=5, rep=20)
        except OutOfResources as error:
            refused = error
    if refused is not None and not seconds:
        raise refused
    _fastest[key] = min(seconds, key=lambda candidate: seconds[candidate])
    get_logger("triton").debug("%s: %s, of %s", key, _fastest[key], {str(c): f"{ms:.4f} ms" for c, ms in seconds.items()})
    return _fastest[key]  # type: ignore[no-any-return]


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


def input_precision(x: Tensor) -> str:
    """Of matrix products: float32 is rounded to tf32 only where torch's own products are."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 and not machine(x.device).hip else "ieee"
