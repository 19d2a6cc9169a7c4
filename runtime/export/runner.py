"""Runs an exported cache plan with torch alone (ONNX programs: and onnxruntime); exports hold a copy of this file as run.py.

    python run.py conditioning.safetensors latents.safetensors --guidance 4 --seed 0

`conditioning.safetensors` holds the model's inputs behind latents and timestep, batch first, by their names; with guidance the
unconditional ones as `negative_<name>`; and `noise` [B, C, ...], which is drawn from the seed unless it is there. From Python:

    latents = Runner("folder").sample(noise, guidance_scale=4.0, class_labels=..., negative_class_labels=...)

schedule.json says what every step runs, reads, stores and frees (docs/export.md of stepgraph describes it).
"""

import argparse
import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What this runner reads, and the ending of its programs.
FORMATS, VERSION = {"stepgraph-pt2": ".pt2", "stepgraph-aoti": ".aoti.pt2", "stepgraph-onnx": ".onnx"}, 1


class ScheduleError(Exception):
    """An export, or a call of it, that does not fit; the message says what was expected."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, as views of the mapped file; pages are read when they are first used.

    Raises:
        ScheduleError: It is no such file, or not all of one.
    """
    if not Path(path).is_file():
        raise ScheduleError(f"there is no file {path}")
    size = Path(path).stat().st_size
    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    start = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    if not 8 < start <= size:
        raise ScheduleError(f"{path} is no safetensors file: its header would end at byte {start} of {size}")
    try:
        header = dict(json.loads(raw[8:start].numpy().tobytes()))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{path} is no safetensors file: its header is no JSON object ({error})") from error
    header.pop("__metadata__", None)
    try:
        return {name: _view(raw[start:], **entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ScheduleError(f"{path} is damaged: its tensors are not what its header says ({error})") from error


def _view(data: Tensor, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Tensor:
    first, last = data_offsets
    if dtype not in DTYPES:
        raise ValueError(f"the dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if not 0 <= first <= last <= len(data):
        raise ValueError(f"one lies at bytes {first} to {last} of {len(data)}")
    raw = data[first:last]
    # Files of others may put a tensor where its elements cannot be read in place.
    raw = raw.clone() if raw.storage_offset() % DTYPES[dtype].itemsize else raw
    return raw.view(DTYPES[dtype]).view(shape)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, wide elements first, so that each tensor lies where its elements can be read in place."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, dict[str, Any](), 0
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].element_size())
    for name, tensor in ordered:
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_program(path: Path, device: str = "cpu") -> Callable[..., Sequence[Tensor]]:
    """A program as a function of tensors; ONNX programs need onnxruntime, and run on the CPU."""
    if path.name.endswith(FORMATS["stepgraph-aoti"]):
        index = torch.device(device).index
        return torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    return run


class Runner:
    """An export in memory: the schedule, the weights once, and the programs, each loaded when it is first needed.

    Args:
        folder: The export.
        verify: Whether to compare the weights with their hash, which reads all of them; programs always are.

    Raises:
        ScheduleError: It is no export of a version that this runner knows, or one that was damaged.
        OSError: It cannot be read.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.schedule: dict[str, Any] = _read_schedule(self.folder / "schedule.json")
        kind = (self.schedule.get("format"), self.schedule.get("version"))
        if kind[0] not in FORMATS or kind[1] != VERSION:
            raise ScheduleError(
                f"{folder} is of the format {kind}; this runner reads version {VERSION} of {', '.join(FORMATS)}"
            )
        device = torch.device(self.schedule["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ScheduleError(f"{folder} was exported for {device}, and torch finds no CUDA device here; export for the CPU")
        if verify:
            self._refuse_damaged(self.schedule["weights"])
        self.weights = {name: t.to(device) for name, t in read_tensors(self.folder / self.schedule["weights"]).items()}
        self._programs: dict[str, Callable[..., Sequence[Tensor]]] = {}

    def call(self, name: str, *tensors: Tensor) -> Sequence[Tensor]:
        """Run a program on its inputs; strides are part of what was exported, so every one is made contiguous."""
        if name not in self._programs:
            self.load(name)
        weights = (self.weights[weight] for weight in self.schedule["programs"][name]["weights"])
        with torch.no_grad():
            return self._programs[name](*(tensor.contiguous() for tensor in tensors), *weights)

    def load(self, name: str) -> None:
        """Load a program; `call` does when it first needs one."""
        file = self.schedule["programs"][name]["file"]
        self._refuse_damaged(file)
        self._programs[name] = load_program(self.folder / file, self.schedule["device"])

    def _refuse_damaged(self, file: str) -> None:
        if file not in self.schedule.get("sha256", {}):
            raise ScheduleError(f"schedule.json has no SHA-256 of {file}; export again")
        wanted, actual = self.schedule["sha256"][file], sha256_of(self.folder / file)
        if actual != wanted:
            raise ScheduleError(
                f"{self.folder / file} is not what was exported: its SHA-256 is {actual}, expected {wanted}; copy it again"
            )

    def session(self) -> "ScheduledRun":
        """A fresh run, with no stored values."""
        return ScheduledRun(self)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        guidance_scale: float = 1.0,
        on_step: Callable[[int, int], None] | None = None,
        **conditioning: Tensor,
    ) -> Tensor:
        """Denoise.

        Args:
            noise: Standard normal latents [B, C, ...].
            guidance_scale: Above 1, classifier-free guidance: uncond + scale * (cond - uncond).
            on_step: Called with (steps done, steps in all).
            **conditioning: The model's other inputs, batch first; with guidance, the unconditional ones as `negative_<name>`.

        Returns:
            Latents [B, C, ...].
        """
        schedule, sampler = self.schedule, self.schedule["sampler"]
        if "terms" not in sampler:
            raise ScheduleError(f"the schedule has no sampler: {sampler['reason']}; step one of your own around session()")
        cond, uncond = self._conditioning(conditioning, guidance_scale)
        latents: Tensor = noise * sampler["init_noise_sigma"]
        session, steps = self.session(), len(schedule["steps"])
        history: deque[tuple[Tensor, Tensor]] = deque(maxlen=1 + max(age for terms in sampler["terms"] for age, _, _ in terms))
        for index, step in enumerate(schedule["steps"]):
            scaled = latents * sampler["scales"][index] if sampler["scales"][index] != 1 else latents
            outputs = self._predict(session, scaled, step["model_timestep"], cond, uncond)
            history.appendleft((latents, _guided(outputs, guidance_scale, latents)))
            latents = _combined(history, sampler["terms"][index], latents.dtype)
            if on_step is not None:
                on_step(index + 1, steps)
        return latents

    def _conditioning(
        self, given: Mapping[str, Tensor], guidance_scale: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The conditional inputs and, with guidance, the unconditional ones."""
        names = [entry["name"] for entry in self.schedule["inputs"][1:] if entry["name"] != "timestep"]
        guided = guidance_scale > 1
        unconditional = [f"negative_{name}" for name in names]
        # One file of conditioning serves with guidance and without.
        _refuse_names(given, [*names, *(unconditional if guided else [])], [] if guided else unconditional)
        if self.schedule["guidance"] == "separate" and not guided:
            raise ScheduleError(
                f"the plan has a branch each for cond and uncond; guidance_scale is {guidance_scale}, not above 1"
            )
        return {n: given[n] for n in names}, {n: given[f"negative_{n}"] for n in names} if guided else None

    def _predict(
        self,
        session: "ScheduledRun",
        latents: Tensor,
        timestep: float,
        cond: dict[str, Tensor],
        uncond: dict[str, Tensor] | None,
    ) -> Sequence[Tensor]:
        """The model's outputs: one, or under guidance the wanted one and the base."""
        if uncond is None:
            return [session(latents, timestep, cond)]
        if self.schedule["guidance"] == "separate":
            return [session(latents, timestep, cond), session(latents, timestep, uncond)]
        if session.both is None:
            session.both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        return session(torch.cat([latents, latents]), timestep, session.both).chunk(2)


class ScheduledRun:
    """One run of a schedule: which step is next, and what is stored. Call it once per step and branch."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.schedule = runner, runner.schedule
        branches = len(self.schedule["branches"])
        self.step, self.branch = 0, 0
        # Conditioning of both guidance halves, the same tensors at every step.
        self.both: dict[str, Tensor] | None = None
        self._slots: list[dict[int, list[Tensor]]] = [{} for _ in range(branches)]
        self._tables: list[_Tables | None] = [None] * branches

    def __call__(self, latents: Tensor, timestep: float | Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The model's first output at the next step, or for its next branch.

        Args:
            latents: What the model gets, scaled.
            timestep: What the model takes, as `model_timestep` in the schedule: a number, or a tensor [B]; whole where the
                input's dtype is.
            conditioning: The other inputs by name. Where they change within a run, what depends on them is computed anew.

        Raises:
            ScheduleError: All steps have run; an input is missing, unknown, or not of the shape and kind of dtype exported; or
                the timestep is not this step's.
        """
        if self.step == len(self.schedule["steps"]):
            raise ScheduleError(f"all {self.step} steps have run; start a new session")
        schedule, step, slots = self.schedule, self.schedule["steps"][self.step], self._slots[self.branch]
        inputs = self._inputs(latents, timestep, conditioning)
        variant = schedule["variants"][step["variant"]]
        stored = [tensor for slot in step["reads"] for tensor in slots[slot]]
        constants = [self.runner.weights[name] for name in step["constants"][self.branch]]
        tables = self._table_values(inputs) if variant["tables"] else []
        outputs = self.runner.call(
            variant["program"], *inputs.values(), *stored, *constants, *(tables[index] for index in variant["tables"])
        )
        rest = iter(outputs[schedule["results"] :])
        for slot, count in zip(step["stores"], variant["stores"]):
            slots[slot] = [next(rest) for _ in range(count)]
        for slot in step["frees"]:
            del slots[slot]
        self.branch = (self.branch + 1) % len(self._slots)
        self.step += self.branch == 0
        return outputs[0]

    def _inputs(self, latents: Tensor, timestep: float | Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's inputs by name, in order."""
        first, *others = (entry["name"] for entry in self.schedule["inputs"])
        _refuse_names(conditioning, [name for name in others if name != "timestep"])
        values, inputs = {first: latents, "timestep": timestep, **conditioning}, dict[str, Tensor]()
        for entry in self.schedule["inputs"]:
            value = torch.as_tensor(values[entry["name"]], device=latents.device)
            value = value.expand(entry["shape"]) if not value.ndim else value
            if list(value.shape) != entry["shape"]:
                raise ScheduleError(f"{entry['name']} has the shape {list(value.shape)}; exported for {entry['shape']}")
            inputs[entry["name"]] = _converted(value, entry["name"], getattr(torch, entry["dtype"]))
        return inputs

    def _table_values(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What depends on prompt and timestep alone: computed at a run's first step, for all steps where that is possible."""
        fixed = [inputs[name] for name in self.schedule["tables"]["inputs"]]
        timestep, known = inputs["timestep"], self._tables[self.branch]
        if known is None or not known.fit(fixed):
            known = self._tables[self.branch] = self._computed(timestep, fixed)
        if known.every is not None:
            if not torch.equal(known.every[self.step], timestep):
                expected = self.schedule["steps"][self.step]["model_timestep"]
                raise ScheduleError(f"step {self.step} got the timestep {timestep.tolist()}; its tables are for {expected}")
            return [*known.prompt, *(table[self.step] for table in known.batched)]
        if "timestep" not in self.schedule["programs"]:
            return list(known.prompt)
        return [*known.prompt, *self.runner.call("timestep", timestep, *fixed, *known.prompt)]

    def _computed(self, timestep: Tensor, fixed: Sequence[Tensor]) -> "_Tables":
        seen = [(tensor, None if tensor.is_inference() else tensor._version, tensor.clone()) for tensor in fixed]
        prompt = self.runner.call("prompt", *fixed) if "prompt" in self.schedule["programs"] else ()
        if not self.schedule["tables"]["batched"]:
            return _Tables(seen, prompt)
        steps = torch.tensor([step["model_timestep"] for step in self.schedule["steps"]])
        steps = steps.to(timestep.device, timestep.dtype)
        every = steps.view(-1, *[1] * timestep.ndim).expand(-1, *timestep.shape)
        return _Tables(seen, prompt, self.runner.call("timestep", every, *fixed, *prompt), every)


@dataclass(frozen=True)
class _Tables:
    """What depends on prompt and timestep alone.

    Attributes:
        seen: Of every input that it depends on: the tensor, its version unless it has none, and a copy.
        prompt: The values at prompt level.
        batched: Where it takes one call, those of all steps [T, ...].
        every: The timesteps [T, ...] of those.
    """

    seen: Sequence[tuple[Tensor, int | None, Tensor]]
    prompt: Sequence[Tensor]
    batched: Sequence[Tensor] = ()
    every: Tensor | None = None

    def fit(self, fixed: Sequence[Tensor]) -> bool:
        """Whether the inputs are what they were; contents are compared where another tensor is given, or one was written to."""
        return all(
            (value is tensor and version is not None and value._version == version) or torch.equal(value, copy)
            for value, (tensor, version, copy) in zip(fixed, self.seen, strict=True)
        )


def _read_schedule(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{path} is no schedule of an export: no JSON object ({error})") from error


def _refuse_names(given: Mapping[str, Tensor], wanted: Sequence[str], ignored: Sequence[str] = ()) -> None:
    """Refuse inputs that are missing or that nobody reads."""
    expected = f"expected are {', '.join(sorted(wanted)) or 'none'}"
    for name in sorted(set(wanted) - set(given)):
        raise ScheduleError(f"the input {name} is missing; {expected}")
    for name in sorted(set(given) - {*wanted, *ignored}):
        raise ScheduleError(f"the input {name} is unknown; {expected}")


def _converted(value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """An input in the dtype that it was exported for; schedulers count whole timesteps in floating point too."""
    converted = value.to(dtype)
    if torch.can_cast(value.dtype, dtype) or (name == "timestep" and torch.equal(converted.to(value.dtype), value)):
        return converted
    shown = f" {value.flatten()[0].item():g}" if name == "timestep" else ""
    raise ScheduleError(f"{name} is{shown} of {value.dtype}; exported for {dtype}, so pass that")


def _guided(outputs: Sequence[Tensor], guidance_scale: float, latents: Tensor) -> Tensor:
    """The prediction under guidance; a variance that the model predicts in as many channels again is left out."""
    channels = latents.shape[1]
    wanted, base = (out[:, :channels] if out.shape[1] == 2 * channels else out for out in (outputs[0], outputs[-1]))
    return base + guidance_scale * (wanted - base) if len(outputs) == 2 else wanted


def _combined(kept: Sequence[tuple[Tensor, Tensor]], terms: Sequence[tuple[int, int, float]], dtype: torch.dtype) -> Tensor:
    """A step of the sampler: a fixed linear combination of latents and predictions of this and earlier steps."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.stack([weight * kept[age][output].to(wide) for age, output, weight in terms]).sum(0)
    return total.to(dtype)


def main() -> None:
    """Sample from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conditioning", help="safetensors file of the model's inputs")
    parser.add_argument("latents", help="safetensors file that is written")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, where the conditioning brings none")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the weights with their hash")
    try:
        _run(parser.parse_args())
    except (ScheduleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run(arguments: argparse.Namespace) -> None:
    conditioning = read_tensors(arguments.conditioning)
    runner = Runner(Path(__file__).parent, verify=not arguments.no_verify)
    inputs = {name: tensor.to(runner.schedule["device"]) for name, tensor in conditioning.items()}
    noise = inputs.pop("noise", None)
    noise = _drawn(runner, arguments) if noise is None else noise
    latents = runner.sample(noise, arguments.guidance, None, **inputs)
    write_tensors(arguments.latents, {"latents": latents})
    print(f"wrote {arguments.latents}: {list(latents.shape)}, root mean square {math.sqrt(latents.float().pow(2).mean()):.4g}")


def _drawn(runner: Runner, arguments: argparse.Namespace) -> Tensor:
    """Noise [B, C, ...] from the seed."""
    entry = runner.schedule["inputs"][0]
    halves = 2 if arguments.guidance > 1 and runner.schedule["guidance"] == "batched" else 1
    shape = [entry["shape"][0] // halves, *entry["shape"][1:]]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(arguments.seed))
    return noise.to(runner.schedule["device"], getattr(torch, entry["dtype"]))


if __name__ == "__main__":
    main()
