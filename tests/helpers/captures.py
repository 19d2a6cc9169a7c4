"""Plans that are captured, on a tape that stands for CUDA graphs."""

from dataclasses import replace

import pytest
import torch

import stepgraph as sg
from helpers.tape import Tape
from stepgraph.runtime.capture import cudagraph
from stepgraph.runtime.capture.captured import Captured

STEPS = 6


REUSED = {"attn": "CRCRCR", "ff": "CRRRCC", "hidden": "CCCCCR"}


@pytest.fixture(autouse=True)
def tape(monkeypatch) -> list[Tape]:
    """Every tape that is made."""
    made: list[Tape] = []

    def recorder(device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", recorder)
    return made


def planned(dit, scheduler, actions=REUSED, guidance="none") -> sg.CachePlan:
    return sg.make_plan("manual", model=dit, scheduler=scheduler, steps=STEPS, actions=actions, guidance=guidance)


def with_calls(exe, change) -> sg.Executable:
    """The executable with something around the calls of its variants."""
    program = exe.default
    variants = tuple(replace(variant, run=change(variant.run)) for variant in program.variants)
    changed = replace(program, variants=variants)
    return replace(exe, default=changed, _programs=dict.fromkeys(exe._programs, changed), captured=Captured())
