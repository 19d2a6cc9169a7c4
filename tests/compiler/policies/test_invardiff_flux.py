"""InvarDiff on FLUX (joint attention, single blocks, the step gate of phase 1), re-derived from saved features."""

import diffusers
import numpy as np
import pytest
import torch

import stepgraph as sg
from helpers.families import FLUX, IMAGE, TEXT, flux_inputs
from stepgraph.errors import PlanError

STEPS, SAMPLES, SEED = 12, 2, 3
DOUBLE = {"attn": "attn", "context_attn": "attn:1", "ff": "ff", "context_ff": "ff_context"}
SINGLE = {"single_attn": "attn", "single_mlp": "act_mlp"}


@pytest.fixture(scope="module")
def model() -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**FLUX).eval()


@pytest.fixture(scope="module")
def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def conditioning() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = flux_inputs()
    return {
        "encoder_hidden_states": torch.randn(SAMPLES, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(SAMPLES, 10, generator=generator),
        "guidance": torch.full((SAMPLES,), 3.5),
        "img_ids": ids["img_ids"],
        "txt_ids": ids["txt_ids"],
    }


@pytest.fixture(scope="module")
def stats(model, scheduler) -> sg.CalibrationStats:
    return sg.calibrate(
        model, scheduler, steps=STEPS, samples=SAMPLES, seed=SEED, inputs=flux_inputs(), conditioning=conditioning()
    )


@pytest.fixture(scope="module")
def features(model, scheduler) -> list[list[dict[str, np.ndarray]]]:
    """Values by sample and step, from forward hooks on a loop like the pipeline's."""
    runs, seen, hooks = [], {}, []

    def keep(name):
        def hook(module, args, out):
            for position, value in enumerate(out if isinstance(out, tuple) else (out,)):
                seen[name + (f":{position}" if position else "")] = value.double().numpy()

        return hook

    places = [f"transformer_blocks.{i}.{m}" for i in range(2) for m in ("attn", "ff", "ff_context")]
    places += [f"single_transformer_blocks.{i}.{m}" for i in range(2) for m in ("attn", "act_mlp")]
    hooks += [model.get_submodule(place).register_forward_hook(keep(place)) for place in places]
    hooks.append(model.norm_out.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0].double().numpy())))
    generator, given = torch.Generator().manual_seed(SEED), conditioning()
    for sample in range(SAMPLES):
        latents = torch.randn(1, IMAGE, 4, generator=generator)
        own = {name: v if name.endswith("_ids") else v[sample : sample + 1] for name, v in given.items()}
        scheduler.set_timesteps(STEPS)
        steps = []
        for t in scheduler.timesteps:
            with torch.no_grad():
                out = model(hidden_states=latents, timestep=t.reshape(1) / 1000, **own, return_dict=False)[0]
            steps.append(dict(seen))
            latents = scheduler.step(out, t, latents, return_dict=False)[0]
        runs.append(steps)
    for hook in hooks:
        hook.remove()
    return runs


def rates(features, name, provisional=None):
    table = []
    for run in features:
        z, row = [step[name] for step in run], [1.0] * STEPS
        previous, current, frozen = z[0], z[1], False
        for s in range(2, STEPS):
            row[s - 1] = np.abs(z[s] - current + 1e-8).sum() / np.abs(current - previous + 1e-8).sum()
            hit = provisional is not None and provisional[s - 1]
            if not (hit and frozen):
                previous, current = current, z[s]
            frozen = hit
        table.append(row)
    return np.mean(table, axis=0)


def by_hand(features, taus, nonskip):
    """FLUX's code: phase 1 for the step gate, phase 2 for the modules from a plan that protects row 0 and the last."""
    names = {kind: [f"transformer_blocks.{i}.{m}" for i in range(2)] for kind, m in DOUBLE.items()}
    names = {k: [n.replace(".attn:1", ".attn") + (":1" if k == "context_attn" else "") for n in v] for k, v in names.items()}
    names |= {kind: [f"single_transformer_blocks.{i}.{m}" for i in range(2)] for kind, m in SINGLE.items()}

    def hits(kind, own, first, provisional=None):
        table = np.stack([rates(features, n, provisional and provisional[n]) for n in own], axis=1)
        limit = np.quantile(table[1:-1].ravel(), taus[kind])
        return {n: [first <= s < STEPS - 1 and table[s, i] < limit for s in range(STEPS)] for i, n in enumerate(own)}

    first = max(1, int(nonskip * STEPS))
    gate = hits("step", ["hidden"], first)["hidden"]
    found = {}
    for kind, own in names.items():
        found |= hits(kind, own, first, hits(kind, own, 1))
    for s in range(STEPS):
        for n in found:
            found[n][s] = bool(gate[s] or (found[n][s] and not gate[s - 1]))
        for i in range(2):
            image, text = f"transformer_blocks.{i}.attn", f"transformer_blocks.{i}.attn:1"
            # The joint attention is skipped only where both of its outputs are hits.
            found[image][s] = found[text][s] = found[image][s] and found[text][s]
    return found, gate


@pytest.mark.parametrize(
    ("taus", "nonskip"),
    [
        ({"step": 0.4, "attn": 0.7, "ff": 0.5, "context_ff": 0.3, "single_attn": 0.6, "single_mlp": 0.4}, 0.2),
        ({"step": 0.0, "attn": 0.8, "ff": 0.8, "context_ff": 0.0, "single_attn": 0.2, "single_mlp": 0.9}, 0.1),
        ({"step": 0.7, "attn": 0.68, "ff": 0.68, "context_ff": 0.68, "single_attn": 0.68, "single_mlp": 0.68}, 0.1),
    ],
)
def test_the_booleans_of_flux_code(model, scheduler, stats, features, taus, nonskip):
    wanted, gate = by_hand(features, taus | {"context_attn": taus["attn"]}, nonskip)
    plan = sg.make_plan(
        "invardiff", stats, model=model, scheduler=scheduler, nonskip=nonskip, guidance="none",
        example_inputs=flux_inputs(), conditioning=conditioning(), **taus,
    )  # fmt: skip
    for s in range(STEPS):
        assert plan.action(s, "hidden").value == ("R" if gate[s] else "C"), s
        for name, hits in wanted.items():
            assert plan.action(s, name).value == ("." if gate[s] else "R" if hits[s] else "C"), (s, name)
    assert any(hit and not gate[s] for hits in wanted.values() for s, hit in enumerate(hits))


def test_thresholds_not_given_are_those_of_their_like(stats):
    few = sg.make_plan("invardiff", stats, step=0.0, attn=0.5, ff=0.3, phase2=False)
    all_given = sg.make_plan(
        "invardiff", stats, step=0.0, attn=0.5, ff=0.3, context_ff=0.3, single_attn=0.5, single_mlp=0.3, phase2=False
    )
    assert few.rows == all_given.rows


def test_what_flux_needs_is_asked_for(model, scheduler, stats):
    with pytest.raises(sg.CompileError, match=r"conditioned on text embeddings.*calibrate with conditioning="):
        sg.calibrate(model, scheduler, steps=3, samples=1, inputs=flux_inputs())
    with pytest.raises(PlanError, match="other conditioning"):
        sg.make_plan("invardiff", stats, model=model, scheduler=scheduler, example_inputs=flux_inputs())
