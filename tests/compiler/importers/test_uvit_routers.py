"""Learning-to-Cache's routers for U-ViT."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverSinglestepScheduler,
)

import stepgraph as sg
from helpers.published import BLOCKS, column
from helpers.tiny import tiny_dit
from stepgraph.errors import PlanError


@pytest.fixture(scope="module")
def uvit():
    """Five blocks, without weights."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    with torch.device("meta"):
        return UTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
            block_type="pre_norm", pre_layer_norm=True, use_patch_pos_embed=True,
        ).eval()  # fmt: skip


UVIT_BLOCKS = ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0.block", "out_blocks.1.block")


@pytest.mark.parametrize("name", ["{}", "routers.{}.prob"])
def test_uvit_routers_are_shifted_by_half_a_solver_step(uvit, tmp_path: Path, name: str):
    # Eight evaluations are four solver steps: routers 1, 2 and 3 are used, at the evaluations 2, 4 and 6.
    logits = torch.full((8, 10), -9.0)
    logits[1, 0] = 9.0  # block 0's attention is computed at evaluation 2
    logits[2, 5] = 9.0  # the middle block's feed-forward at evaluation 4
    logits[3, 9] = 2.0  # the last block's feed-forward at evaluation 6, if 0.88 is above theta
    # Written in an order that is not theirs.
    data = OrderedDict((name.format(i), logits[i].clone()) for i in (3, 1, 0, 2, 7, 6, 5, 4))
    torch.save(data, tmp_path / "dpm.pth")
    scheduler = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=True)
    plan = sg.import_plan(tmp_path / "dpm.pth", uvit, scheduler, steps=8)
    skipping = {f"transformer_{path}.{child}": "CCRCRCRC" for path in UVIT_BLOCKS for child in ("attn1", "ff")}
    skipping["transformer_in_blocks.0.attn1"] = "CCCCRCRC"
    skipping["transformer_mid_block.ff"] = "CCRCCCRC"
    assert {site.name: column(plan, site.name) for site in plan.sites if site.path} == skipping
    lower = sg.import_plan(tmp_path / "dpm.pth", uvit, scheduler, steps=8, theta=0.5)
    assert column(lower, "transformer_out_blocks.1.block.ff") == "CCRCRCCC"
    # Each reads what the evaluation before it stored, at the point within the solver step before.
    assert scheduler.get_order_list(8)[:6] == [1, 2, 1, 2, 1, 2]
    with pytest.raises(PlanError, match=r"is \[10\]; expected \[4\], two logits per block"):
        sg.import_plan(tmp_path / "dpm.pth", tiny_dit(num_layers=BLOCKS), DDIMScheduler(), steps=8)
