"""Single steps of a scheduler, away from a sampling run: what they depend on, and a batch that mixes them."""

from collections.abc import Callable
from typing import Any

import torch

from stepgraph.scheduler import step_arguments, stepped
from stepgraph.tolerances import LONE_STEP


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


def remembers(prepared: Callable[[], Any], timesteps: torch.Tensor, latents: torch.Tensor) -> bool:
    """Whether a step within a run is another one than the same step on its own, as in solvers with a history.

    Args:
        prepared: Gives a scheduler that is set to its steps, anew at each call.
        timesteps: Of its evaluations, [T].
        latents: Of the right shape, of any values.
    """
    running = prepared()
    for step, t in enumerate(timesteps):
        output = torch.full_like(latents, 0.3 * (step + 1))
        moved = stepped(running, output, t, latents, step_arguments(running))
        alone = stepped(prepared(), output, t, latents, step_arguments(running))
        relative, absolute = LONE_STEP
        if not torch.allclose(moved, alone, rtol=relative, atol=absolute):
            return True
    return False
