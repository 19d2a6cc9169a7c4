"""Calibration: watch a model's sites during real sampling runs."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from stepgraph.checked import checked
from stepgraph.checks import MOST_ROWS, check_number, check_whole, shown
from stepgraph.compiler.calibration.observe import Observer
from stepgraph.compiler.calibration.rates import METRICS, Metric
from stepgraph.compiler.calibration.stats import CHANNELS, CalibrationStats
from stepgraph.compiler.calibration.time_sites import time_sites
from stepgraph.compiler.marking.describe import complete_conditioning, latents_shape, make_header, own_inputs
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.errors import ArgumentError, MismatchError, PlanError
from stepgraph.files.tensor_record import read_tensor_record, write_tensor_record
from stepgraph.fingerprint import config_of, model_dtype
from stepgraph.inputs import latents_of
from stepgraph.plan import PlanHeader
from stepgraph.runtime.sampling.sample import sample
from stepgraph.schedule import Schedule, TimestepInput, counted_steps, image_tokens, timestep_input
from stepgraph.scheduler import prepare_scheduler, refuse_stochastic, shifted, step_arguments
from stepgraph.wrapped_models import refuse_around_measuring, unwrapped

UNFINISHED = "stepgraph-calibration"
VERSION = 1


@checked
def calibrate(
    model: nn.Module,
    scheduler: Any,
    *,
    steps: int | None = None,
    samples: int = 16,
    seed: int = 0,
    guidance_scale: float = 1.0,
    conditioning: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    provisional: torch.Tensor | None = None,
    metrics: Mapping[str, Metric] | None = None,
    channels: bool = True,
    lags: int = 3,
    eta: float = 0.0,
    allow_stochastic: bool = False,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    timestep: TimestepInput | Sequence[str] | None = None,
) -> CalibrationStats:
    """Run the sampler and average over the samples how each site changes from step to step.

    Within an initialised torch.distributed process group (`torchrun`), every process takes its share of the samples, and all
    of them return the statistics of all samples.

    Args:
        model: On any device.
        scheduler: A diffusers scheduler; it is copied and not changed.
        steps: Number of inference steps; 50, or as many as the schedule has sigmas or timesteps, unless given.
        samples: Number of sampling runs, one sample each.
        seed: Of the noise.
        guidance_scale: Above 1, classifier-free guidance in one batch, and tables for the branches "cond" and "uncond"; 1 is
            conditional sampling, as InvarDiff calibrates.
        conditioning: As for `stepgraph.sample`, `samples` rows each, `negative_<name>` too with guidance. The example
            conditioning of the model's family unless given (classes in turn for DiT).
        inputs: The forward's arguments, where the shapes of the conditioning, or the model's usual ones, are not meant; two
            rows with guidance, else one.
        provisional: [T, sites] bool, a plan's reuses: the rates are then measured as InvarDiff's second phase does, and no site
            is timed (`ms` is NaN).
        metrics: Rates to measure beside those of `stepgraph.compiler.calibration.rates`, by name.
        channels: Whether to keep per-channel means of all linear maps, which needs the memory of one step's activations.
        lags: Over how many steps changes are measured, K; at least 1.
        eta: Share of noise that DDIM puts back; above 0 the sampler is stochastic.
        allow_stochastic: Calibrate although the sampler adds noise.
        checkpoint: A file that the sums go to after every sample, and from which an interrupted call takes them up; with
            several processes, one per process. It is left behind: delete it when the statistics are saved.
        on_step: Called with (evaluations done, evaluations in all) of this process.
        schedule: As for `stepgraph.sample`: what the pipeline will set its scheduler with.
        timestep: What the pipeline makes of the scheduler's timestep for the model, such as ("cast", "/1000"); as the model's
            adapter says unless given.

    Memory holds the sites' values of `lags` + 2 steps, whatever the number of steps and samples, and of the current run's other
    steps at most 2048 elements of each value, for the similarities of any two steps.

    Raises:
        PlanError: Too few samples, a stochastic sampler, `provisional` or conditioning of another shape, a checkpoint of
            another calibration, or NaN in what was measured.
    """
    return calibrate_traced(
        TracedModel(unwrapped(model)), scheduler, steps=steps, samples=samples, seed=seed, guidance_scale=guidance_scale,
        conditioning=conditioning, inputs=inputs, provisional=provisional, metrics=metrics, channels=channels, lags=lags,
        eta=eta, allow_stochastic=allow_stochastic, checkpoint=checkpoint, on_step=on_step, schedule=schedule,
        timestep=timestep,
    )  # fmt: skip


def calibrate_traced(
    traced: TracedModel, scheduler: Any, *, steps: int | None, samples: int, seed: int, guidance_scale: float,
    conditioning: Mapping[str, Any] | None = None, inputs: Mapping[str, Any] | None = None,
    provisional: torch.Tensor | None = None, metrics: Mapping[str, Metric] | None = None, channels: bool = True, lags: int = 3,
    eta: float = 0.0, allow_stochastic: bool = False, checkpoint: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None, schedule: Schedule | Mapping[str, Any] | None = None,
    timestep: TimestepInput | Sequence[str] | None = None,
) -> CalibrationStats:  # fmt: skip
    """`calibrate`, on the graphs of a traced model, so that it is traced for no signature twice."""
    model = traced.model
    refuse_around_measuring(next(model.parameters()).device)
    rank, world = _place()
    check_samples(samples, world)
    schedule, steps = counted_steps(schedule, steps, scheduler, 50)
    guided = check_guidance(guidance_scale)
    inputs = dict(inputs or traced.example_inputs(2 if guided else 1, conditioning))
    schedule = shifted(schedule, scheduler, latents_shape(inputs), model)
    if not allow_stochastic:
        if eta:
            raise ArgumentError(
                f"eta is {eta}: the sampler adds noise at every step, which a cache cannot keep; use eta=0, or pass "
                f"allow_stochastic=True (--allow-stochastic) if that is what you want"
            )
        refuse_stochastic(scheduler, steps, schedule)
    step_arguments(prepare_scheduler(scheduler, steps, schedule=schedule), eta)
    check_whole("lags", lags, 1)
    marked = traced.marked(inputs)
    family = marked.family
    header = make_header(model, scheduler, steps, marked, "batched" if guided else "none", schedule)
    header = replace(header, seed=seed, samples=samples, timestep=timestep_input(timestep) or header.timestep)
    evaluations = len(header.timesteps)
    if provisional is not None and tuple(provisional.shape) != (evaluations, len(marked.sites)):
        raise ArgumentError(f"provisional is {list(provisional.shape)}; expected [{evaluations}, {len(marked.sites)}]")
    measured = {**METRICS, **(metrics or {})}
    observer = Observer(
        model, marked, evaluations, measured, provisional=provisional, channels=channels, embedding=family.embedding,
        lags=lags, timestep=header.timestep,
    )  # fmt: skip
    latents = latents_of(inputs)
    tokens = image_tokens(latents_shape(inputs), config_of(model))
    conditions = conditioning_of(traced, conditioning, samples, guided, latents.device, tokens)
    _refuse_other_names(inputs, conditions)
    used = digest(conditioning)
    identity = {
        "header": asdict(header), "guidance_scale": guidance_scale, "conditioning": used, "eta": eta, "channels": channels,
        "lags": lags,
        "metrics": sorted(measured), "provisional": digest({"": provisional}), "process": [rank, world],
    }  # fmt: skip
    own_samples = range(rank, samples, world)
    progress = _Progress(None if checkpoint is None else _own_file(Path(checkpoint), rank, world), identity)
    done, generator = progress.resume(observer), torch.Generator().manual_seed(seed)
    for sample_index in range(samples):
        # Every sample's noise is drawn, so that it does not depend on which of them run here.
        noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents.device, model_dtype(model))
        if sample_index not in own_samples or own_samples.index(sample_index) < done:
            continue
        chosen: dict[str, Any] = {
            name: value if name.removeprefix("negative_") in family.unbatched else value[sample_index : sample_index + 1]
            for name, value in conditions.items()
        }
        report = None if on_step is None else _shifted(on_step, done * evaluations, len(own_samples) * evaluations)
        observer.begin()
        # Noise that the sampler itself adds comes from torch's own generators.
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1 + sample_index)
            sample(
                observer, scheduler, noise, guidance_scale, steps=steps, schedule=schedule, eta=eta, on_step=report, **chosen
            )
        observer.finish()
        done += 1
        progress.save(observer, done)
    tables = _finished(observer, header, marked, samples, latents.device)
    # A second phase is asked for its rates alone.
    timed = provisional is None
    tables["ms"] = (
        time_sites(model, marked, inputs) if timed else torch.full((len(marked.sites),), torch.nan, dtype=torch.float64)
    )
    if family.embedding is None:
        tables["embedding"] = torch.full((evaluations,), torch.nan, dtype=torch.float64)
    channel_tables = {name: tables.pop(name) for name in list(tables) if name in observer.channels.sums}
    branches = ("cond", "uncond") if guided else ("cond",)
    return CalibrationStats(header, marked.sites, branches, float(guidance_scale), used, tables, channel_tables, float(eta))


def _finished(
    observer: Observer, header: PlanHeader, marked: MarkedGraph, samples: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The means over all samples of all processes."""
    evaluations = len(header.timesteps)
    sums = {name: _reduced(table, device) for name, table in sorted(observer.sums.items())}
    tables = {name: table / samples for name, table in sums.items()}
    for name in observer.channels.sums:
        steps = evaluations - 1 if "_change" in name else evaluations
        tables[name] = tables[name] / max(steps, 1)
    for name in tables:
        if name.startswith("rate."):
            tables[name][:, 0] = tables[name][:, -1] = 1.0
    bad = torch.nonzero(~tables["magnitude"].isfinite())
    if len(bad):
        _, step, site = bad[0].tolist()
        raise PlanError(f"{marked.sites[site].name} is not finite at step {step}: NaN or infinite values in the model's run")
    return tables


def _reduced(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return table
    moved = table.to(device if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(moved)
    return moved.cpu()


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def check_samples(samples: Any, world: int) -> None:
    """Refuse a number of samples that is none, or less than one per process."""
    check_whole("samples", samples, 1, MOST_ROWS, tail=", because every table is a mean over sampling runs")
    if samples < world:
        raise ArgumentError(
            f"samples is {samples}; expected at least {world}, because each of the {world} processes runs its own"
        )


def check_guidance(scale: Any) -> bool:
    """Whether there is guidance."""
    check_number("guidance_scale", scale, tail=" (1 for no guidance)")
    return bool(scale > 1)


def conditioning_of(
    traced: TracedModel,
    given: Mapping[str, torch.Tensor] | None,
    samples: int,
    guided: bool,
    device: torch.device,
    tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """What the sampling loop gets, `samples` rows each; `tokens` are those of the image, where they are not as usual."""
    model, family = traced.model, traced.family
    if given is None:
        cond, uncond = family.conditioning(config_of(model), samples, device)
        return cond | ({f"negative_{name}": value for name, value in uncond.items()} if guided else {})
    completed = complete_conditioning(model, family, given, tokens)
    completed |= {name: value for name, value in given.items() if name.startswith("negative_") and value is not None}
    # PixArt's pipelines give the sizes of a model that is not conditioned on them as None.
    completed = {name: value for name, value in completed.items() if not _is_nothing(value)}
    for name, value in completed.items():
        rows = value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else None
        if rows is None or (rows != samples and name.removeprefix("negative_") not in family.unbatched):
            got = list(value.shape) if isinstance(value, torch.Tensor) else shown(value)
            raise ArgumentError(f"conditioning {name} is {got}; expected {samples} rows, one per sample")
    traced.refuse_no_rows(completed)
    return {name: value.to(device) for name, value in completed.items()}


def _is_nothing(value: Any) -> bool:
    """Whether a mapping has no entry but None."""
    return isinstance(value, Mapping) and all(entry is None for entry in value.values())


def _refuse_other_names(inputs: Mapping[str, Any], conditions: Mapping[str, Any]) -> None:
    """The graph is of the inputs: what it lacks would be left out of the runs, what it has more would be missing in them."""
    expected = {name for name in inputs if name not in own_inputs(inputs)}
    other = sorted(expected ^ {name for name in conditions if not name.startswith("negative_")})
    if other:
        raise ArgumentError(
            f"{other[0]} is among {'inputs' if other[0] in expected else 'conditioning'} only; the runs need the same in both"
        )


def digest(values: Mapping[str, Any] | None) -> str:
    """16 hexadecimal digits of some tensors; empty for none."""
    tensors = {name: value for name, value in (values or {}).items() if isinstance(value, torch.Tensor)}
    if not tensors:
        return ""
    sha256 = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().cpu().contiguous().flatten()
        sha256.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]


def unfinished_files(checkpoint: Path) -> list[Path]:
    """The files that a calibration with this checkpoint leaves behind."""
    pattern = re.compile(re.escape(checkpoint.name) + r"(\.[0-9]+)?")
    return [path for path in checkpoint.resolve().parent.iterdir() if pattern.fullmatch(path.name)]


def _own_file(path: Path, rank: int, world: int) -> Path:
    return path if world == 1 else path.with_name(f"{path.name}.{rank}")


@dataclass
class _Progress:
    """The sums of the samples that are done, on disk."""

    path: Path | None
    identity: dict[str, Any]

    def resume(self, observer: Observer) -> int:
        """Take the sums up where an interrupted calibration left them; how many samples they hold.

        Raises:
            PlanError: The file belongs to another calibration.
        """
        if self.path is None or not self.path.is_file():
            return 0
        described, tensors = read_tensor_record(self.path, UNFINISHED, VERSION)
        wanted = json.loads(json.dumps(self.identity))
        stored = described.get("identity")
        if stored != wanted:
            differ = [key for key in wanted if not isinstance(stored, dict) or stored.get(key) != wanted[key]]
            raise MismatchError(
                f"{self.path} was left by another calibration ({', '.join(differ)} differ); delete it or name another file"
            )
        for name, table in tensors.items():
            if name.startswith(CHANNELS):
                observer.channels.sums[name.removeprefix(CHANNELS)] = table
            else:
                observer.sites.sums[name].copy_(table)
        return int(described["done"])

    def save(self, observer: Observer, done: int) -> None:
        """Write the sums of the samples done so far; the file appears whole or not at all."""
        if self.path is None:
            return
        tensors = observer.sites.sums | {CHANNELS + name: table for name, table in observer.channels.sums.items()}
        write_tensor_record(self.path, UNFINISHED, VERSION, {"identity": self.identity, "done": done}, tensors)


def _shifted(on_step: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    return lambda step, _: on_step(done + step, total)
