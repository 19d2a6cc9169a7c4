"""Commands on the shipped text-conditioned model."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.command_line import error_of, invoke
from helpers.distance import SAME_RUN, error
from stepgraph.assets.flux_emoji import load_flux_emoji, unpacked
from stepgraph.plan import CachePlan

PROMPTS = ("pizza on mint", "rainbow on snow")


@pytest.fixture(scope="module")
def eager() -> torch.Tensor:
    """What diffusers' own pipeline draws, [2, 3, 32, 32] in 0..1."""
    pipe, encoder = load_flux_emoji()
    noise = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(3))
    return pipe(
        **encoder.arguments(PROMPTS, 2.0), height=32, width=32, num_inference_steps=28, latents=noise, output_type="pt"
    ).images


def drawn(out: Path) -> torch.Tensor:
    return (unpacked(load_file(out / "samples.safetensors")["latents"]) / 2 + 0.5).clamp(0, 1)


def prompted(*more: object) -> tuple[object, ...]:
    prompts = (word for prompt in PROMPTS for word in ("--prompt", prompt))
    return ("run", "flux-emoji", *prompts, "--images", 2, "--seed", 3, *more)


@pytest.mark.slow
def test_run_draws_what_the_pipeline_draws(eager: torch.Tensor, tmp_path: Path):
    invoke(*prompted("--out", tmp_path))
    assert error(drawn(tmp_path), eager) < SAME_RUN
    assert Image.open(tmp_path / "samples.png").size == (2 * 32 * 3, 32 * 3)


@pytest.mark.slow
def test_a_plan_is_made_and_run(eager: torch.Tensor, tmp_path: Path):
    path = tmp_path / "plan.json"
    invoke("plan", "make", "--policy", "interval", "--model", "flux-emoji", "--steps", 28, "-a", "every=2", "-o", path)
    assert CachePlan.load(path).header.shapes["hidden_states"] == (64, 48)
    facts = json.loads(invoke(*prompted("--plan", path, "--compare", "--json", "--out", tmp_path)))
    assert 0 < facts["relative_l2"] < 0.5
    assert error(drawn(tmp_path), eager) > SAME_RUN


@pytest.mark.slow
def test_routers_and_fits_take_the_captions_too(tmp_path: Path):
    router, plan = tmp_path / "router.safetensors", tmp_path / "plan.json"
    few = ("-a", "iterations=1", "-a", "pool=2", "-a", "batch=2")
    invoke("plan", "train-router", "flux-emoji", "--steps", 4, *few, "-o", router)
    made = ("plan", "make", "--model", "flux-emoji", "--steps", 4, "-o", plan)
    invoke(*made, "--policy", "l2c", "-a", f"router={router}", "-a", "theta=1.0")
    routed = CachePlan.load(plan)
    assert ["R" in row for row in routed.rows] == [False, True, False, True]
    invoke(*made, "--policy", "l2c", *few)
    assert CachePlan.load(plan).header.timesteps == routed.header.timesteps
    invoke(*made, "--policy", "whole-step", "-a", "samples=2")
    assert CachePlan.load(plan).header.samples == 2


@pytest.mark.slow
def test_calibrated_plans(tmp_path: Path):
    stats, path = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    invoke("calibrate", "flux-emoji", "--steps", 4, "--samples", 2, "--guidance", 2.0, "--no-channels", "-o", stats)
    invoke("plan", "make", "--policy", "invardiff", "--model", "flux-emoji", "--stats", stats, "-o", path)
    assert CachePlan.load(path).header.schedule.sigmas == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.slow
def test_demo(tmp_path: Path):
    facts = json.loads(
        invoke("demo", "--model", "flux-emoji", "--steps", 4, "--images", 2, "--rounds", 1, "--out", tmp_path, "--json")
    )
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["eager diffusers", "full", "FORA N=2", "whole-step N=2"]
    assert rows["full"]["relative_l2"] <= SAME_RUN < rows["FORA N=2"]["relative_l2"]
    assert rows["eager diffusers"]["gmacs"] == pytest.approx(rows["full"]["gmacs"])
    assert [Path(picture).name for picture in facts["pictures"]] == [
        f"demo-flux-emoji-{name}.png" for name in ("images", "difference", "plan-fora", "plan-whole-step")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("run", "flux-emoji", "--prompt", "pizzza on mint"),
            "does not know the word 'pizzza' of 'pizzza on mint'; the nearest known ones are pizza",
        ),
        (("run", "glyph-dit", "--prompt", "pizza on mint"), "--prompt is for the model flux-emoji"),
        (("demo", "--model", "flux-dev"), "no shipped model 'flux-dev'"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], said: str):
    assert said in error_of(*arguments)
