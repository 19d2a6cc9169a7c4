#!/usr/bin/env bash
# Run what needs a GPU, unattended, on a machine with CUDA and no network.
set -uo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: bench/gpu_suite.sh PART OUT [WHEELS]
       bench/gpu_suite.sh prove [--only NAME,...] [--tiny] OUT [WHEELS] [PLANS]
       bench/gpu_suite.sh wheels OUT [NAME...]

  PART    prove    everything that a GPU has to show, within 6 minutes: tests, dit1, flux, dit16, kernels, whole; --only repeats
                   some of these; --tiny rehearses them on a CPU. OUT holds 7 files of at most 16 MiB each, among them
                   prove.json, the record, and prove.txt, the table of what was measured against its bar
          wheels   collect in OUT the wheels for Python 3.12 that such a machine lacks, or those of these names; needs a network
          tests    pytest -m gpu
          demo     stepgraph demo
          compile  how long compilation takes
          ops      fused operations against plain torch, torch.compile and the machine's ceilings
          lowrank  milliseconds per step of corrected rows of DiT-XL/2
          runtime  the static runtime on DiT-XL/2 against eager, torch.compile and hooks
          train    train flux-emoji-l on out/emoji/icons-64.npz (python -m stepgraph.bench.emoji.icons --size 64, where there is
                   a network); exit status 3 says that a checkpoint was left: run it again
          all      tests, demo, ops, lowrank, runtime and compile
  OUT     folder for logs, results and suite.json
  WHEELS  folder of wheel files; what this checkout needs and Python lacks is installed from it; '' for none
  PLANS   folder of published plans (invardiff_dit_xl2_50_slow.json, invardiff_flux_28_fast.json); plans of an interval of 3
          stand in for those that it lacks

A call ends within 8 minutes, prove within 6. PYTHON names the interpreter (python3 unless set); its torch, triton and numpy are kept.
The exit status is 0 only if every part succeeded.
TEXT
    exit 2
}

command_line="bench/gpu_suite.sh $*"
prove_options=() tiny=
if [[ ${1:-} == prove ]]; then
    shift
    while [[ ${1:-} == --* ]]; do
        case $1 in
        --only) prove_options+=(--only "${2:-}") && shift ;;
        --tiny) prove_options+=(--tiny) && tiny=yes ;;
        *) usage ;;
        esac
        shift || usage
    done
    set -- prove "$@"
    [[ $# -ge 2 && $# -le 4 ]] || usage
elif [[ ${1:-} == wheels ]]; then
    [[ $# -ge 2 ]] || usage
else
    [[ $# -eq 2 || $# -eq 3 ]] || usage
fi
case $1 in
prove) parts=(prove) limit=355 ;;
wheels) parts=() limit=0 ;;
tests | demo | compile | ops | lowrank | runtime | train) parts=("$1") limit=460 ;;
all) parts=(tests demo ops lowrank runtime compile) limit=120 ;;
*)
    echo "gpu_suite: unknown part '$1'" >&2
    usage
    ;;
esac
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_suite: no ${PYTHON:-python3}" >&2 && exit 2; }
[[ $python == /* ]] || python=$PWD/$python
deadline=470 # seconds for the whole call, set-up included
[[ $1 == prove ]] && deadline=355
started=$(date -u +%Y-%m-%dT%H:%M:%SZ)
SECONDS=0

mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
wheels=
if [[ $1 != wheels && -n ${3:-} ]]; then
    wheels=$(cd "$3" && pwd) || exit 2
fi
if [[ $1 == prove && -n ${4:-} ]]; then
    prove_options+=(--plans "$(cd "$4" && pwd)") || exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# What images with PyTorch for CUDA were found to lack; versions are those that the tests run with (constraints.txt).
if [[ $1 == wheels ]]; then
    shift 2
    [[ $# -gt 0 ]] || set -- diffusers importlib-metadata zipp lazy-importer cache-dit pydot
    exec "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -c constraints.txt -d "$out" "$@"
fi
rows=() # per part: name, status, exit status, seconds, command
worst=0

# Install from $wheels what pyproject.toml asks for and Python lacks. Requirements of what was installed count too, so that
# it takes several rounds. What brings its own CUDA libraries stays as it is.
install_lacking() {
    "$python" - "$wheels" <<'PYTHON'
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

KEPT = {"torch", "triton", "numpy", "stepgraph"}
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
roots = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def lacking():
    """Requirements that nothing installed satisfies, by name."""
    found, seen, pending = {}, set(), list(roots)
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        extras = wanted.extras or {""}
        if name in KEPT or not (wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras)):
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = str(wanted.specifier)
            continue
        if not wanted.specifier.contains(installed.version, prereleases=True):
            found[name] = str(wanted.specifier)
        elif name not in seen:
            seen.add(name)
            needs = [Requirement(line) for line in installed.requires or []]
            pending += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


tried = set()
while new := {name: bounds for name, bounds in lacking().items() if name not in tried}:
    tried |= set(new)
    for name, bounds in sorted(new.items()):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", sys.argv[1]]
        status = subprocess.run([*command, f"{name}{bounds}"], check=False).returncode
        print(f"{name}{bounds}: {'installed' if status == 0 else 'not among the wheels'}", flush=True)
print("still lacking:", ", ".join(sorted(lacking())) or "nothing")
PYTHON
}

is_this_checkout() {
    "$python" -c '
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("stepgraph")
sys.exit(spec is None or pathlib.Path(spec.origin or "").resolve().parent != pathlib.Path("core").resolve())' 2>/dev/null
}

# Make `import stepgraph` mean this checkout: an editable install, or else a copy of the folders on PYTHONPATH.
install_checkout() {
    is_this_checkout && return
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . && is_this_checkout && return
    echo "the editable install failed; using a copy of the package on PYTHONPATH instead"
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r core "$copy/stepgraph"
    cp -r compiler runtime triton_kernels csrc bench "$copy/stepgraph/"
    export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
}

has_cuda() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# note NAME STATUS EXIT SECONDS COMMAND
note() {
    rows+=("$@")
    echo "gpu_suite: $1: $2 (${4} s)" >&2
    if [[ $3 -ne 0 && $worst -ne 1 ]]; then
        worst=1
        [[ ${#parts[@]} -eq 1 && $3 -eq 3 && $1 == train ]] && worst=3
    fi
}

# run_part NAME STANDARD_OUTPUT COMMAND...
run_part() {
    local name=$1 target=$2 begun=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    ((left > limit)) && left=$limit
    ((left < 10)) && left=10
    timeout -k 5 "$left" "$@" >"$target" 2>"$out/$name.log"
    status=$?
    local verdict=failed
    case $name:$status in
    *:0) verdict=ok ;;
    *:124 | *:137) verdict="stopped after $left s" ;;
    train:3) verdict="checkpoint left; run again" ;;
    esac
    note "$name" "$verdict" "$status" $((SECONDS - begun)) "$*"
    [[ $status -eq 0 ]] || tail -n 15 "$out/$name.log" >&2
}

run_tests() {
    run_part tests "$out/tests.txt" "$python" -m pytest -m gpu --junitxml "$out/tests.xml"
    tail -n 1 "$out/tests.txt" >&2
}
run_demo() {
    run_part demo "$out/demo.json" "$python" -m stepgraph.cli demo --device cuda --out "$out/demo" --json
}
run_compile() {
    run_part compile "$out/compile.txt" "$python" -m stepgraph.bench.speed.compile_times --device cuda --out "$out"
}
run_ops() {
    run_part ops "$out/ops.txt" "$python" -m stepgraph.bench.ops --device cuda --dtypes bfloat16 --seconds 0.1 --out "$out"
}
run_lowrank() {
    run_part lowrank "$out/lowrank.txt" "$python" -m stepgraph.bench.speed.lowrank_steps --device cuda --out "$out"
}

run_runtime() {
    run_part runtime "$out/runtime.txt" "$python" -m stepgraph.bench.speed.runtime --device cuda --part table overhead memory \
        --rounds 3 --out "$out"
}
# Its parts have limits of their own, and end before this one does.
run_prove() {
    run_part prove "$out/prove.txt" "$python" -m stepgraph.bench.prove "$out" --seconds $((deadline - SECONDS - 10)) \
        "${prove_options[@]}"
    cat "$out/prove.txt" >&2
    local log=$out/prove.log
    [[ $(wc -c <"$log") -le 8000000 ]] || { tail -c 8000000 "$log" >"$log.end" && mv "$log.end" "$log"; }
}
run_train() {
    run_part train "$out/train.txt" \
        "$python" -m stepgraph.bench.emoji.train_flux_emoji flux-emoji-l --device cuda --bf16 --out "$out/training" --limit 280
}

if [[ -n $tiny ]] || has_cuda; then
    # A system's Python may refuse to be installed into unless told; other Pythons do not look at this.
    export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    {
        [[ -z $wheels ]] || install_lacking
        install_checkout
    } >"$out/setup.log" 2>&1
    grep -E '^(still lacking|the editable)' "$out/setup.log" >&2
    for name in "${parts[@]}"; do
        case $name in
        prove) run_prove ;;
        tests) run_tests ;;
        demo) run_demo ;;
        compile) run_compile ;;
        ops) run_ops ;;
        lowrank) run_lowrank ;;
        runtime) run_runtime ;;
        train) run_train ;;
        esac
    done
else
    for name in "${parts[@]}"; do note "$name" "no CUDA device" 1 0 ""; done
fi

"$python" - "$out/suite.json" "$command_line" "$started" "$SECONDS" "${rows[@]}" <<'PYTHON' || worst=1
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def said(*command):
    """What a command prints; None where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device():
    try:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except ImportError:
        return None


path, command, started, seconds, *rows = sys.argv[1:]
parts = [
    {"part": name, "status": status, "exit": int(code), "seconds": int(wall), "command": line or None}
    for name, status, code, wall, line in zip(*(iter(rows),) * 5)
]
driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
suite = {
    "command": command,
    "started": started,
    "seconds": int(seconds),
    "device": device(),
    "driver": driver.splitlines()[0] if driver else None,
    "python": platform.python_version(),
    "versions": {name: version(name) for name in ("torch", "triton", "diffusers", "stepgraph")},
    "commit": said("git", "describe", "--always", "--dirty", "--abbrev=40", "--match", "-"),
    "parts": parts,
}
partial = Path(path + ".partial")
partial.write_text(json.dumps(suite, indent=2) + "\n")
partial.replace(path)
PYTHON
exit "$worst"
