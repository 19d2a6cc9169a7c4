"""Which tiles the low-rank kernels are compiled with: by shape, dtype and machine, pruned of what does not fit.

`lowrank_input` stores p, from which `lowrank_delta` later subtracts what it finds for the same x: for an unchanged x that must
be zero to the last bit. Both therefore add up the products in the same order: the depth of a tile (BLOCK_K) and its rows
(BLOCK_M, which decides between a device's kinds of matrix instructions) follow from the number of rows, the dtype and the
machine, and only the rest is tuned.

Left out of the tables for 16-bit dtypes was what spills registers on some target from sm_80 to gfx942 when compiled with
modulation and gate: BLOCK_M = 128, accumulators of 128 ranks and 4 warps in the single kernel, BLOCK_R = 128 with 8 warps or
a third stage, BLOCK_R = 64 with 32 rows. What does not fit a machine's shared memory is left out there. Ranks between powers
of two are padded; 96 costs what 128 does. Widths or ranks that are no multiple of 16 are loaded element by element, which is
right, but slower, and may spill.
"""

import torch

from stepgraph.triton_kernels.launch import Config, Machine, power_of_2

# The widest accumulator of the single kernel that leaves registers for the second product.
SINGLE_RANK = {2: 256, 4: 64}
# Outputs may be split over so many programs; each finds B x anew.
MAX_SPLIT = 4
MIN_BLOCK = 32


def few_rows(rows: int, machine: Machine) -> bool:
    """Whether row blocks alone, even split four ways, leave processors idle; then two kernels with smaller tiles do better."""
    return -(-rows // 64) * MAX_SPLIT < machine.processors


def row_block(rows: int, dtype: torch.dtype, machine: Machine) -> tuple[int, int]:
    """BLOCK_M and BLOCK_K of B x, the same in all kernels."""
    if dtype.itemsize == 4:
        return 32, 32
    return (32 if few_rows(rows, machine) else 64), 64


def takes_single(rows: int, ranks: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> bool:
    """Whether one kernel does both products."""
    return not few_rows(rows, machine) and max(ranks) <= SINGLE_RANK[dtype.itemsize]


def project_configs(rows: int, rank: int, dtype: torch.dtype, machine: Machine) -> list[Config]:
    """For B x alone: p, and the first of two kernels."""
    block_m, block_k = row_block(rows, dtype, machine)
    if dtype.itemsize == 4:
        table = [(32, 4, 2)]
    elif block_m == 32:
        table = [(32, 4, 4)]
    else:
        table = [(128, 4, 2), (64, 4, 3)]
    widest = max(MIN_BLOCK, power_of_2(rank))
    fitting = [
        Config.of(warps, stages, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=block_k)
        for block_r, warps, stages in table
        if block_r <= widest and _staged((block_m + block_r) * block_k * dtype.itemsize, stages, machine) <= machine.shared
    ]
    return fitting or [Config.of(4, 2, BLOCK_M=block_m, BLOCK_R=MIN_BLOCK, BLOCK_K=block_k)]


def expand_configs(rows: int, dtype: torch.dtype, machine: Machine) -> list[Config]:
    """For y + A t, the second of two kernels."""
    if dtype.itemsize == 4:
        return [Config.of(4, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32)]
    if few_rows(rows, machine):
        return [Config.of(4, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64), Config.of(4, 2, BLOCK_M=32, BLOCK_N=128, BLOCK_K=64)]
    return [Config.of(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64), Config.of(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)]


def single_configs(rows: int, ranks: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> list[Config]:
    """For both products in one kernel, with the number of programs (SPLITS) that share the outputs of a row block."""
    block_m, block_k = row_block(rows, dtype, machine)
    rank = max(MIN_BLOCK, power_of_2(max(ranks)))
    if dtype.itemsize == 4:
        table = [(32, 4, 2)]
    elif rank <= 64:
        table = [(64, 4, 3), (128, 8, 3)]
    elif rank == 128:
        table = [(64, 8, 3), (128, 8, 3)]
    else:
        table = [(64, 8, 2)]
    spare = machine.processors // (-(-rows // block_m) * len(ranks))
    splits = [1] if spare < 2 else [2, 4, 1] if spare >= MAX_SPLIT else [2, 1]

    def shared(block_n: int, stages: int) -> int:
        first = _staged((block_m + rank) * block_k * dtype.itemsize, stages, machine)
        # Results change their layout through shared memory, in float32, before they are stored.
        return max(first, _staged(rank * block_n * dtype.itemsize, stages, machine) + block_m * block_n * 4)

    fitting = [
        Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLITS=split)
        for block_n, warps, stages in table
        for split in splits
        if shared(block_n, stages) <= machine.shared
    ]
    return fitting or [Config.of(8, 1, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=block_k, SPLITS=splits[0])]


def _staged(tiles: int, stages: int, machine: Machine) -> int:
    """Bytes of shared memory of pipelined tiles; AMD's pipeline keeps one stage in registers."""
    return tiles * (stages - 1 if machine.hip else stages)
