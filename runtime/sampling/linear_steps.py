"""What a scheduler's steps are made of: probed on the scheduler itself, once, before the loop."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepgraph.env import get_logger
from stepgraph.fingerprint import config_of
from stepgraph.scheduler import run_timesteps, scaled_input, stepped
from stepgraph.tolerances import LINEAR_STEP

# Terms below this share of a step's largest are rounding of what cancels.
NEGLIGIBLE = 1e-12
# How many random values of each size the combinations are checked on; the large ones are clipped where anything is.
CHECKED, SIZES = 64, (1.0, 1e4)
CHANNELS = 4
# What was found, by what it can depend on, and for how many schedulers.
KEPT = 32
_found: "dict[tuple[Any, ...], LinearSteps | str]" = {}


@dataclass(frozen=True)
class Term:
    """A part of a step's linear combination.

    Attributes:
        age: How many steps ago the value was there; 0 is this step.
        output: Whether it is that step's model output (after guidance), or the latents it began with.
        weight: What it is multiplied with.
    """

    age: int
    output: bool
    weight: float


@dataclass(frozen=True)
class LinearSteps:
    """A scheduler whose every step is a fixed linear combination of latents and model outputs, of this and earlier steps.

    Attributes:
        scales: Per step, what `scale_model_input` multiplies the latents with.
        terms: Per step, the combination that gives the next step's latents.
    """

    scales: tuple[float, ...]
    terms: tuple[tuple[Term, ...], ...]


def linear_steps(scheduler: Any, arguments: Mapping[str, float], begin: int = 0) -> LinearSteps | str:
    """The combinations of a scheduler that has been set to its steps; the reason where it has none.

    Every step's latents and output are lanes of one float64 tensor, a unit vector each, so that one run of the scheduler gives
    all coefficients, those of earlier steps included. Random lanes beside them, small and large, check that the steps are these
    combinations: noise, clipping and thresholding are not.

    Args:
        scheduler: Before its first step; not changed. What is found is kept by its class, settings and tables.
        arguments: Of its step, beside output, timestep, latents and `return_dict`.
        begin: The evaluation with which the run begins.
    """
    key = (scheduler_state(scheduler), tuple(sorted(arguments.items())), begin)
    if key not in _found:
        # The oldest makes room.
        for old in list(_found)[: max(0, len(_found) + 1 - KEPT)]:
            _found.pop(old, None)
        _found[key] = _result(scheduler, dict(arguments), begin)
    return _found[key]


def scheduler_state(scheduler: Any) -> tuple[Any, ...]:
    """Class and attributes by value, so that a table or a shift that was set by hand counts."""

    def by_value(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().double().cpu().numpy()
        return (value.shape, value.tobytes()) if hasattr(value, "tobytes") else repr(value)

    return (type(scheduler), *((name, by_value(value)) for name, value in sorted(vars(scheduler).items())))


class _InFloat64(TorchFunctionMode):
    """float64 values stay so where a scheduler asks for float32, whose rounding would be larger than what is looked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function."""
        result = func(*args, **(kwargs or {}))
        narrowed = func in (Tensor.to, Tensor.float) and args[0].dtype == torch.float64 and result.dtype == torch.float32
        return args[0] if narrowed else result


def _result(scheduler: Any, arguments: dict[str, float], begin: int) -> LinearSteps | str:
    """Probe a scheduler, and say so if that leads nowhere."""
    steps: LinearSteps | str
    try:
        # A scheduler that draws noise must leave the caller's generator alone.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _InFloat64():
            steps = _probed(_on_cpu(scheduler), arguments, begin)
    except (TypeError, IndexError, AttributeError, ValueError, RuntimeError, ImportError) as error:
        steps = f"{type(scheduler).__name__} does not step in float64 on the CPU ({type(error).__name__}: {error})"
    if isinstance(steps, str):
        get_logger("sampler").info("the scheduler's own step runs: %s", steps)
    return steps


def _on_cpu(scheduler: Any) -> Any:
    """A copy with its tables on the CPU."""
    on_cpu = copy.deepcopy(scheduler)
    for name, value in vars(on_cpu).items():
        if isinstance(value, Tensor):
            setattr(on_cpu, name, value.cpu())
    return on_cpu


def _probed(scheduler: Any, arguments: dict[str, float], begin: int) -> LinearSteps | str:
    """See `linear_steps`; the scheduler is stepped through."""
    timesteps, generator = run_timesteps(scheduler, begin), torch.get_rng_state()
    steps = len(timesteps)
    lanes = _lanes(steps)  # [2, T, lanes]
    scaled, moved = torch.empty_like(lanes)
    for step, t in enumerate(timesteps):
        latents, output = lanes[:, step].view(2, 1, CHANNELS, -1, 1)
        scaled[step] = scaled_input(scheduler, latents, t).flatten()
        moved[step] = stepped(scheduler, output, t, latents, arguments).flatten()
    weights, scales = moved[:, : 2 * steps], scaled[:, :steps].diagonal()
    only_scaled = torch.cat([scales.diag(), torch.zeros_like(scales.diag())], dim=1)
    wrong = _differ(moved, weights, lanes) | _differ(scaled, only_scaled, lanes)
    if wrong.any():
        return (
            f"step {int(wrong.nonzero()[0])} of {type(scheduler).__name__} is no fixed linear combination of latents and model "
            f"outputs; {_cause(scheduler, arguments, not torch.equal(generator, torch.get_rng_state()))}"
        )
    return LinearSteps(tuple(scales.tolist()), tuple(_terms(step, row) for step, row in enumerate(weights.tolist())))


def _lanes(steps: int) -> Tensor:
    """Latents and outputs [2, T, 2 T + random lanes] float64: a lane of its own for each of them, then random values."""
    generator = torch.Generator().manual_seed(0)
    units = torch.eye(2 * steps, dtype=torch.float64, device="cpu").view(2, steps, 2 * steps)
    kinds = [torch.randn(2, steps, CHECKED, generator=generator, dtype=torch.float64, device="cpu") * size for size in SIZES]
    # As many lanes as fill the channels.
    rest = units.new_zeros(2, steps, -(2 * steps) % CHANNELS)
    return torch.cat([units, *kinds, rest], dim=2)


def _differ(found: Tensor, weights: Tensor, given: Tensor) -> Tensor:
    """Which steps' random lanes [T, lanes] are not what the weights [T, 2 T] make of the given values; [T] bool."""
    random = slice(weights.shape[1], None)
    values = given[:, :, random].flatten(0, 1)
    error = (found[:, random] - weights @ values).abs()
    # Not the other way round, for NaN.
    return ~(error <= LINEAR_STEP * (weights.abs() @ values.abs())).all(dim=1)


def _cause(scheduler: Any, arguments: dict[str, float], drawn: bool) -> str:
    """What a step that is not linear is likely due to.

    Args:
        scheduler: It.
        arguments: Of its step.
        drawn: Whether random numbers were drawn.
    """
    settings = config_of(scheduler) | arguments
    guesses = [f"set with {name}={settings[name]}" for name in ("clip_sample", "thresholding", "eta") if settings.get(name)]
    if drawn:
        guesses.append("it draws random numbers, as ancestral samplers do")
    return ", ".join(guesses) or "it clips, or is of a kind of its own"


def _terms(step: int, weights: list[float]) -> tuple[Term, ...]:
    """The terms of a step that matter, latents before outputs and the latest first."""
    least = NEGLIGIBLE * max(map(abs, weights))
    count = len(weights) // 2
    parts = (
        (weights[output * count + earlier], output, earlier) for output in (False, True) for earlier in range(step, -1, -1)
    )
    return tuple(Term(step - earlier, output, weight) for weight, output, earlier in parts if abs(weight) > least)
