"""How many kernels a run launches, and which of them take its time."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 15


def launches(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """What the profiler sees of a run: kernels on CUDA, also those of graphs; on a CPU torch's operations.

    Returns:
        `launches_per_step`, `device_us_per_step`, and in `kernels` those that take longest, with calls and microseconds a step.
    """
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in seen.events():
        inside = event.cpu_parent is not None if not cuda else event.device_type != DeviceType.CUDA
        if not inside:
            calls[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
    longest = sorted(microseconds, key=lambda name: -microseconds[name])[:MOST]
    return {
        "launches_per_step": sum(calls.values()) / steps,
        "device_us_per_step": sum(microseconds.values()) / steps,
        "kernels": [
            {"name": name[:120], "calls_per_step": calls[name] / steps, "us_per_step": microseconds[name] / steps}
            for name in longest
        ],
    }
