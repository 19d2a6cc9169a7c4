"""Learning-to-Cache: reuse where a trained router says so (arXiv 2406.01733)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.errors import ArgumentError, MismatchError
from stepgraph.plan import COMPUTE, REUSE, Site


def l2c(
    sites: Sequence[Site],
    steps: int,
    stats: Any = None,
    *,
    theta: float = 0.5,
    router: str | None = None,
    preset: str = "quick",
    lam: float | None = None,
    lr: float | None = None,
    iterations: int | None = None,
    batch: int | None = None,
    init: float | None = None,
    label_dropout: float | None = None,
    states: str | None = None,
    pool: int | None = None,
    run: int | None = None,
    shift: int | None = None,
    seed: int | None = None,
    train: Callable[..., Any] | None = None,
) -> Mapping[str, str]:
    """Full and routed steps alternate; on a routed step a module is computed where sigmoid(logit) > theta.

    The logits are trained by gradient on the model itself, or come from a file of an earlier training, so that theta can be
    swept without training again. Settings that are not given are the preset's.

    Args:
        sites: The model's sites.
        steps: T.
        stats: Not used.
        theta (0..1): Threshold on the sigmoid of a logit. Trained to the end, most weights lie near 0 or 1, and the paper takes
            0.1 (DiT) or 0.9 (U-ViT, DiT at 512); after a short training 0.5 splits them best.
        router: A file written by `Router.save`; nothing is trained then, and no setting below may be given.
        preset: "quick" (minutes on a CPU), "dit" or "u-vit" (the paper's code).
        lam: Weight of the computed share in the loss; larger reuses more.
        lr: Learning rate.
        iterations: Number of updates.
        batch: Samples per update.
        init: Standard deviation of the first logits.
        label_dropout: Share of samples that are conditioned on nothing.
        states: "q_sample" (noised clean latents) or "trajectory" (states of real sampling runs).
        pool: Number of samples or runs to train on, and of the rows of the conditioning where that is given.
        run: Routed steps after each full one; 1 in the paper.
        shift: The first full step of the rhythm; 0 for DiT, 1 for U-ViT under DPM-Solver-2.
        seed: Of the training.
        train: Gives the routers: (file or None, preset, settings) -> Router. `make_plan` supplies it from the model.

    Raises:
        PlanError: An argument is out of range, or there is neither a model to train on nor a file.
    """
    settings = {
        "lam": lam, "lr": lr, "iterations": iterations, "batch": batch, "init": init,
        "label_dropout": label_dropout, "states": states, "pool": pool, "run": run, "shift": shift, "seed": seed,
    }  # fmt: skip
    changes = {name: value for name, value in settings.items() if value is not None}
    if router is not None and changes:
        raise ArgumentError(f"router names trained routers, so the setting {next(iter(changes))!r} has no effect; leave it out")
    if train is None:
        raise ArgumentError(
            "the policy 'l2c' trains on the model: make its plan with make_plan(..., model=, scheduler=, steps=)"
        )
    trained = train(router, preset, changes)
    routed, known = [site.name for site in trained.sites], {site.name for site in sites}
    unknown = [name for name in routed if name not in known]
    if unknown:
        raise MismatchError(f"the routers are for the site {unknown[0]!r}, which this model does not have")
    reused = trained.reused(theta)
    return {name: "".join(REUSE if hit else COMPUTE for hit in reused[:, i].tolist()) for i, name in enumerate(routed)}


L2C = Policy(l2c, source="Learning-to-Cache, arXiv 2406.01733", measures=True)
