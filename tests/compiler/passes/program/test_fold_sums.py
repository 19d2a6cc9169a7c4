"""Values that are only added up are stored as one sum; nothing changes but rounding."""

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import UVIT, uvit_inputs
from helpers.pixart_sd3 import PIXART, pixart_inputs, planned
from helpers.tiny import inputs, tiny_dit, tiny_scheduler
from stepgraph.plan import CachePlan

STEPS = 6


def stepped(exe: sg.Executable, given) -> list[torch.Tensor]:
    """The outputs of all steps, each for other latents."""
    session, outputs = exe.session(), []
    for number, t in enumerate(exe.plan.header.timesteps):
        latents = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(number))
        timestep = torch.full_like(given["timestep"], int(t))
        outputs.append(session(**{**given, "hidden_states": latents, "timestep": timestep}, return_dict=False)[0])
    assert session.peak_slot_bytes == exe.memory().peak_slot_bytes
    return outputs


def stored(model, plan: CachePlan, given, monkeypatch, backend: str = "eager") -> tuple[int, int]:
    """How many values a run stores with and without sums.

    Both give what the exact executable gives, which other tests compare with the model itself.
    """
    exact = stepped(sg.compile(model, plan, given, backend="eager", exact=True), given)
    counts = []
    for disabled in ("", "fold_sums"):
        monkeypatch.setenv("STEPGRAPH_DISABLE_PASS", disabled)
        exe = sg.compile(model, plan, given, backend=backend)
        assert all(error(*pair) < SAME_RUN for pair in zip(stepped(exe, given), exact, strict=True))
        counts.append(exe.memory().values_stored)
    return counts[0], counts[1]


def plan_of(model, actions) -> CachePlan:
    return sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=STEPS, actions=actions)


def pixart_plan(model, actions) -> CachePlan:
    return planned(model, pixart_inputs(), actions, STEPS)


@pytest.fixture(scope="module")
def pixart():
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**(PIXART | {"num_layers": 3})).eval(), pixart_inputs(2)


ALWAYS, EVERY = "CRCRCR", "CRRCRR"


@pytest.mark.parametrize(
    ("actions", "summed", "apart"),
    [
        # All modules of three blocks in one run: attn 3, ff 3, and one sum of the three cross-attentions; stored three times.
        ({"attn": ALWAYS, "cross_attn": ALWAYS, "ff": ALWAYS}, 3 * 7, 3 * 9),
        ({"attn": EVERY, "cross_attn": EVERY, "ff": EVERY}, 2 * 7, 2 * 9),
        # Feed-forwards between them compute on what the sums so far give.
        ({"attn": ALWAYS, "cross_attn": ALWAYS}, 3 * 6, 3 * 6),
        # In one of the rows they stand apart: the values are needed one by one.
        ({"attn": "CRRCRR", "cross_attn": "CRRCRR", "ff": "CRCCRC"}, 2 * 9, 2 * 9),
    ],
)
def test_cross_attentions_without_gates(pixart, actions, summed, apart, monkeypatch):
    model, given = pixart
    assert stored(model, pixart_plan(model, actions), given, monkeypatch) == (summed, apart)


def test_what_is_reused_at_other_steps_stays_alone(pixart, monkeypatch):
    """Block 0's cross-attention is computed where the others are reused; the two others are always together."""
    model, given = pixart
    actions = {"attn": ALWAYS, "cross_attn": ALWAYS, "ff": ALWAYS}
    plan = pixart_plan(model, actions)
    first = next(i for i, site in enumerate(plan.sites) if site.kind == "cross_attn")
    rows = [row if step != 3 else row[:first] + "C" + row[first + 1 :] for step, row in enumerate(plan.rows)]
    plan = CachePlan(plan.header, plan.sites, tuple(rows))
    assert stored(model, plan, given, monkeypatch) == (3 * 8 - 1, 3 * 9 - 1)


@pytest.mark.slow
def test_compiled_regions_store_the_sum(pixart, monkeypatch):
    model, given = pixart
    actions = {"attn": ALWAYS, "cross_attn": ALWAYS, "ff": ALWAYS}
    assert stored(model, pixart_plan(model, actions), given, monkeypatch, "inductor") == (3 * 7, 3 * 9)


def test_branches_without_gates(monkeypatch):
    """U-ViT adds attention and feed-forward as they are; skips read the tokens between blocks, so that sums end there."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    torch.manual_seed(0)
    model = UTransformer2DModel(**UVIT).eval()
    plan = plan_of(model, {"attn": ALWAYS, "ff": ALWAYS})
    blocks = sum(site.kind == "ff" for site in plan.sites)
    assert stored(model, plan, uvit_inputs(2), monkeypatch) == (3 * blocks, 3 * 2 * blocks)


def test_gates_keep_values_apart(monkeypatch):
    model = tiny_dit()
    assert stored(model, plan_of(model, {"attn": ALWAYS, "ff": ALWAYS}), inputs(2), monkeypatch) == (3 * 4, 3 * 4)


def test_exact_executables_keep_every_value(pixart):
    model, given = pixart
    plan = pixart_plan(model, {"attn": ALWAYS, "cross_attn": ALWAYS, "ff": ALWAYS})
    exe = sg.compile(model, plan, given, backend="eager", exact=True)
    assert exe.memory().values_stored == 3 * 9
    assert not exe.default.folded
