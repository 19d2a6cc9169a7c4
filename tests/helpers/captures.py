"""Plans that are captured, on a CUDA device or on a tape that stands for its graphs."""

from dataclasses import replace

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.devices import count_as_accelerator
from helpers.tape import Tape
from helpers.tiny import NULL_CLASS, labels, noise
from stepgraph.runtime.capture import cudagraph
from stepgraph.runtime.capture.captured import Captured

STEPS = 6
REUSED = {"attn": "CRCRCR", "ff": "CRRRCC", "hidden": "CCCCCR"}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
EACH_UPDATE = pytest.mark.parametrize(
    ("name", "guidance", "scale"),
    [
        ("ddim", "none", 1.0), ("ddim", "batched", 3.0), ("euler", "separate", 3.0), ("flow", "batched", 3.0),
        ("dpm++", "none", 1.0), ("dpm++", "separate", 3.0),
    ],
)  # fmt: skip


@pytest.fixture(autouse=True)
def tape(monkeypatch) -> list[Tape]:
    """Every tape that is made."""
    made: list[Tape] = []

    def recorder(device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", recorder)
    return made


@pytest.fixture
def accelerator(monkeypatch) -> None:
    """The CPU counts as one: with the tape, graphs are what happens without a wish."""
    count_as_accelerator(monkeypatch)


def planned(dit, scheduler, actions=REUSED, guidance="none") -> sg.CachePlan:
    return sg.make_plan("manual", model=dit, scheduler=scheduler, steps=STEPS, actions=actions, guidance=guidance)


def two_prompts(exe, scheduler, scale=1.0, **options) -> list[torch.Tensor]:
    """Two noises under two prompts, one after the other, and the first again."""
    weight = next(exe.model.parameters())
    null = {"negative_class_labels": torch.tensor([NULL_CLASS] * 2, device=weight.device)} if scale > 1 else {}
    latents = []
    for seed, classes in ((0, (1, 2)), (1, (3, 4)), (0, (1, 2))):
        conditioning = {"class_labels": labels(*classes)["class_labels"].to(weight.device), **null}
        latents.append(sg.sample(exe, scheduler, noise(2, seed).to(weight), scale, **conditioning, **options))
    return latents


def with_calls(exe, change) -> sg.Executable:
    """The executable with something around the calls of its variants."""
    program = exe.default
    variants = tuple(replace(variant, run=change(variant.run)) for variant in program.variants)
    changed = replace(program, variants=variants)
    return replace(exe, _default=changed, _programs=dict.fromkeys(exe._programs, changed), captured=Captured())
