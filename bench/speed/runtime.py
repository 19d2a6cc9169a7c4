"""The static runtime against hooks, torch.compile of the whole model, cache-dit, and the ideal by MACs.

    python -m stepgraph.bench.speed.runtime --out bench/results
    stepgraph bench runtime --model glyph-dit --batch 1 --dtype float32

Parts: `table` (every contender, its speed and the ablation), `overhead` (calls in which every site is reused), `compile` (in
fresh processes, disk cache cold and warm), `memory` (bytes of stored values), `scaling` (compile seconds and overhead by
tokens, blocks, steps and batch; not among the usual parts, as it takes long).

Contenders take turns step by step. A loop's time is the median time of each kind of step times how often it occurs; one loop is
also run as a whole, and the record says how far the two are apart. Before any figure is printed, results are compared: all
contenders on a small model in float32 at the end of whole runs, then the timed runs themselves: there each goes on from the
latents of the hook runtime on the same plan, and the model's output is compared at every step.
"""

import argparse
import copy
import json
import sys
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stepgraph.bench.record import write_record
from stepgraph.bench.speed.books import PUBLISHED
from stepgraph.bench.speed.compile_once import sized_model
from stepgraph.bench.speed.compile_times import seconds_of
from stepgraph.bench.speed.contenders import CONTENDERS, Setting, chosen, missing
from stepgraph.bench.speed.interleave import Timed, TimedLoop, loop_of, refuse_wrong_results, take_turns
from stepgraph.bench.speed.runtime_costs import cold_and_warm, memory, overheads, scaled
from stepgraph.bench.speed.runtime_plot import plot_scaling, plot_table
from stepgraph.compiler.entry.load_model import load_scheduler
from stepgraph.compiler.models import FAMILIES
from stepgraph.env import read_env
from stepgraph.errors import CompileError, PlanError
from stepgraph.fingerprint import dtype_name
from stepgraph.metrics import relative_l2
from stepgraph.runtime.executable import Executable
from stepgraph.runtime.sampling.sample import sample
from stepgraph.tolerances import WHOLE_RUN

PARTS = ("table", "overhead", "compile", "memory", "scaling")
USUAL = PARTS[:-1]
TOLERANCES = {dtype_name(dtype): most for dtype, most in WHOLE_RUN.items() if dtype is not None}
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
FULL, SLOW = "stepgraph: full", "stepgraph: slow"
# What is compared: baseline, faster one.
COMPARED = (
    ("eager", FULL),
    ("torch.compile", FULL),
    ("eager", SLOW),
    (FULL, SLOW),
    ("hooks: slow", SLOW),
    ("cache-dit: mask, eager", "stepgraph: mask"),
    ("cache-dit: mask, regional compile", "stepgraph: mask"),
    ("cache-dit: mask, eager", SLOW),
    ("cache-dit: mask, regional compile", SLOW),
    (FULL, "stepgraph: l2c"),
    (FULL, "stepgraph: fora2"),
    (FULL, "stepgraph: fora3"),
)
# On a small model at batch 1 the calls themselves are what costs.
COMPARED_SMALL = (("eager", FULL), (FULL, "stepgraph: fora2"))


@torch.no_grad()
def check_small(names: list[str], setting: Setting) -> tuple[dict[str, float], float]:
    """Every contender on a DiT of two blocks in float32, all steps, without guidance.

    Returns:
        The distance of each from its reference, and the tolerance: that of float32, or, where the model and schedule amplify
        rounding further, four times what the eager model in float32 is from itself in float64.

    Raises:
        CompileError: One is further off.
    """
    torch.manual_seed(0)
    device, steps = next(setting.model.parameters()).device, setting.steps
    model = DiTTransformer2DModel(**SMALL).eval().to(device)
    small = replace(setting, model=model, scheduler=DDIMScheduler(), batch=2, made={})
    loop = loop_of(model, small.scheduler, steps, 2, 1.0)
    exact = copy.deepcopy(model).double()
    ends = [deque(each_loop.run(runner), 1).pop()[1] for each_loop, runner in ((loop, model), (loop.in_float64(), exact))]
    tolerance = max(TOLERANCES["float32"], 4 * relative_l2(*ends))
    timed = take_turns([CONTENDERS[name](small) for name in names], loop, steps, 1)
    refuse_wrong_results(timed, tolerance)
    return {entry.contender.name: entry.error for entry in timed if entry.error is not None}, tolerance


def table_part(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """All contenders in turns, checked, with ratios."""
    names = chosen(arguments.rows, arguments.backend)
    # What was asked for by name is measured or refused.
    lacking = {} if arguments.rows else {name: why for name in names if (why := missing(name, arguments.plans))}
    for name, why in lacking.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    names = [name for name in names if name not in lacking]
    small, small_tolerance = check_small(names, setting)
    steps = arguments.segment or arguments.steps
    loop = loop_of(setting.model, setting.scheduler, setting.steps, setting.batch, arguments.guidance)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("building", total=len(names))
        contenders = []
        for name in names:
            progress.update(bar, description=f"building {name}")
            contenders.append(CONTENDERS[name](setting))
            progress.advance(bar)
        bar = progress.add_task("measuring", total=arguments.rounds * steps)
        timed = take_turns(
            contenders, loop, steps, arguments.rounds, forced=True, on_step=lambda done, _: progress.update(bar, completed=done)
        )
    tolerance = TOLERANCES[arguments.dtype]
    refuse_wrong_results(timed, tolerance)
    return {
        "steps_timed": steps,
        "left_out": lacking,
        "guidance_scale": arguments.guidance,
        "method": "in turns step by step; per kind of step the median, times how often it occurs",
        "tolerance": tolerance,
        "tolerance_small_float32": small_tolerance,
        "rows": [row_of(entry, timed, steps, small) for entry in timed],
        "ratios": ratios(timed, steps, COMPARED if arguments.model.endswith(":random") else COMPARED_SMALL),
        "whole_loop": whole_loop(timed, loop, setting, steps, tolerance),
    }


def row_of(entry: Timed, timed: list[Timed], steps: int, small: dict[str, float]) -> dict[str, Any]:
    """A row of the table as the record has it."""
    contender, seconds = entry.contender, entry.seconds(steps)
    by_name = {other.contender.name: other.seconds(steps) for other in timed}
    row: dict[str, Any] = {
        "name": contender.name, "seconds": seconds, "spread_s": entry.spread(steps), "ms_per_step": 1e3 * seconds / steps,
        "ideal": contender.ideal(steps), "kinds": len(set(contender.kinds[:steps])), "build_s": contender.build_s,
        "reference": contender.reference, "error": entry.error, "error_small_float32": small.get(contender.name),
    }  # fmt: skip
    for name, column in (("eager", "over_eager"), ("torch.compile", "over_torch_compile"), (FULL, "over_full")):
        row[column] = by_name[name] / seconds if name in by_name else None
    row["share_of_ideal"] = row["over_full"] / row["ideal"] if row["over_full"] is not None else None
    return {**row, **contender.facts}


def ratios(timed: list[Timed], steps: int, compared: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    """The comparisons whose two sides were measured, with the ideal by MACs of the faster one."""
    by_name = {entry.contender.name: entry for entry in timed}
    rows = []
    for slower, faster in compared:
        if slower in by_name and faster in by_name:
            ratio = by_name[slower].seconds(steps) / by_name[faster].seconds(steps)
            ideal = by_name[faster].contender.ideal(steps)
            rows.append({"faster": faster, "than": slower, "ratio": ratio, "ideal": ideal})
    return rows


@torch.no_grad()
def whole_loop(timed: list[Timed], loop: TimedLoop, setting: Setting, steps: int, tolerance: float) -> dict[str, Any]:
    """One contender's loop without taking turns, beside the time that was put together for it.

    Where it is an executable and the loop complete, `stepgraph.sample` runs it too; `sample_error` is the distance of its
    latents from those of this loop.

    Raises:
        CompileError: They are further apart than the tolerance, in float32.
    """
    # The slow book's executable, or another one, or whoever was last.
    order = sorted(timed, key=lambda entry: (entry.contender.executable is not None, entry.contender.name == SLOW))
    entry = order[-1]
    runs = loop.run(entry.contender.start())
    seconds, latents = seconds_of(lambda: deque(islice(runs, steps), 1).pop()[1], str(loop.noise.device))
    facts: dict[str, Any] = {
        "name": entry.contender.name, "seconds": seconds, "over_combined": seconds / entry.seconds(steps),
    }  # fmt: skip
    executable = entry.contender.executable
    if executable is not None and steps == setting.steps:
        conditioning: dict[str, Any] = dict(loop.conditioning)
        if loop.guidance > 1:
            halves = {name: value.chunk(2) for name, value in conditioning.items()}
            conditioning = {name: both[0] for name, both in halves.items()}
            conditioning |= {f"negative_{name}": both[1] for name, both in halves.items()}
        facts["sample_seconds"], sampled = seconds_of(
            lambda: sample(executable, setting.scheduler, loop.noise, loop.guidance, **conditioning), str(loop.noise.device)
        )
        facts["sample_error"] = relative_l2(sampled, latents)
        # In 16 bits, runs that round apart at one step part company by the last.
        if loop.noise.dtype == torch.float32 and not facts["sample_error"] <= tolerance:
            raise CompileError(f"stepgraph.sample is {facts['sample_error']:.2e} from the same executable in a plain loop")
        if loop.noise.device.type == "cuda":
            facts |= captured_loop(executable, loop, setting, conditioning, sampled)
    return facts


def captured_loop(
    executable: Executable, loop: TimedLoop, setting: Setting, given: dict[str, Any], latents: torch.Tensor
) -> dict[str, Any]:
    """Seconds of `stepgraph.sample` as one CUDA graph, those of its capture, and its distance from the same without."""

    def run() -> torch.Tensor:
        return sample(executable, setting.scheduler, loop.noise, loop.guidance, capture=True, **given)

    device = str(loop.noise.device)
    capture, _ = seconds_of(run, device)
    seconds, captured = seconds_of(run, device)
    return {"captured_seconds": seconds, "capture_seconds": capture, "captured_error": relative_l2(captured, latents)}


def show_table(console: Console, part: dict[str, Any], title: str) -> None:
    """Rows, then the comparisons."""
    table = Table("", "s/loop", "x eager", "x compile", "x full", "ideal", "share", "error", "build s", title=title)
    for row in part["rows"]:
        columns = [row[name] for name in ("over_eager", "over_torch_compile", "over_full", "ideal", "share_of_ideal")]
        table.add_row(
            row["name"], f"{row['seconds']:.3f}", *("-" if value is None else f"{value:.2f}" for value in columns),
            "-" if row["error"] is None else f"{row['error']:.1e}", f"{row['build_s']:.1f}",
        )  # fmt: skip
    console.print(table)
    comparisons = Table("", "than", "ratio", "ideal", title="comparisons")
    for row in part["ratios"]:
        comparisons.add_row(row["faster"], row["than"], f"{row['ratio']:.2f}", f"{row['ideal']:.2f}")
    console.print(comparisons)
    whole = part["whole_loop"]
    console.print(f"{whole['name']} as a whole loop: {whole['over_combined']:.3f} of the time put together", highlight=False)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The parts asked for; tables are printed as they are done."""
    dtype = getattr(torch, arguments.dtype)
    # Known sizes are refused before billions of weights are drawn.
    known = [family.classes[0] for family in FAMILIES if arguments.model.removesuffix(":random") in family.random]
    refuse_other_class(arguments.model, *known)
    model = sized_model(arguments.model, arguments.device, dtype, arguments.blocks)
    refuse_other_class(arguments.model, type(model).__name__)
    scheduler = load_scheduler(arguments.model)
    setting = Setting(model, scheduler, arguments.steps, arguments.batch, arguments.backend, arguments.plans)
    results: dict[str, Any] = {
        "model": arguments.model, "blocks": len(list(model.get_submodule("transformer_blocks").children())),
        "steps": arguments.steps, "dtype": arguments.dtype, "batch": arguments.batch, "backend": arguments.backend,
        "rounds": arguments.rounds,
    }  # fmt: skip
    title = ", ".join(f"{results[name]} {name}" for name in ("blocks", "steps", "batch"))
    title = f"{arguments.model}, {arguments.dtype}, {arguments.backend}, {title}"
    usual = {name: getattr(arguments, name) for name in ("model", "plans", "dtype", "backend", "device")}
    if "table" in arguments.part:
        results["table"] = table_part(arguments, setting)
        show_table(console, results["table"], title)
    if "overhead" in arguments.part:
        results["overhead"] = overheads(setting)
    if "compile" in arguments.part:
        sizes = {name: getattr(arguments, name) for name in ("blocks", "steps", "batch")}
        results["compile"] = cold_and_warm({**usual, **sizes})
    if "memory" in arguments.part:
        results["memory"] = {name: memory(setting.plan(name), arguments.batch) for name in ("slow", "l2c", "fora2")}
    if "scaling" in arguments.part:
        results["scaling"] = list(scaled(usual))
    return results


def refuse_other_class(name: str, *classes: str) -> None:
    """The plans and peers that are compared here are DiT's."""
    others = [class_name for class_name in classes if class_name != DiTTransformer2DModel.__name__]
    if others:
        raise CompileError(
            f"{name} is a {others[0]}; what is compared here are plans and peers of {DiTTransformer2DModel.__name__}: pass "
            f"dit-xl-2-256:random, glyph-dit, or a diffusers folder of one"
        )


def show_rest(console: Console, results: dict[str, Any]) -> None:
    """What the other parts found, as lines."""
    for name, row in results.get("overhead", {}).items():
        console.print(f"{name} reused: {row['median_us']:.0f} us a call, least {row['least_us']:.0f}", highlight=False)
    for name, row in results.get("compile", {}).items():
        console.print(
            f"{name} disk cache: ready after {row['ready_s']:.1f} s, {row['variants']} variants, regions {row['regions']}",
            highlight=False,
        )
    for name, row in results.get("memory", {}).items():
        console.print(
            f"{name}: peak {row['peak_bytes'] / 1e6:.1f} MB of {row['peak_bytes_always'] / 1e6:.1f}; bytes held over time "
            f"{100 * row['share']:.1f} % of storing every module output always ({row['tensor_steps']} of "
            f"{row['tensor_steps_always']} tensor-steps)",
            highlight=False,
        )
    for row in results.get("scaling", []):
        console.print(
            f"{row['varied']} {row['value']}: compiled in {row['compile_s']:.1f} s, a call with the output reused "
            f"{row['overhead_us']['output']:.0f} us, with all modules reused {row['overhead_us']['modules']:.0f} us",
            highlight=False,
        )


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments, with what follows from others filled in."""
    parser = argparse.ArgumentParser(
        prog="stepgraph bench runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit-xl-2-256:random", help="a DiT: NAME:random, glyph-dit, a diffusers folder")
    parser.add_argument("--blocks", type=int, default=0, help="another number of blocks; NAME:random only")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCES)
    parser.add_argument("--batch", type=int, default=2, help="rows of the model's input: guided images count twice")
    parser.add_argument("--guidance", type=float, help="4 unless given, or 1 for an odd batch")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="loops of each contender")
    parser.add_argument("--segment", type=int, default=0, help="only the first K steps of every loop, ideals included")
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW", help=f"some of: {'; '.join(CONTENDERS)}")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(USUAL))
    parser.add_argument("--plans", type=Path, default=PUBLISHED, help="folder of the published plans")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the results as JSON, and no tables")
    parser.add_argument("--name", help="of the record; runtime-MODEL-DEVICE unless given")
    arguments = parser.parse_args(given)
    if arguments.guidance is None:
        arguments.guidance = 1.0 if arguments.batch % 2 else 4.0
    if not 0 <= arguments.segment <= arguments.steps or arguments.rounds < 1 or arguments.steps < 2 or arguments.batch < 1:
        parser.error("--steps is at least 2, --rounds and --batch at least 1, and --segment at most --steps")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}, but torch sees no CUDA device")
    return arguments


def main(given: list[str] | None = None) -> None:
    """Measure and write `runtime-<model>-<device>.json` and `.png`."""
    arguments = parse_arguments(given)
    # Where there is no terminal to fit into, the tables keep their columns.
    console = Console(width=None if sys.stdout.isatty() else 150, quiet=arguments.as_json)
    try:
        read_env()
        results = measure(arguments, console)
    except (CompileError, PlanError, ValueError) as error:
        if arguments.as_json:
            print(json.dumps({"error": str(error)}))
            raise SystemExit(1) from error
        raise SystemExit(f"error: {error}") from error
    show_rest(console, results)
    model = arguments.model.removesuffix(":random").replace("/", "-")
    name = arguments.name or f"runtime-{model}-{arguments.device.split(':')[0]}"
    write_record(arguments.out / f"{name}.json", arguments.device, results)
    if "table" in results:
        plot_table(results, arguments.out / f"{name}.png")
    if "scaling" in results:
        plot_scaling(results, arguments.out / f"{name}-scaling.png")
    console.print(f"wrote {arguments.out / name}.json", highlight=False)
    if arguments.as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
