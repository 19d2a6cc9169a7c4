"""Damage artifacts in every way and see that each is refused clearly, or still holds exactly what was saved.

    python -m stepgraph.bench.fuzz_artifacts --count 100000

Damage is bit flips, truncations, insertions, exchanged and repeated parts at every region of every file, also with the hashes
made right again, so that what lies behind them is reached. An artifact of a tiny DiT with low-rank factors and weights is used,
as a folder and as a zip. What is raised must be a `PlanError` or a `CompileError`; anything else counts as a crash.
"""

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

from stepgraph.bench.record import write_record
from stepgraph.compiler.correct import lowrank
from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.factorize import factorize
from stepgraph.compiler.factors import Factors, refuse_model
from stepgraph.compiler.load_artifact import build_model, build_scheduler
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig, CompileError
from stepgraph.fingerprint import fingerprint
from stepgraph.plan import PlanError
from stepgraph.runtime.artifact import manifest_bytes, read_artifact

TINY = {
    "num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 2, "out_channels": 4, "num_layers": 1, "sample_size": 4,
    "patch_size": 2, "num_embeds_ada_norm": 4,
}  # fmt: skip
RESULTS = Path("bench/results/fuzz-artifacts.json")
# Seconds within which anything has to be refused; longer counts as a hang.
HANG = 20.0


def save_samples(place: Path) -> list[Path]:
    """Write one artifact as a folder and as a zip; returns both."""
    torch.manual_seed(0)
    model, scheduler = diffusers.DiTTransformer2DModel(**TINY).eval(), diffusers.DDIMScheduler()
    plan = lowrank(make_plan("interval", model=model, scheduler=scheduler, steps=4, every=2), kinds=["ff"])
    factors = factorize(model, method="svd", rank=2)
    executable = compile_plan(model, plan, example_inputs(model, 2), CompileConfig("eager"), factors)
    paths = [place / "artifact", place / "artifact.zip"]
    for path in paths:
        executable.save(path, with_weights=True, scheduler=scheduler)
    return paths


def digest_of(path: Path) -> str:
    """Everything that loading takes from an artifact: the plan, the options, the model and its weights, factors, scheduler."""
    artifact = read_artifact(path)
    model, scheduler = build_model(artifact), build_scheduler(artifact)
    factors = "" if artifact.factors is None else Factors.parse(artifact.factors, "factors").digest
    about = artifact.model
    refuse_model("the artifact is", (about["class"], about["fingerprint"], about["dtype"]), model)
    facts = [artifact.plan.to_json(), asdict(artifact.options), repr(artifact.inputs), fingerprint(model), factors]
    return hashlib.sha256(repr([*facts, dict(artifact.versions), dict(scheduler.config)]).encode()).hexdigest()


def damaged(data: bytes, choose: random.Random) -> tuple[str, bytes]:
    """What was done to a file's contents, and the result."""
    at, length = choose.randrange(len(data) + 1), choose.choice([1, 2, 4, 8, 64, 512])
    kind = choose.choice(["flip", "flip", "cut", "insert", "repeat", "zero", "huge", "remove", "swap"])
    if kind == "flip":
        at = min(at, len(data) - 1)
        return kind, data[:at] + bytes([data[at] ^ (1 << choose.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return kind, data[:at]
    if kind == "remove":
        return kind, data[:at] + data[at + length :]
    if kind == "swap":
        return kind, data[at:] + data[:at]
    inserted = {
        "insert": choose.randbytes(length), "repeat": data[at : at + length], "zero": bytes(length),
        "huge": choose.choice([b"9" * length, b"\xff" * length, b"[" * length, b'{"a":' * length]),
    }[kind]  # fmt: skip
    return kind, data[:at] + inserted + data[at + (0 if kind == "insert" else len(inserted)) :]


@contextmanager
def changed_file(path: Path, data: bytes) -> Iterator[None]:
    """A file with other contents for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def attempt(artifact: Path, file: Path, data: bytes) -> str:
    """How an artifact is taken with a file changed, and its hash in the manifest made right: refused, accepted, or a crash."""
    manifest = artifact / "manifest.json"
    forged = manifest.read_bytes() if artifact.is_dir() else b""
    if artifact.is_dir() and file != manifest:
        described = json.loads(forged)
        described["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        forged = manifest_bytes(described)
    with changed_file(file, data):
        if artifact.is_dir() and file != manifest:
            with changed_file(manifest, forged):
                return taken(artifact)
        return taken(artifact)


def taken(artifact: Path) -> str:
    """What loading an artifact ends in."""
    started = time.perf_counter()
    try:
        found = digest_of(artifact)
    except (PlanError, CompileError) as error:
        found = "refused" if str(error) else "crash: an error without words"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = f"crash: {type(error).__name__}: {error}"
    return "crash: hang" if time.perf_counter() - started > HANG else found


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """Run `count` attempts; returns counts by outcome and by kind of damage, and the crashes.

    Behind a wrong hash nothing but the original may be accepted. Behind a right one a changed action is what its author says
    it is; changed weights and factors are noticed by fingerprint and digest.
    """
    choose, outcomes, kinds, crashes = random.Random(seed), Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="stepgraph-fuzz-") as place:
        artifacts = save_samples(Path(place))
        original = digest_of(artifacts[0])
        listed = sorted(path.name for path in Path(place).rglob("*"))
        for number in range(count):
            artifact, form = choose.choice([(artifacts[0], "wrong hash"), (artifacts[0], "right hash"), (artifacts[1], "zip")])
            files = sorted(artifact.iterdir()) if artifact.is_dir() else [artifact]
            file = choose.choice(files)
            kind, data = damaged(file.read_bytes(), choose)
            if form == "right hash":
                outcome = attempt(artifact, file, data)
            else:
                with changed_file(file, data):
                    outcome = taken(artifact)
            forged = form == "right hash" and outcome not in (original, "refused") and not outcome.startswith("crash")
            wrong = outcome not in (original, "refused") and not forged
            named = "same contents" if outcome == original else "other valid contents" if forged else outcome.split(":")[0]
            outcomes[f"{form}: {'wrong contents' if wrong and named == outcome else named}"] += 1
            kinds[f"{file.name if file.suffix != '.txt' else 'graph'} {kind}"] += 1
            if wrong:
                crashes.append({"number": number, "file": file.name, "kind": kind, "form": form, "outcome": outcome[:300]})
        strays = sorted(path.name for path in Path(place).rglob("*"))
    facts = {"count": count, "seed": seed, "outcomes": dict(sorted(outcomes.items())), "kinds": dict(sorted(kinds.items()))}
    return {**facts, "files_written_elsewhere": len(set(strays) - set(listed)), "crashes": crashes}


def main() -> None:
    """Fuzz, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = fuzz(arguments.count, arguments.seed)
    write_record(arguments.out, "cpu", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
