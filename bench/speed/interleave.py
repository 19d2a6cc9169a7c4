"""Sampling loops of several contenders, run in turns, and the time each one takes.

Contenders take turns step by step: all of them make step 0, then all make step 1. Whatever the machine does meanwhile then
falls on all alike. The time of a loop is put together from the median time of each kind of step (`Contender.kinds`), over all
steps and rounds of that kind, times how often it occurs.
"""

import copy
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from stepgraph.bench.speed.contenders import Contender
from stepgraph.compiler.models import family_of
from stepgraph.errors import CompileError
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.metrics import relative_l2
from stepgraph.scheduler import guided, stepped, without_variance

# What a step makes: the model's output and the latents.
Made = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TimedLoop:
    """Where every run begins, and what it is conditioned on.

    Attributes:
        scheduler: Set to its steps; copied for every run.
        noise: [B, C, H, W].
        conditioning: The model's other inputs, for all rows.
        guidance: Scale of the classifier-free guidance; 1 for none. With guidance the model's input has 2 B rows.
    """

    scheduler: Any
    noise: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    guidance: float

    def in_float64(self) -> "TimedLoop":
        """The same from the same noise, in double precision."""
        return replace(self, noise=self.noise.double())

    def run(self, predict: Callable[..., Any]) -> Generator[Made, torch.Tensor | None, None]:
        """The model's output and the latents of each step; latents that are sent are those the next step goes on from."""
        scheduler, latents = copy.deepcopy(self.scheduler), self.noise
        doubled = self.guidance > 1
        for t in scheduler.timesteps:
            rows = torch.cat([latents, latents]) if doubled else latents
            timestep = t.to(rows.device).expand(len(rows))
            predicted = output = predict(hidden_states=rows, timestep=timestep, **self.conditioning, return_dict=False)[0]
            output = guided(output.chunk(2) if doubled else [output], self.guidance)
            latents = stepped(scheduler, without_variance(output, latents.shape[1]), t, latents, {})
            sent = yield predicted, latents
            latents = latents if sent is None else sent


def loop_of(model: torch.nn.Module, scheduler: Any, steps: int, batch: int, guidance: float, seed: int = 0) -> TimedLoop:
    """A loop of `batch` rows: half of them unconditional with guidance.

    Raises:
        CompileError: Guidance with an odd number of rows.
    """
    device, config = next(model.parameters()).device, config_of(model)
    images = batch // 2 if guidance > 1 else batch
    if guidance > 1 and batch % 2:
        raise CompileError(
            f"batch is {batch}; with guidance half of the rows are unconditional: pass an even batch, or --guidance 1"
        )
    cond, uncond = family_of(model).conditioning(config, images, device)
    both = {name: torch.cat([cond[name], uncond[name]]) if guidance > 1 else cond[name] for name in cond}
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(steps)
    shape = (images, config["in_channels"], config["sample_size"], config["sample_size"])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, model_dtype(model))
    return TimedLoop(prepared, noise, both, guidance)


@dataclass
class Timed:
    """What was measured of one contender.

    Attributes:
        contender: It.
        samples: Seconds of every step of every round, by kind.
        latents: What the first round ended with.
        error: Relative L2 distance from the reference: of the latents at the end, or, on the reference's trajectory, the
            largest of the model's outputs.
    """

    contender: Contender
    samples: dict[Hashable, list[float]]
    latents: torch.Tensor | None = None
    error: float | None = None

    def seconds(self, steps: int) -> float:
        """Of its first steps: per kind the median, times how often it occurs."""
        return sum(statistics.median(self.samples[kind]) for kind in self.contender.kinds[:steps])

    def spread(self, steps: int) -> float:
        """Half the distance of the kinds' quartiles, added up as `seconds` is: what a typical step moves by."""
        halves = 0.0
        for kind in self.contender.kinds[:steps]:
            samples = sorted(self.samples[kind])
            halves += (samples[(3 * len(samples) - 1) // 4] - samples[len(samples) // 4]) / 2
        return halves


@torch.no_grad()
def take_turns(
    contenders: Sequence[Contender],
    loop: TimedLoop,
    steps: int,
    rounds: int,
    warm: int = 3,
    forced: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timed]:
    """Run the first `steps` steps of every contender's loop, `rounds` times, in turns.

    Args:
        contenders: In the order in which they take turns; every other round goes through them backwards.
        loop: Where runs begin.
        steps: Of each run.
        rounds: How many runs each has.
        warm: Steps of the run before, which is not timed. Code that compiles in its first call does so there. Executables on
            CUDA have two runs of all steps.
        forced: Every contender goes on from its reference's latents at each step, and its outputs are compared with those of
            the reference. Over a whole run of their own, rounding to 16 bits grows until runs have little in common.
        on_step: Called with (steps done, steps in all).

    Raises:
        PlanError: Other modules ran than a plan says.
        RuntimeError: Something was compiled again after it was warm.
    """
    timed = [Timed(contender, defaultdict(list)) for contender in contenders]
    total, order = rounds * steps, [contender.name for contender in contenders]
    followed = {i: order.index(c.reference) for i, c in enumerate(contenders) if c.reference in order}
    for contender in contenders:
        _warm_up(contender, loop, steps, min(warm, steps))
    for round_index in range(rounds):
        runs = [loop.run(entry.contender.start()) for entry in timed]
        places = list(range(len(timed)))[:: -1 if round_index % 2 else 1]
        sent: list[torch.Tensor | None] = [None] * len(timed)
        pairs: dict[int, Made] = {}
        for step in range(steps):
            for place in places:
                seconds, pairs[place] = _step(runs[place], sent[place], loop.noise.is_cuda)
                timed[place].samples[timed[place].contender.kinds[step]].append(seconds)
            if round_index == 0:
                for place, entry in enumerate(timed):
                    entry.latents = pairs[place][1].clone()
            if forced:
                for place, other in followed.items():
                    error = relative_l2(pairs[place][0], pairs[other][0])
                    # A NaN is never the smaller one.
                    before = timed[place].error
                    timed[place].error = error if before is None or not error <= before else before
                    sent[place] = pairs[other][1]
            on_step(round_index * steps + step + 1, total)
        for entry in timed:
            entry.contender.check(steps)
    return timed


def _warm_up(contender: Contender, loop: TimedLoop, steps: int, warm: int) -> None:
    """Run what compiles, tunes or captures in its first calls; an executable's steps are captured when they are met again."""
    captured = contender.executable is not None and loop.noise.is_cuda
    for _ in range(2 if captured else 1):
        deque(islice(loop.run(contender.start()), steps if captured else warm), maxlen=0)


def _step(run: Generator[Made, Any, None], sent: torch.Tensor | None, cuda: bool) -> tuple[float, Made]:
    with torch.compiler.set_stance("fail_on_recompile"):
        started = time.perf_counter()
        pair = run.send(sent)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, pair


def refuse_wrong_results(timed: Sequence[Timed], tolerance: float) -> None:
    """Refuse results that are too far from their reference's.

    Args:
        timed: After at least one round. Where `error` is not set yet, it becomes that of the latents.
        tolerance: The most it may be.

    Raises:
        CompileError: A result is further off, or not finite; the message names all that are.
    """
    by_name = {entry.contender.name: entry for entry in timed}
    wrong = []
    for entry in timed:
        if entry.contender.reference is None or entry.latents is None:
            continue
        reference = by_name[entry.contender.reference].latents
        if entry.error is None and reference is not None:
            entry.error = relative_l2(entry.latents, reference)
        if entry.error is None:
            raise CompileError(f"{entry.contender.reference} has not run; {entry.contender.name} cannot be checked")
        if not entry.error <= tolerance:
            wrong.append(f"{entry.contender.name} is {entry.error:.2e} from {entry.contender.reference}")
    if wrong:
        raise CompileError(f"results are off by more than {tolerance:g}, so no figure is worth printing: {'; '.join(wrong)}")
