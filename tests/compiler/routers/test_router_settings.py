"""Which steps are routed, and the presets."""

import pytest

from stepgraph.compiler.routers.router_settings import PRESETS, RouterSettings, full_steps, settings_of
from stepgraph.errors import PlanError


@pytest.mark.parametrize(
    ("steps", "run", "shift", "letters"),
    [
        (6, 1, 0, "F.F.F."),
        (5, 1, 0, "F.F.F"),
        (7, 2, 0, "F..F..F"),
        (8, 3, 0, "F...F..."),
        # Two evaluations per solver step: the cache is filled at the second one and read at the first one of the next step.
        (8, 1, 1, "FF.F.F.F"),
        (8, 2, 1, "FF..F..F"),
    ],
)
def test_which_steps_are_full(steps, run, shift, letters):
    assert "".join("F" if full else "." for full in full_steps(steps, run, shift)) == letters


@pytest.mark.parametrize("steps", [2, 10, 20, 50])
def test_pairs_are_those_of_ascending_timestep_indices(steps):
    """L2C counts indices upwards in time: odd ones are full, even ones routed."""
    by_index = [index % 2 == 1 for index in range(steps)]
    assert list(full_steps(steps)) == by_index[::-1]


def test_presets_are_the_papers_settings():
    paper = RouterSettings()
    assert (paper.lr, paper.clamp, paper.label_dropout, paper.batch, paper.loss) == (1e-3, 5.0, 0.1, 64, "mean")
    assert settings_of("dit") == paper
    shifted = settings_of("u-vit")
    assert (shifted.lam, shifted.loss, shifted.clamp, shifted.shift) == (0.1, "sum", None, 1)
    assert all(settings_of(name) for name in PRESETS)
    with pytest.raises(PlanError, match="routers have no setting 'nose'"):
        settings_of("dit", {"nose": 1})
