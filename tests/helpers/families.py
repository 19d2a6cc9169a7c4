"""Tiny FLUX and U-ViT models, their inputs and plans."""

import torch
from hypothesis import strategies as st

import stepgraph as sg
from helpers.oracle import run_loop
from stepgraph.plan import STREAM_KINDS, CachePlan, canonical

IMAGE, TEXT, WIDTH, STEPS = 16, 5, 32, 4


FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True}  # fmt: skip


UVIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "sample_size": 8, "patch_size": 2, "activation_fn": "gelu", "block_type": "pre_norm", "pre_layer_norm": True,
        "use_patch_pos_embed": True}  # fmt: skip


def flux_inputs(batch: int = 1, image: int = IMAGE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.arange(image)
    return {
        "hidden_states": torch.randn(batch, image, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": torch.stack([0 * ids, ids // 4, ids % 4], dim=1).float(),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def uvit_inputs(batch: int = 1) -> dict[str, torch.Tensor]:
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))
    return {"hidden_states": noise, "timestep": torch.full((batch,), 500)}


def flux_plan(model, scheduler, actions: dict[str, str], steps: int = STEPS) -> CachePlan:
    return sg.make_plan(
        "manual", model=model, scheduler=scheduler, steps=steps, guidance="none", example_inputs=flux_inputs(), actions=actions
    )


@st.composite
def random_rows(draw, sites, steps: int) -> tuple[str, ...]:
    """Rows of a valid plan: sites reused at random where they have been computed before, in canonical form."""
    rows: list[str] = []
    stored = [False] * len(sites)
    for _ in range(steps):
        replaced = draw(
            st.sampled_from([None, None, *(i for i, s in enumerate(sites) if s.kind in STREAM_KINDS and stored[i])])
        )
        wanted = [stored[i] and site.kind not in STREAM_KINDS and draw(st.booleans()) for i, site in enumerate(sites)]
        row = canonical(sites, "".join("R" if i == replaced or wanted[i] else "C" for i in range(len(sites))))
        stored = [was or letter == "C" for was, letter in zip(stored, row, strict=True)]
        rows.append(row)
    return tuple(rows)


def compare(model, plan: CachePlan, oracle, scheduler, inputs, run, unread: int | None = 0) -> sg.Executable:
    """Run a plan as program and as oracle; all outputs and the final latents are equal, bit for bit.

    `unread`: multiply-accumulates per sample that no step runs because only sites that it reuses read what they make, which
    the plan's own count, of each site by itself, does not know. None where they are not counted.
    """
    exe = sg.compile(model, plan, inputs, backend="eager", exact=True)
    session = exe.session()
    wanted, got = run(oracle, scheduler, plan.steps, inputs), run(session, scheduler, plan.steps, inputs)
    for number, (value, expected) in enumerate(zip(got, wanted, strict=True)):
        assert torch.isfinite(value).all()
        assert torch.equal(value, expected), f"call {number}"
    assert session.finished
    assert session.slot_bytes == 0
    batch = len(inputs["hidden_states"])
    counted = plan.summary().macs * batch
    assert unread is None or exe.macs().computed == counted - unread * batch
    assert session.peak_slot_bytes <= plan.summary().peak_slot_bytes * batch
    for step, variant in enumerate(exe.default.rows):
        called = {n.target for n in exe.default.variants[variant].graph.graph.nodes if n.op == "call_module"}
        # Dropout and other modules without weights may be inlined or left out by either.
        weighted = {path for path in called if list(model.get_submodule(path).parameters())}
        assert weighted <= set(oracle.executed[step]), f"step {step} calls {sorted(weighted - set(oracle.executed[step]))}"
    return exe


def run_uvit(predict, scheduler, steps, inputs):
    final, outputs = run_loop(predict, scheduler, inputs["hidden_states"], steps, cond={})
    return [*outputs, final]
