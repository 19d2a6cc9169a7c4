"""One call of a pipeline, whose first step is computed: what it gives its transformer, and how it sets its scheduler."""

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.checked import checked
from stepgraph.checks import check_numbers, shown
from stepgraph.errors import ArgumentError, CompileError, PlanError
from stepgraph.inputs import flat_inputs, latents_key, latents_of
from stepgraph.runtime.attach.call import Call
from stepgraph.runtime.attach.forward_stand_in import ForwardStandIn
from stepgraph.runtime.attach.run_timesteps import read_timestep
from stepgraph.runtime.program.facts import StandIn
from stepgraph.schedule import Schedule, TimestepInput, known_timestep
from stepgraph.scheduler import prepare_scheduler

# What pipelines of diffusers make of a scheduler's timestep, the usual ways first.
UNITS: tuple[tuple[str, ...], ...] = ((), ("/1000",), ("1000-", "/1000"), ("/1000", "1-"), ("*0.001",), ("1000-",), ("1-",))
CASTS: tuple[tuple[str, ...], ...] = ((), ("cast",))
# A cast comes before the arithmetic in most.
WAYS = tuple(dict.fromkeys((*before, *unit, *after) for unit in UNITS for after, before in product(CASTS, CASTS)))
# Of `set_timesteps`: what says the steps, what a plan's schedule holds, and where the timesteps lie.
STEPS, HELD, PLACE = "num_inference_steps", ("sigmas", "timesteps", "mu"), "device"
CALLBACKS = ("callback", "callback_on_step_end")


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """What a pipeline's own call showed of itself.

    Attributes:
        inputs: Of every call of the transformer within a step, in order, the forward's arguments that were given, the latents
            first; the tensors are copies.
        branches: What the pipeline calls these calls (diffusers' `cache_context`), empty where it names them not.
        steps: Number of inference steps.
        schedule: What the scheduler was set with beside it, and the evaluation with which the run begins.
        timestep: What the transformer is given of the scheduler's timestep.
    """

    inputs: tuple[Mapping[str, Any], ...]
    branches: tuple[str, ...]
    steps: int
    schedule: Schedule
    timestep: TimestepInput

    @property
    def guidance(self) -> str:
        """As plans name it: "separate" where a step has two calls, "batched" where it has one.

        Raises:
            PlanError: It has more, which no plan has, or the two take other arguments.
        """
        if len(self.inputs) > 2:
            raise PlanError(
                f"a step has {len(self.inputs)} calls of the transformer ({', '.join(self.branches)}); plans have one, or two "
                f"of guidance: call the pipeline without further guidance"
            )
        for inputs in self.inputs[1:]:
            first, call = (Call.of(given, latents_key(given)) for given in (self.inputs[0], inputs))
            one_only = sorted(set(flat_inputs(first.inputs)) ^ set(flat_inputs(call.inputs)))
            if one_only or not call.differs_in_sizes_only(first.signature):
                what = f"{one_only[0]} is given in one of them only" if one_only else call.difference(first.signature)
                raise PlanError(
                    f"a step has two calls of the transformer that do not differ in sizes and values alone: {what}; plans have "
                    f"two calls of one make: call the pipeline so that both take the same arguments"
                )
        return "separate" if len(self.inputs) == 2 else "batched"


@checked
def watch(pipe: Any, /, **call: Any) -> WatchedCall:
    """Run a pipeline's own call, and learn from it how the pipeline calls its transformer.

    The first step is computed, by the eager model. At the others the transformer answers what it did at the first, so that they
    cost nothing and show their timesteps; behind the last of them the call is broken off. Scheduler, pipeline, generators and
    random state are as before, also where the call fails. Callbacks of the call are left out.

    Args:
        pipe: A diffusers pipeline with a transformer.
        **call: What it is called with.

    Raises:
        ArgumentError: It does not take these arguments; what it says of their values itself passes unchanged.
        CompileError: It has no transformer or scheduler, never calls the transformer, sets its scheduler in a way that no plan
            can state, or has an executable attached.
        PlanError: What it gives as the timestep is none of the ways that are known.
    """
    transformer, scheduler = getattr(pipe, "transformer", None), getattr(pipe, "scheduler", None)
    kind = type(pipe).__name__
    if not isinstance(transformer, nn.Module):
        raise CompileError(f"{kind} has no transformer to watch{about_unet(pipe)}")
    if not callable(getattr(scheduler, "set_timesteps", None)) or not hasattr(scheduler, "__dict__"):
        raise CompileError(f"the scheduler of {kind} is {scheduler!r:.200}; expected a diffusers scheduler")
    if isinstance(transformer.__dict__.get("forward"), StandIn):
        raise CompileError("an executable is attached to the pipeline's transformer; detach it before watching a call")
    recorder = _Recorder(transformer, scheduler)
    given = {name: value for name, value in call.items() if name not in CALLBACKS}
    try:
        inspect.signature(pipe).bind(**given)
    except TypeError as error:
        raise ArgumentError(f"{kind} cannot be called with {', '.join(given) or 'nothing'}: {error}") from error
    with _as_before(pipe, scheduler, given):
        try:
            with recorder.in_place(transformer):
                pipe(**given)
        except _SeenEnough as seen:
            # Which may come from another watch, around this one.
            if seen.by is not recorder:
                raise
        return recorder.watched(kind)


def about_unet(pipe: Any) -> str:
    """What to say beside "it has no transformer"; empty where it has no U-Net either."""
    return "; plans are for transformers, and U-Nets are what DeepCache caches" if hasattr(pipe, "unet") else ""


class _SeenEnough(BaseException):
    """Breaks a pipeline's call off; no `except Exception` of a pipeline stops it."""

    def __init__(self, by: "_Recorder") -> None:
        super().__init__("a watched call of a pipeline is broken off")
        self.by = by


class _Recorder(ForwardStandIn):
    """Stands in for a transformer's forward, and for two methods of the scheduler, during one call of a pipeline."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__(transformer)
        self._scheduler, self._known = scheduler, known_timestep(transformer)
        self._calls: list[Call] = []
        self._branches: list[str] = []
        # Of the first call of each step behind the first one, and what the calls of that returned.
        self._later: list[Any] = []
        self._returned: list[Any] = []
        self._steps = 0
        self._set: dict[str, Any] | None = None
        self._timesteps: torch.Tensor | None = None
        self._begin: int | None = None
        self._number, self._branch = 0, ""

    @contextmanager
    def in_place(self, transformer: nn.Module) -> Iterator[None]:
        """Stand in, and give way again."""
        with ExitStack() as stack:
            stack.enter_context(_attributes(transformer, forward=self, _compiled_call_impl=None))
            context = getattr(transformer, "cache_context", None)
            if callable(context):
                stack.enter_context(_attributes(transformer, cache_context=self._named(context)))
            watched = {
                "set_timesteps": self._set_timesteps(self._scheduler.set_timesteps),
                "step": self._step(self._scheduler.step),
            }
            stack.enter_context(_attributes(self._scheduler, **watched))
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward."""
        call = self.call_of(*args, **kwargs)
        if self._steps:
            return self._answered_again(call)
        if not self._calls:
            self._timesteps = self._scheduler.timesteps
            self._begin = getattr(self._scheduler, "begin_index", None)
        self._calls.append(Call(_copied(call.inputs), call.latents, call.signature))
        self._branches.append(self._branch)
        self._returned.append(self.own_forward()(*args, **kwargs))
        return self._returned[-1]

    def _answered_again(self, call: Call) -> Any:
        """What the same call of the first step returned; a step with other calls is the last that is looked at."""
        if not self._number:
            self._later.append(copy.deepcopy(call.timestep))
        number, self._number = self._number, self._number + 1
        if number >= len(self._calls) or call.signature != self._calls[number].signature:
            raise _SeenEnough(self)
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._returned[number])

    def _named(self, context: Callable[..., Any]) -> Callable[..., Any]:
        """`cache_context`, whose name is noted."""

        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self._branch = self._branch, name
            try:
                with context(name, *args, **kwargs):
                    yield
            finally:
                self._branch = before

        return named

    def _set_timesteps(self, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            outcome = method(*args, **kwargs)
            if not self._calls:
                self._set = dict(signature.bind(*args, **kwargs).arguments)
                self._set |= self._set.pop("kwargs", {})
            return outcome

        # Pipelines ask which arguments there are.
        set_timesteps.__signature__ = signature  # type: ignore[attr-defined]
        return set_timesteps

    def _step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        def step(*args: Any, **kwargs: Any) -> Any:
            outcome = method(*args, **kwargs)
            if self._timesteps is not None:
                self._steps, self._number = self._steps + 1, 0
                if self._steps == len(self._timesteps) - (self._begin or 0):
                    raise _SeenEnough(self)
            return outcome

        step.__signature__ = signature  # type: ignore[attr-defined]
        return step

    def watched(self, kind: str) -> WatchedCall:
        """What was seen.

        Raises:
            CompileError: See `watch`; so is the next.
            PlanError: Likewise.
        """
        if not self._calls or self._timesteps is None:
            raise CompileError(f"the call of {kind} never called its transformer")
        if self._set is None:
            raise CompileError(f"{kind} called its transformer before its scheduler's set_timesteps, which begins a run")
        if not self._steps:
            raise CompileError(f"{kind} called its transformer {len(self._calls)} times, and never its scheduler's step")
        schedule, steps = _schedule(kind, self._set)
        prepared = prepare_scheduler(self._scheduler, steps, self._timesteps.device, schedule)
        if not torch.equal(prepared.timesteps, self._timesteps):
            raise CompileError(
                f"{kind} runs on the timesteps {shown(self._timesteps.tolist())}, which set_timesteps with {steps} steps and "
                f"{schedule} does not give; no plan can state them"
            )
        first = self._calls[0].timestep
        asked = [read_timestep(value) for value in (first, *self._later)]
        latents = latents_of(_ordered(self._calls[0]))
        dtype = latents[0].dtype if isinstance(latents, (list, tuple)) else latents.dtype
        ways = WAYS if self._known is None else (self._known.operations, *WAYS)
        begin, convert = _place(kind, self._timesteps, self._begin, asked, first, dtype, ways)
        schedule = replace(schedule, begin=begin)
        return WatchedCall(tuple(map(_ordered, self._calls)), tuple(self._branches), steps, schedule, convert)


def _ordered(call: Call) -> dict[str, Any]:
    """A call's arguments, the latents first; how the result is returned is none of them."""
    rest = {n: value for n, value in call.inputs.items() if value is not None and n not in (call.latents, "return_dict")}
    return {call.latents: call.inputs[call.latents], **rest}


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), dict(inputs))
    return copied


def _schedule(kind: str, arguments: Mapping[str, Any]) -> tuple[Schedule, int]:
    """What `set_timesteps` was given, and the number of steps that it means.

    Raises:
        CompileError: It was given something that plans do not know.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name not in (STEPS, PLACE)}
    other = sorted(set(given) - set(HELD))
    if other:
        raise CompileError(f"{kind} sets its scheduler with {other[0]}={shown(given[other[0]])}, which no plan can state")
    sigmas, timesteps = (tuple(check_numbers(name, given[name])) if name in given else () for name in HELD[:2])
    schedule = Schedule(sigmas, timesteps, None if given.get("mu") is None else float(given["mu"]))
    return schedule, int(arguments.get(STEPS) or len(schedule.sigmas or schedule.timesteps))


def _place(
    kind: str,
    timesteps: torch.Tensor,
    begin: int | None,
    asked: list[float],
    given: Any,
    dtype: torch.dtype,
    ways: Sequence[tuple[str, ...]],
) -> tuple[int, TimestepInput]:
    """The evaluation with which a run begins, and what is made of the timesteps from there on.

    Args:
        kind: The pipeline, in words.
        timesteps: The scheduler's, [T].
        begin: The evaluation by the scheduler's own word, where it has one.
        asked: What the transformer was given at each step that was seen.
        given: The same of the first, as it was given.
        dtype: The latents'.
        ways: Conversions, the likeliest first.

    Raises:
        PlanError: No way that is known leads from the one to the other.
    """
    places = range(len(timesteps) - len(asked) + 1) if begin is None else [begin]
    wanted = torch.tensor(asked, dtype=torch.float64)
    matches = []
    for place, (rank, way) in product(places, enumerate(ways)):
        made = TimestepInput(way)(timesteps[place : place + len(asked)], dtype)
        if torch.equal(made.double().cpu(), wanted):
            other_dtype = isinstance(given, torch.Tensor) and made.dtype != given.dtype
            matches.append((other_dtype, rank, place, way))
    if not matches:
        there = shown(timesteps[: len(asked)][:4].tolist())
        raise PlanError(
            f"{kind} gives its transformer the timesteps {shown(asked[:4])}, ... where the scheduler has {there}, ...; no "
            f"known conversion leads there: pass timestep= to make_plan, or run a session step by step"
        )
    *_, place, way = min(matches, key=lambda match: match[:3])
    return place, TimestepInput(way)


@contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object attributes of its own, and take them back."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)


class _Attributes:
    """The attributes that an object has now: the very same ones, and what their lists and dicts hold."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._attributes = owner, dict(vars(owner))
        self._contents = [(value, copy.copy(value)) for value in self._attributes.values() if type(value) in (list, dict)]

    def put_back(self) -> None:
        """Give the object these, and no others."""
        vars(self._owner).clear()
        vars(self._owner).update(self._attributes)
        for value, held in self._contents:
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)


@contextmanager
def _as_before(pipe: Any, scheduler: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """Leave a pipeline, its scheduler, generators and the random state as they are now."""
    generators = [leaf for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    kept = [_Attributes(owner) for owner in (pipe, scheduler)]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            for attributes in kept:
                attributes.put_back()
            if callable(getattr(pipe, "maybe_free_model_hooks", None)):
                pipe.maybe_free_model_hooks()
