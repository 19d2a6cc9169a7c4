"""The one-line use: calibrate, plan, compile and attach, with what is already on disk."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from stepgraph.checked import checked
from stepgraph.compiler.calibration.calibrate import calibrate_traced, digest
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.entry.make_plan import plan_traced, runs_model
from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.marking.describe import make_header
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.compiler.planning.list_policies import describe_policy
from stepgraph.compiler.policies import POLICIES
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger, read_env
from stepgraph.errors import ArgumentError, CompileError, PlanError
from stepgraph.files.whole_file import writable_folder
from stepgraph.fingerprint import config_of
from stepgraph.plan import CachePlan
from stepgraph.runtime.attach.watch_call import about_unet, watch
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.program.stated_facts import stated_facts
from stepgraph.schedule import Schedule, counted_steps
from stepgraph.scheduler import refuse_stochastic
from stepgraph.wrapped_models import unwrapped

T = TypeVar("T", CachePlan, CalibrationStats)


@checked
def accelerate(
    pipe: Any,
    steps: int | None = None,
    policy: str = "interval",
    arguments: Mapping[str, Any] | None = None,
    *,
    samples: int | None = None,
    seed: int | None = None,
    guidance_scale: float | None = None,
    conditioning: Mapping[str, Any] | None = None,
    allow_stochastic: bool = False,
    batch: int = 2,
    backend: str = "inductor",
    exact: bool = False,
    cache: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    **more: Any,
) -> Executable:
    """Calibrate a pipeline's transformer under its scheduler, make a plan, compile it and attach it.

    With `call`, the pipeline's own call is watched (`stepgraph.watch`), which computes its first step, and says what the
    transformer is given and how the scheduler is set: so any pipeline with one transformer is accelerated, also one whose class
    no adapter knows.

    Statistics and plans are kept in a folder and found again there for the same model, weights, scheduler, steps and arguments.

    Args:
        pipe: A diffusers pipeline with a transformer.
        steps: The `num_inference_steps` it will be called with; 50, or as many as the schedule has sigmas or timesteps, unless
            given.
        policy: Name of a policy; the model is calibrated where the policy needs it.
        arguments: The policy's own.
        samples: Sampling runs of the calibration, or of a policy's own fit; 16 unless given.
        seed: Of their noise, or of a policy's own training; 0 unless given.
        guidance_scale: Of these runs; 1 for none, which is the default.
        conditioning: What they are conditioned on, as for `stepgraph.calibrate`; the plan is for its sizes.
        allow_stochastic: Go on although the sampler adds noise.
        batch: Rows of the transformer's input to compile for first: images per call, twice that with guidance; those of
            `call` where that is given. Other sizes compile when they are first met.
        backend: "inductor" or "eager".
        exact: As in `stepgraph.compile`.
        cache: The folder; that of STEPGRAPH_CACHE unless given.
        on_step: Called with (evaluations done, evaluations in all) of what is measured.
        schedule: What the pipeline sets its scheduler with, as for `stepgraph.calibrate`. diffusers' own pipelines need none
            for text to image: their sigmas, and the shift of the image's size, are known.
        call: What the pipeline will be called with, such as {"prompt": "a fox", "height": 768}; its steps are `steps` where it
            does not say. Prompts may be others later. The policy must be one that measures nothing.
        **more: The policy's arguments too, where they are not called like one of the above.

    Returns:
        The attached executable; `detach()` undoes it.

    Raises:
        PlanError: The policy is unknown or refuses its arguments, `samples`, `seed` or `guidance_scale` is given for one that
            runs nothing with it, or the model or sampler cannot be calibrated; or `call` comes with what it says itself, or
            with a policy that measures.
        CompileError: The pipeline has no transformer, or it cannot be compiled.
    """
    transformer = unwrapped(getattr(pipe, "transformer", None))
    if transformer is None:
        raise CompileError(f"{type(pipe).__name__} has no transformer to accelerate{about_unet(pipe)}")
    if policy not in POLICIES:
        raise ArgumentError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise CompileError(
            f"{type(pipe).__name__} has two transformers, each for a part of the steps, and a plan is for all steps of one; "
            f"compile the one that shall be accelerated, and run its session step by step"
        )
    asked = {"samples": samples, "seed": seed, "guidance_scale": guidance_scale}
    policy_arguments, settings = _divided(policy, _policy_arguments(arguments, more), asked)
    if call is not None:
        measures = POLICIES[policy].wants_stats(policy_arguments) or runs_model(policy)
        _refuse_beside_call(policy, measures, conditioning=conditioning, schedule=schedule)
    folder = writable_folder(Path(cache) if cache is not None else read_env().cache)
    runs = {**settings, "conditioning": digest(conditioning)}
    # One graph of each signature serves the header, the calibration and the compiler.
    traced = TracedModel(transformer)
    if call is None:
        seen: dict[str, Any] = {}
        inputs = traced.example_inputs(batch, conditioning)
        chosen, count = counted_steps(schedule, steps, pipe.scheduler, 50)
        chosen = _of_pipeline(chosen, count, pipe, traced.family)
    else:
        watched = watch(pipe, **({} if steps is None else {"num_inference_steps": steps}) | dict(call))
        chosen, count = watched.schedule, _agreed(steps, watched.steps)
        inputs = dict(watched.inputs[0])
        seen = {"example_inputs": inputs, "guidance": watched.guidance, "timestep": watched.timestep}
    marked = traced.marked(inputs)
    header = make_header(transformer, pipe.scheduler, count, marked, seen.get("guidance", "batched"), chosen)
    header = replace(header, timestep=seen.get("timestep", header.timestep))
    if not allow_stochastic:
        refuse_stochastic(pipe.scheduler, count, header.schedule)
    circumstances = {**asdict(header), "facts": _key(stated_facts(marked.trace.facts))}
    measured = POLICIES[policy].wants_stats(policy_arguments)

    def unfinished(file: Path) -> Path:
        return file.with_suffix(".unfinished")

    def measure() -> CalibrationStats:
        return calibrate_traced(
            traced, pipe.scheduler, steps=count, conditioning=conditioning, allow_stochastic=allow_stochastic,
            checkpoint=unfinished(stats_file), on_step=on_step, schedule=chosen, **settings,
        )  # fmt: skip

    def decide() -> CachePlan:
        stats = _kept(stats_file, CalibrationStats.load, measure) if measured else None
        unfinished(stats_file).unlink(missing_ok=True)
        return plan_traced(
            policy, stats, traced, pipe.scheduler, policy_arguments, steps=count, conditioning=conditioning,
            allow_stochastic=allow_stochastic, checkpoint=unfinished(plan_file), on_step=on_step, schedule=chosen, **seen,
        )  # fmt: skip

    stats_file = folder / f"stats-{_key({**circumstances, **runs})}.safetensors"
    planned = {
        **circumstances,
        **(runs if measured or runs_model(policy) else {}),
        "policy": policy,
        "arguments": policy_arguments,
        "files": _contents(policy_arguments),
    }
    plan_file = folder / f"plan-{policy}-{_key(planned)}.json"
    plan = _kept(plan_file, CachePlan.load, decide)
    unfinished(plan_file).unlink(missing_ok=True)
    executable = compile_plan(transformer, plan, inputs, CompileConfig(backend, exact), traced=traced)
    return executable.attach(pipe)


def _refuse_beside_call(policy: str, measures: bool, **given: Any) -> None:
    """Refuse what a watched call says itself, and policies that would measure the model without the pipeline.

    Raises:
        ArgumentError: The message names it.
    """
    twice = next((name for name, value in given.items() if value is not None), None)
    if twice is not None:
        raise ArgumentError(f"{twice} is given beside call, which says it; leave one of them out")
    if measures:
        free = sorted(name for name, one in POLICIES.items() if not one.needs_stats and not runs_model(name))
        raise ArgumentError(
            f"the policy {policy!r} measures the model on sampling runs, which call= does not make; take one that measures "
            f"nothing ({', '.join(free)}), or calibrate by calibrate(..., inputs=, conditioning=, timestep=)"
        )


def _agreed(asked: int | None, seen: int) -> int:
    """The number of steps.

    Raises:
        ArgumentError: The call has another one than asked for.
    """
    if asked not in (None, seen):
        raise ArgumentError(f"steps is {asked}, but the call runs {seen}; leave steps out, or give as many")
    return seen


def _of_pipeline(schedule: Schedule, steps: int, pipe: Any, family: Family) -> Schedule:
    """The schedule with the sigmas that diffusers' own pipelines of a family set, where nothing else is said."""
    own = family.sigmas is not None and type(pipe).__module__.startswith("diffusers.")
    if family.sigmas is None or not own or schedule.sigmas or schedule.timesteps:
        return schedule
    if config_of(pipe.scheduler).get("use_flow_sigmas"):
        return schedule
    return replace(schedule, sigmas=family.sigmas(steps))


def _policy_arguments(arguments: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's arguments from both places.

    Raises:
        PlanError: One is given twice.
    """
    twice = sorted(set(arguments or {}) & set(more))
    if twice:
        raise ArgumentError(f"the policy's argument {twice[0]!r} is given twice, in arguments and by name")
    return {**(arguments or {}), **more}


def _divided(policy: str, arguments: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policy's arguments, with what it takes of the settings asked for, and all settings of the calibration.

    Raises:
        PlanError: A setting is asked for that neither the calibration nor the policy takes, or is given twice.
    """
    asked_settings = {name: value for name, value in asked.items() if value is not None}
    taken = {argument.name for argument in describe_policy(policy, POLICIES[policy]).arguments}
    for name, value in asked_settings.items():
        if not POLICIES[policy].wants_stats(arguments) and name not in taken:
            raise ArgumentError(f"{name}={value!r} has no effect: the policy {policy!r} runs nothing with it; leave it out")
    passed = {name: value for name, value in asked_settings.items() if name in taken}
    return _policy_arguments(arguments, passed), {"samples": 16, "seed": 0, "guidance_scale": 1.0, **asked_settings}


def _contents(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files that arguments name: what a file holds can change under its name."""
    files = {name: Path(value) for name, value in arguments.items() if isinstance(value, (str, Path)) and Path(value).is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _key(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def _kept(path: Path, load: Callable[[Path], T], make: Callable[[], T]) -> T:
    """What lies on disk, or is made and put there; a damaged file is made anew, and that is said."""
    if path.is_file():
        try:
            loaded = load(path)
            get_logger("accelerate").info("found %s", path)
            return loaded
        except PlanError as error:
            get_logger("accelerate").warning("%s; it is made anew", error)
    fresh = make()
    fresh.save(path)
    get_logger("accelerate").info("wrote %s", path)
    return fresh
