"""Learning-to-Cache on glyph-dit, trained for real: its plans against random plans of equal sparsity.

    python -m stepgraph.bench.quality.train_routers --steps 20 --out out/l2c

For every lambda (and every run length) routers are trained, thresholded and sampled with guidance. The error is the relative L2
of the final image against full compute from the same noise. The random plans reuse as many module calls of the same routed
steps: drawn `freely` among all of them, or with each step's number kept (`per step`). Trainings leave checkpoints in the output
folder; a second call goes on from them.
"""

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from stepgraph.bench.quality.paired import Host, host_options
from stepgraph.bench.record import write_record
from stepgraph.bench.tables import show_rows
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.traced_model import TracedModel, marked_graph
from stepgraph.compiler.routers.mixed_model import MixedModel
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_states import Conditioning, Sampling, Trajectories
from stepgraph.files.whole_file import save_figure
from stepgraph.plan import COMPUTE, REUSE, CachePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan_of(base: CachePlan, router: Router, reused: torch.Tensor) -> CachePlan:
    """A plan that reuses the module calls [T, sites] bool."""
    letters = ["".join(REUSE if hit else COMPUTE for hit in column) for column in reused.T.tolist()]
    return CachePlan.build(base.header, base.sites, dict(zip((site.name for site in router.sites), letters, strict=True)))


def random_reuse(router: Router, reused: torch.Tensor, per_step: bool, generator: torch.Generator) -> torch.Tensor:
    """As many reuses as `reused`, [T, sites] bool, at random among the routed calls; with `per_step`, as many at each step."""
    drawn = torch.zeros_like(reused)
    columns = reused.shape[1]
    if per_step:
        for step, count in enumerate(reused.sum(dim=1).tolist()):
            drawn[step, torch.randperm(columns, generator=generator)[:count]] = True
        return drawn
    routed = [step for step, full in enumerate(router.full) if not full]
    calls = torch.randperm(len(routed) * columns, generator=generator)[: int(reused.sum())]
    drawn[torch.tensor(routed)[calls // columns], calls % columns] = True
    return drawn


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest of some numbers."""
    return {"least": min(values), "median": median(values), "most": max(values)}


def main() -> None:
    """Train, measure and write `l2c-<scheduler>-<steps>.json` and `.png`."""
    parser = host_options(__doc__, out="out/l2c")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 3], help="routed steps after each full one")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--theta", type=float, default=0.5)
    parser.add_argument("--run-lambdas", type=float, nargs="+", default=[1e-4], help="lambdas of the runs longer than pairs")
    parser.add_argument("--random", type=int, default=20, help="random plans for each trained one of pairs, drawn freely")
    parser.add_argument("--per-step", type=int, default=5, help="the same with each step's number of reuses kept")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    host = Host.of(arguments, [0])
    base = make_plan("full", model=host.model, scheduler=host.scheduler, steps=arguments.steps)
    rows, routers = [], {}
    with Progress() as progress:
        for run in arguments.runs:
            for lam in arguments.lambdas if run == 1 else arguments.run_lambdas:
                router = trained(host, arguments, run, lam, progress)
                routers[run, lam] = router
                with torch.no_grad():
                    rows.append(measured(host, base, router, arguments, progress))
        with torch.no_grad():
            references = [reference_row(host, every, progress) for every in (2, 3, 4)]
            pairs = next((router for (run, _), router in routers.items() if run == 1), None)
            # Many plans, of which only the order counts: fewer images do.
            few = Host(arguments.scheduler, arguments.steps, arguments.guidance, [0], min(32, arguments.samples), host.device)
            ranking = loss_against_image(few, base, pairs, progress) if pairs is not None else None
    name = f"l2c-{arguments.scheduler}-{arguments.steps}"
    results = {
        **host.facts, "theta": arguments.theta, "settings": asdict(next(iter(routers.values())).settings), "rows": rows,
        "references": references, "loss_against_image": ranking,
    }  # fmt: skip
    write_record(arguments.out / f"{name}.json", arguments.device, results)
    save_figure(arguments.out / f"{name}.png", picture(rows, references, routers))
    print_table(rows, references)


def trained(host: Host, arguments: Any, run: int, lam: float, progress: Progress) -> Router:
    """Routers of one lambda and run length; a finished checkpoint is only read."""
    path = arguments.out / f"{arguments.scheduler}-{arguments.steps}-run{run}-lambda{lam:g}.checkpoint.safetensors"
    what, changes = f"run {run}, lambda {lam:g}: training", {"lam": lam, "run": run, "iterations": arguments.iterations}
    return host.trained_router(progress, what, path, **changes)


def measured(host: Host, base: CachePlan, router: Router, arguments: Any, progress: Progress) -> dict[str, Any]:
    """One row: the trained plan, and for pairs the random plans of equal sparsity."""
    reused = router.reused(arguments.theta)
    counts = {"random_free": arguments.random, "random_per_step": arguments.per_step} if router.settings.run == 1 else {}
    what = f"run {router.settings.run}, lambda {router.settings.lam:g}: sampling"
    bar = progress.add_task(what, total=1 + sum(counts.values()))
    plan = plan_of(base, router, reused)
    errors = host.errors(host.images(host.compiled(plan)))
    progress.advance(bar)
    undecided = (torch.sigmoid(router.logits)[~torch.tensor(router.full)] - 0.5).abs() < 0.4
    row: dict[str, Any] = {
        "run": router.settings.run, "lambda": router.settings.lam, "reused_calls": int(reused.sum()),
        "reused_share_of_routed": float(reused[~torch.tensor(router.full)].double().mean()),
        "reused_by_step": reused.sum(dim=1).tolist(), "fewer_macs": plan.summary().ideal_speedup,
        "relative_l2": float(errors.mean()), "standard_error": float(errors.std() / len(errors) ** 0.5),
        "undecided_share": float(undecided.double().mean()),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, count in counts.items():
        random_errors = []
        for _ in range(count):
            other = plan_of(base, router, random_reuse(router, reused, name == "random_per_step", generator))
            random_errors.append(float(host.errors(host.images(host.compiled(other))).mean()))
            progress.advance(bar)
        if random_errors:
            row[name] = spread(random_errors) | {"plans": count, "ratio": row["relative_l2"] / median(random_errors)}
    return row


def reference_row(host: Host, every: int, progress: Progress) -> dict[str, Any]:
    """FORA and the same sampler in fewer steps."""
    plan = make_plan("interval", model=host.model, scheduler=host.scheduler, steps=host.steps, every=every)
    bar = progress.add_task(f"references, {every}", total=2)
    fora = host.errors(host.images(host.compiled(plan)))
    progress.advance(bar)
    fewer = host.errors(host.images(host.model, steps=round(host.steps / every)))
    progress.advance(bar)
    return {
        "fora_every": every, "fora_fewer_macs": plan.summary().ideal_speedup, "fora_relative_l2": float(fora.mean()),
        "fewer_steps": round(host.steps / every), "fewer_steps_relative_l2": float(fewer.mean()),
    }  # fmt: skip


def loss_against_image(host: Host, base: CachePlan, router: Router, progress: Progress) -> dict[str, Any]:
    """Does the training's loss (the next output's error) rank reuses as the final image's error does?

    Every kind of module is reused at one routed step at a time. `output_error` is the mean squared error of the prediction of
    that step, without guidance, as the training sees it; `image_error` the relative L2 of the final image, over fewer images
    than the rows above: the differences between steps are large.
    """
    steps = [step for step, full in enumerate(router.full) if not full]
    kinds = list(dict.fromkeys(site.kind for site in router.sites))
    bar = progress.add_task("loss against image", total=len(steps) * len(kinds))
    how = Sampling(TracedModel(host.model), host.scheduler, host.steps, host.example(1))
    states = Trajectories(how, Conditioning.of_pool(how, None, 64, 0.0), 64, 64, 0.0, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(0)
    soft: MixedModel | None = None
    rows = []
    for step in steps:
        window = states.window(torch.full((64,), step - 1), 1, generator)
        soft = soft or MixedModel(host.model, marked_graph(host.model, window.inputs[0]))
        _, stored = soft.fill(window.inputs[0])
        for kind in kinds:
            reused = torch.zeros(len(router.full), len(router.sites), dtype=torch.bool)
            reused[step] = torch.tensor([site.kind == kind for site in router.sites])
            output, _ = soft.mix(window.inputs[1], stored, (~reused[step]).float().expand(64, -1).to(host.device))
            image = host.errors(host.images(host.compiled(plan_of(base, router, reused)))).mean()
            error = (output - window.targets[0]).square().mean()
            rows.append({"step": step, "kind": kind, "output_error": float(error), "image_error": float(image)})
            progress.advance(bar)
    ranks = torch.tensor([[row["output_error"], row["image_error"]] for row in rows]).argsort(dim=0).argsort(dim=0)
    return {"rank_correlation": float(torch.corrcoef(ranks.T.double())[0, 1]), "rows": rows}


def picture(rows: list[dict[str, Any]], references: list[dict[str, Any]], routers: dict[tuple[int, float], Router]) -> "Figure":
    """The routers of the middle lambda as a heat map, and error against MACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    pairs = [key for key in routers if key[0] == min(run for run, _ in routers)]
    router = routers[pairs[len(pairs) // 2]]
    table = torch.where(torch.tensor(router.full)[:, None], torch.nan, torch.sigmoid(router.logits))
    image = left.imshow(table.T, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="nearest")
    left.set(
        title=f"trained beta, lambda {router.settings.lam:g} (white: full step)",
        xlabel="step",
        ylabel="attention, ff of each block",
    )
    figure.colorbar(image, ax=left, label="0 reuses, 1 computes")
    for run in sorted({row["run"] for row in rows}):
        points = sorted((row["fewer_macs"], row["relative_l2"]) for row in rows if row["run"] == run)
        right.plot(*zip(*points, strict=True), "o-", label=f"L2C, {run} routed step{'s' if run > 1 else ''}")
    for name, colour in (("random_free", "tab:gray"), ("random_per_step", "tab:brown")):
        drawn = [row for row in rows if name in row]
        centre = [row[name]["median"] for row in drawn]
        ends = [
            [row[name]["median"] - row[name]["least"] for row in drawn],
            [row[name]["most"] - row[name]["median"] for row in drawn],
        ]
        label = name.replace("_", ", ", 1).replace("_", " ") + " (median, range)"
        right.errorbar([row["fewer_macs"] for row in drawn], centre, ends, fmt="s", color=colour, capsize=3, label=label)
    right.plot([r["fora_fewer_macs"] for r in references], [r["fora_relative_l2"] for r in references], "k^--", label="FORA")
    right.set(
        xlabel="times fewer MACs", ylabel="relative L2 of the final image", yscale="log", title="error against full compute"
    )
    right.legend(fontsize=8)
    return figure


def print_table(rows: list[dict[str, Any]], references: list[dict[str, Any]]) -> None:
    """The rows on the terminal."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        line = {"name": f"run {row['run']}, lambda {row['lambda']:g}", "reused": row["reused_share_of_routed"]}
        line |= {name: row[name] for name in ("fewer_macs", "relative_l2")}
        for name in ("random_free", "random_per_step"):
            if name in row:
                line |= {name: row[name]["median"], f"over_{name}": row[name]["ratio"]}
        lines.append(line)
    for entry in references:
        fewer, error = entry["fora_fewer_macs"], entry["fora_relative_l2"]
        lines.append({"name": f"FORA, every {entry['fora_every']}", "fewer_macs": fewer, "relative_l2": error})
        fewer, error = entry["fora_every"], entry["fewer_steps_relative_l2"]
        lines.append({"name": f"{entry['fewer_steps']} steps", "fewer_macs": fewer, "relative_l2": error})
    columns = ("random_free", "over_random_free", "random_per_step", "over_random_per_step")
    show_rows("Learning-to-Cache on glyph-dit", lines, ("name", "fewer_macs", "reused", "relative_l2", *columns))


if __name__ == "__main__":
    main()
