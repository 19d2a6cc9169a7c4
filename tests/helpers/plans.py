"""Random plans."""

from hypothesis import strategies as st

import stepgraph as sg
from stepgraph.plan import STREAM_KINDS, CachePlan


@st.composite
def random_rows(draw, sites, steps: int) -> tuple[str, ...]:
    """Rows of a valid plan: any kind of site reused where it has been computed before; what lies inside is DEAD."""
    rows: list[str] = []
    stored = [False] * len(sites)
    streams = [i for i, site in enumerate(sites) if site.kind in STREAM_KINDS]
    for _ in range(steps):
        reusable = [i for i in streams if stored[i]]
        replaced = draw(st.sampled_from([None, *reusable, None]))
        row = []
        for i, site in enumerate(sites):
            if replaced is not None and i < replaced:
                row.append(".")
            elif i == replaced or (site.kind not in STREAM_KINDS and stored[i] and draw(st.booleans())):
                row.append("R")
            else:
                row.append("C")
        stored = [was or letter == "C" for was, letter in zip(stored, row, strict=True)]
        rows.append("".join(row))
    return tuple(rows)


def plan_with_rows(model, scheduler, steps: int, rows, guidance: str = "batched") -> CachePlan:
    full = sg.make_plan("full", model=model, scheduler=scheduler, steps=steps, guidance=guidance)
    return CachePlan(full.header, full.sites, rows)
