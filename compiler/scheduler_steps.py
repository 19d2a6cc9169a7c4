"""Single steps of a scheduler, away from a sampling run: what they depend on, and a batch that mixes them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from stepgraph.plan import PlanError
from stepgraph.runtime.sampler import prepare_scheduler


def step_alone(scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """One step of a scheduler without a past; it is changed by that, so pass a copy."""
    stochastic = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    moved: torch.Tensor = scheduler.step(output, timestep, latents, **stochastic, return_dict=False)[0]
    return moved


def by_step(
    own: torch.Tensor,
    value: torch.Tensor,
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Apply (timestep, samples) -> samples to the samples of each step together.

    Args:
        own: Step of each sample, [B] int64.
        value: [B, ...].
        apply: Called once for every step that occurs.
        timesteps: The schedule, [T].
    """
    steps = own.unique()
    parts = [(own == step).nonzero().flatten().to(value.device) for step in steps]
    done = torch.cat([apply(timesteps[step], value[part]) for step, part in zip(steps, parts, strict=True)])
    result = torch.empty_like(done)
    result[torch.cat(parts)] = done
    return result


def remembers(scheduler: Any, steps: int, latents: torch.Tensor) -> bool:
    """Whether a step within a run is another one than the same step on its own, as in solvers with a history."""
    running = prepare_scheduler(scheduler, steps, latents.device)
    for number, t in enumerate(running.timesteps):
        output = torch.full_like(latents, 0.3 * (number + 1))
        moved = step_alone(running, output, t, latents)
        alone = step_alone(prepare_scheduler(scheduler, steps, latents.device), output, t, latents)
        if not torch.allclose(moved, alone, rtol=1e-5, atol=1e-6):
            return True
    return False


def refuse_random(scheduler: Any, steps: int, latents: torch.Tensor) -> None:
    """Refuse a scheduler whose step draws noise.

    Raises:
        PlanError: The first step from the same latents gave two results.
    """
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(seed)
            own = prepare_scheduler(scheduler, steps, latents.device)
            results.append(step_alone(own, torch.full_like(latents, 0.3), own.timesteps[0], latents))
    if not torch.equal(*results):
        raise PlanError(
            f"{type(scheduler).__name__} draws noise in its steps, so the routers would be trained on other states than those "
            f"that are sampled; train with a deterministic scheduler, such as DDIM with eta 0"
        )
