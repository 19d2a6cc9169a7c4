"""What devices say of themselves, for kernels that choose by it where there is none."""

from types import SimpleNamespace
from unittest import mock

import torch

KB, GB = 1024, 2**30


def sheet(name, capability, processors, shared, l2, memory):
    """What `torch.cuda.get_device_properties` gives."""
    return SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, L2_cache_size=l2 * 2**20,
        shared_memory_per_block_optin=shared * KB, shared_memory_per_block=48 * KB, total_memory=memory * GB, warp_size=32,
        shared_memory_per_multiprocessor=(shared + 1) * KB, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, gcnArchName="",
    )  # fmt: skip


# The SXM cards, as their makers' sheets and the driver have them.
SHEETS = {
    "A100": sheet("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163, 40, 80),
    "H100": sheet("NVIDIA H100 80GB HBM3", (9, 0), 132, 227, 50, 80),
    "H200": sheet("NVIDIA H200", (9, 0), 132, 227, 50, 141),
}


def machine_of(card: str):
    """What kernels choose by on a card of this name."""
    from stepgraph.triton_kernels.launch import machine

    with mock.patch.object(torch.cuda, "get_device_properties", return_value=SHEETS[card]):
        return machine.__wrapped__(torch.device("cuda", 0))
