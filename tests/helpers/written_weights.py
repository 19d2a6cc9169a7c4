"""Ways in which weights change after compiling, and runs before and after."""

import copy
from functools import cache

import diffusers
import safetensors.torch
import torch
from torch import nn

import stepgraph as sg
from helpers.captures import tape  # noqa: F401 (a fixture)
from helpers.distance import error
from helpers.tiny import inputs, labels, noise, tiny_dit
from stepgraph.tolerances import WHOLE_RUN, tolerance

STEPS, DDIM = 3, diffusers.DDIMScheduler(clip_sample=False)
# The same tensors in all runs, so that what is kept of the conditioning stays.
GIVEN = labels(1, 2)


def linears(model) -> list[nn.Linear]:
    return [linear for block in model.transformer_blocks for linear in (block.attn1.to_q, block.attn1.to_v, block.norm1.linear)]


def add_lora(model, sign: int = 1, scale: float = 0.05, rank: int = 4) -> None:
    """Fuse a LoRA as peft does: factors of the size that training leaves them in."""
    generator = torch.Generator().manual_seed(5)
    for linear in linears(model):
        rows, columns = linear.weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, rank, generator=generator) * 0.1
        linear.weight.data += (sign * scale * up @ down).to(linear.weight.dtype)


def average(model) -> None:
    """One step of an exponential moving average at .99."""
    other = tiny_dit(seed=9)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data.mul_(0.99).add_(theirs.data.to(ours.dtype), alpha=0.01)


def load(model) -> None:
    model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()})


def assign(model) -> None:
    model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()}, assign=True)


def load_file(model, folder) -> None:
    file = folder / "weights.safetensors"
    safetensors.torch.save_file({name: tensor.to(model.dtype) for name, tensor in tiny_dit(seed=9).state_dict().items()}, file)
    safetensors.torch.load_model(model, file, strict=False)


def train(model) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = inputs(2)
    model(
        given["hidden_states"].to(model.dtype), timestep=given["timestep"], class_labels=given["class_labels"]
    ).sample.mean().backward()
    optimizer.step()
    model.requires_grad_(False)


def write_without_versions(model) -> None:
    with torch.inference_mode():
        for linear in linears(model):
            linear.weight.mul_(1.5)


def write_data(model) -> None:
    for linear in linears(model):
        linear.weight.data.mul_(1.5)


# What moves no version counter, so that contents alone tell.
UNCOUNTED = {"lora": add_lora, "average": average, "data": write_data}
CHANGES = UNCOUNTED | {
    "unfused": lambda model: add_lora(model, -1), "load": load, "assign": assign, "train": train,
    "inference": write_without_versions,
}  # fmt: skip
WAYS = {
    "exact": {"backend": "eager", "exact": True},
    "packed": {"backend": "inductor"},
    "hoisted": {"backend": "eager"},
    "captured": {"backend": "eager", "cuda_graphs": True},
}


def compiled(model, actions=None, **options) -> sg.Executable:
    """A plan that reuses nothing, or what `actions` say."""
    policy = {"policy": "manual", "actions": actions} if actions else {"policy": "full"}
    plan = sg.make_plan(model=model, scheduler=DDIM, steps=STEPS, **policy)
    given = inputs(2)
    given["hidden_states"] = given["hidden_states"].to(model.dtype)
    return sg.compile(model, plan, given, **({"backend": "eager"} | options))


def sampled(runner, dtype=torch.float32) -> torch.Tensor:
    return sg.sample(runner, DDIM, noise(2).to(dtype), steps=STEPS, **GIVEN)


def assert_follows(model, exe, change) -> None:
    before = sampled(exe, model.dtype)
    change(model)
    got, wanted = sampled(exe, model.dtype), sampled(model, model.dtype)
    assert not torch.equal(got, before)
    close = 0.0 if exe.config.exact else tolerance(WHOLE_RUN, model.dtype)
    assert error(got, wanted) <= close


@cache
def followed(way: str) -> tuple[nn.Module, sg.Executable, dict[str, torch.Tensor]]:
    """A model, its executable, and what its weights were, for all tests that change them."""
    model = tiny_dit()
    return model, compiled(model, **WAYS[way]), copy.deepcopy(model.state_dict())


def numbers(model) -> sg.Executable:
    """A plan with coefficients that nobody accounts for, as a fit leaves them."""
    plan = sg.make_plan("interval", model=model, scheduler=DDIM, steps=STEPS, every=2)
    plan = sg.forecast(plan, order=0)
    return sg.compile(model, plan.with_header(arguments={}), inputs(2), backend="eager")


def choice(model, **options) -> sg.Executable:
    stats = sg.calibrate(model, DDIM, steps=STEPS, samples=1)
    plan = sg.make_plan("smoothcache", stats, alpha=0.5)
    return sg.compile(model, plan, inputs(2), backend="eager", **options)
