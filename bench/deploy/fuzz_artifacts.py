"""Damage artifacts in every way and see that each is refused clearly, or still holds exactly what was saved.

    python -m stepgraph.bench.deploy.fuzz_artifacts --count 100000

Damage is bit flips, truncations, insertions, exchanged and repeated parts at every region of every file, and other values in
the manifest, also with the hashes made right again, so that what lies behind them is reached. An artifact of a tiny DiT with
low-rank factors and weights is used, as a folder and as a zip. What is raised must be a `PlanError` or a `CompileError`;
anything else counts as a crash, and so does an artifact with other weights or factors that is accepted. What is accepted is
compiled.
"""

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from stepgraph.bench.record import write_record
from stepgraph.compiler.entry.load_artifact import build_model, build_scheduler, compile_artifact
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.forecast.correct_plan import lowrank
from stepgraph.compiler.lowrank.factorize import factorize
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError, PlanError
from stepgraph.files.container import write_container
from stepgraph.fingerprint import fingerprint
from stepgraph.plan.factors import Factors, refuse_model
from stepgraph.runtime.artifact.artifact import KEYS, MANIFEST, manifest_bytes
from stepgraph.runtime.artifact.read_artifact import read_artifact

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
    return hashlib.sha256(repr([*facts, dict(artifact.versions), scheduler and dict(scheduler.config)]).encode()).hexdigest()


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


def contents_of(folder: Path) -> dict[str, bytes]:
    """The files of an artifact."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_hashes(contents: dict[str, bytes], described: dict[str, Any]) -> dict[str, bytes]:
    """An artifact whose manifest states the hashes of its files and its own."""
    files = {name: data for name, data in contents.items() if name != MANIFEST}
    described["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    return {**files, MANIFEST: manifest_bytes(described)}


def changed_value(described: dict[str, Any], choose: random.Random) -> str:
    """Put something else in the place of one value of a manifest; returns what was done."""
    holder: Any = described
    while True:
        keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = choose.choice(keys)
        if not isinstance(holder[key], (dict, list)) or not holder[key] or choose.random() < 0.2:
            break
        holder = holder[key]
    value, kind = holder[key], choose.choice(["value", "value", "value", "remove", "add"])
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder["added"] = value
    else:
        deep: Any = []
        for _ in range(500):
            deep = [deep]
        others = [None, True, -1, 0, 2**70, 1e308, 0.5, "", "a\u001b[2J\u0000", "../x", [], {}, [value], {"a": value}, deep]
        is_number = isinstance(value, (int, float))
        holder[key] = choose.choice([*others, *([value + 1, value * 2] if is_number else [f"{value}x"])])
    return f"manifest {kind}"


def write(place: Path, contents: dict[str, bytes], zipped: bool) -> Path:
    """An artifact of these files, as a folder or a zip like those that are saved."""
    folder, archive = place / "forged", place / "forged.zip"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    if not zipped:
        return folder
    archive.unlink(missing_ok=True)
    write_container(archive, {name: folder / name for name in contents})
    return archive


def taken(artifact: Path, original: str) -> str:
    """What loading an artifact ends in: refused, "same contents", "other valid contents", or a crash.

    What is accepted and is not the original is compiled as well.
    """
    started = time.perf_counter()
    try:
        digest = digest_of(artifact)
        if digest != original:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                accepted = read_artifact(artifact)
                compile_artifact(replace(accepted, options=replace(accepted.options, backend="eager")))
        outcome = "same contents" if digest == original else "other valid contents"
    except (PlanError, CompileError) as error:
        outcome = "refused" if str(error) else "crash: an error without words"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # What a fuzzer is for: panics of libraries and memory that is out are crashes too.
        outcome = f"crash: {type(error).__name__}: {error}"
    return "crash: hang" if time.perf_counter() - started > HANG else outcome


def one(place: Path, contents: dict[str, bytes], archive: bytes, choose: random.Random) -> tuple[str, str, str, Path]:
    """Damage an artifact in one way: the form, the file, what was done to it, and where it lies."""
    form = choose.choice(["wrong hash", "right hash", "right hash", "zip", "right digest"])
    zipped = choose.random() < 0.3
    if form == "zip":
        kind, data = damaged(archive, choose)
        (place / "damaged.zip").write_bytes(data)
        return form, "artifact.zip", kind, place / "damaged.zip"
    described = json.loads(contents[MANIFEST])
    del described["digest"]
    if form == "right digest":
        kind = changed_value(described, choose)
        forged = {**contents, MANIFEST: sealed(described)}
        return form, MANIFEST, kind, write(place, forged, zipped)
    file = choose.choice(sorted(contents))
    kind, data = damaged(contents[file], choose)
    forged = {**contents, file: data}
    if form == "right hash" and file != MANIFEST:
        forged = with_hashes(forged, described)
    return form, file, kind, write(place, forged, zipped)


def sealed(described: dict[str, Any]) -> bytes:
    """A manifest with a right digest, where it has the keys of one and values that one can have."""
    try:
        return manifest_bytes(described) if set(described) == set(KEYS) - {"digest"} else json.dumps(described).encode()
    except ValueError:
        return json.dumps(described).encode()


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """Run `count` attempts; returns counts by outcome and by kind of damage, and the crashes.

    Behind a wrong hash nothing but the original may be accepted. Behind a right one a changed plan or manifest is what its
    author says it is; changed weights and factors are noticed by fingerprint and digest.
    """
    choose, outcomes, kinds, crashes = random.Random(seed), Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="stepgraph-fuzz-") as base:
        place = Path(base)
        folder, archive = save_samples(place)
        original, contents, packed = digest_of(folder), contents_of(folder), archive.read_bytes()
        (place / "forged").mkdir()
        listed = {path for path in place.rglob("*") if path.parent != place / "forged"}
        for attempt in range(count):
            form, file, kind, path = one(place, contents, packed, choose)
            outcome = taken(path, original)
            may_differ = (form == "right hash" and file == "plan.json") or form == "right digest"
            wrong = outcome.startswith("crash") or (outcome == "other valid contents" and not may_differ)
            outcomes[f"{form}: {'wrong: ' if wrong else ''}{outcome.partition(':')[0]}"] += 1
            kinds[f"{file if not file.endswith('.txt') else 'graph'} {kind}"] += 1
            if wrong:
                crashes.append({"number": attempt, "file": file, "kind": kind, "form": form, "outcome": outcome[:300]})
        strays = {path for path in place.rglob("*") if path.parent != place / "forged"} - listed
        strays -= {place / "forged.zip", place / "damaged.zip"}
    facts = {"count": count, "seed": seed, "outcomes": dict(sorted(outcomes.items())), "kinds": dict(sorted(kinds.items()))}
    return {**facts, "files_written_elsewhere": len(strays), "crashes": crashes}


def main() -> None:
    """Fuzz, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = fuzz(arguments.count, arguments.seed)
    write_record(arguments.out, "cpu", facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
