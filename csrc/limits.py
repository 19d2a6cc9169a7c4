"""Which sizes the C++ kernels take: those at which they were measured to be no slower than the references.

Measured on one core of an AMD Zen 4 CPU (AVX-512 with dot products of bfloat16) with torch 2.13: medians of CPU time,
interleaved with the reference; N = 16 to 2048 tokens, C = 64 to 4608, r = 8 to 256, and glyph-dit's shapes. What is said of
AVX2 was measured there too, with kernels and torch kept to it. Tiles (AMX) are given the rules of the dot products, which have
the lower rate of the two; no CPU with tiles was at hand.
"""

from torch import Tensor, float32

from stepgraph.csrc.library import level, native
from stepgraph.ops import forced

NEVER = 2**62
# Elements of the result from which on an elementwise pass pays for its call (about 10 microseconds of Python), by the number of
# terms, three meaning more as well: float32 with AVX2 or AVX-512, bfloat16 with AVX2, bfloat16 with AVX-512.
LEAST: dict[str, dict[int, tuple[int, int, int]]] = {
    "modulated_norm": {1: (0, 0, 0)},
    "gated_residual": {1: (2**18, NEVER, 2**16), 2: (2**15, 2**17, 2**13), 3: (2**13, 2**15, 2**13)},
    "linear_combination": {1: (NEVER, 0, 0), 2: (0, 0, 0), 3: (0, 0, 0)},
}
# Multiplications from which on a kernel's own projection beats torch's matrix product: of bfloat16, and of float32 on AMD CPUs.
# Intel's were measured to be level in float32.
LEAST_BFLOAT16, LEAST_FLOAT32 = 2**20, 2**25
# With AVX2, torch's float32 products are faster for larger B.
MOST_AVX2 = 2**15


def declines_machine() -> str:
    """Why no kernel runs here at all."""
    if native().missing:
        return native().missing
    return "" if level() != "baseline" else "the CPU has no AVX2"


def declines_size(op: str, x: Tensor, terms: int = 1) -> str:
    """Why an elementwise pass over `x` is left to torch."""
    if x.numel() == 0:
        return f"{list(x.shape)} has no elements to compute"
    if forced():
        return ""
    narrow = 0 if x.dtype == float32 else 1 if level() == "avx2" else 2
    least = LEAST[op][min(terms, max(LEAST[op]))][narrow]
    return "" if x.numel() >= least else f"{x.numel()} elements are too few to gain from one pass"


def projects(x: Tensor, b: Tensor) -> bool:
    """Whether the kernels compute B x themselves; `lowrank_input` and `lowrank_delta` must agree, or p would not cancel.

    Args:
        x: [..., C_in].
        b: [R, C_in].
    """
    work, has_dot_products = x.numel() * b.shape[0], level() in ("avx512_bf16", "amx", "emulated_tiles")
    if x.dtype != float32:
        return has_dot_products and work >= LEAST_BFLOAT16
    return level() == "avx512_bf16" and work >= LEAST_FLOAT32 and x.shape[-1] >= 512 and b.shape[0] >= 32


def declines_correction(x: Tensor, b: Tensor, ends: bool) -> str:
    """Why a correction is left to torch; `ends` says whether it has a prologue or an epilogue."""
    if forced():
        return ""
    if x.dtype != float32:
        alone = not ends and not projects(x, b) and b.shape[0] < 16
        return "the reference is as fast for a B of this size" if alone else ""
    if level() == "avx2" and b.numel() > MOST_AVX2:
        return "torch's matrix products are faster than AVX2 kernels for a B of this size"
    if not ends and not projects(x, b):
        return "torch's matrix products are faster in float32 without a prologue or an epilogue"
    return ""
