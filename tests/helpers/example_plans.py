"""A header, sites and a plan written by hand."""

from stepgraph.plan import CachePlan, PlanHeader, Site

SITES = (
    Site("blocks.0.attn", "attn", macs=10, bytes=4),
    Site("blocks.0.ff", "ff", macs=20, bytes=4),
    Site("blocks.0", "block", macs=40, bytes=4),
    Site("blocks.1.attn", "attn", call=1, macs=10, bytes=4),
    Site("blocks.1.ff", "ff", output=1, macs=20, bytes=4),
    Site("blocks.1", "block", macs=80, bytes=4),
    Site("", "stack_residual", macs=80, bytes=4),
    Site("", "hidden", macs=90, bytes=4),
    Site("", "output", macs=100, bytes=8),
)


HEADER = PlanHeader(
    model="Toy",
    fingerprint="a/b",
    scheduler="DDIMScheduler",
    scheduler_hash="c",
    steps=3,
    timesteps=(800.0, 500.5, 1.0),
    shapes={"hidden_states": (4, 8, 8), "timestep": ()},
    dtype="float32",
    macs=100,
    policy="manual",
    arguments={"actions": {"ff": "CRR"}},
    seed=3,
    samples=2,
)


def build(actions) -> CachePlan:
    return CachePlan.build(HEADER, SITES, actions)


PLAN = build({"ff": "CRR", "hidden": "CCR"})
