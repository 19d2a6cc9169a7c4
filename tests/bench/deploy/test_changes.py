"""The page of what may change after compiling: its rows are what the program tries, and an outcome is what happens."""

import pytest

from stepgraph.bench.deploy.changes import CHANGES, FOLLOWED, PLANS, outcome_of
from stepgraph.bench.record import CHECKOUT


def test_the_page_has_a_row_for_every_change_and_none_is_wrong():
    page = (CHECKOUT / "docs/changes.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["change", *(change.what for change in CHANGES)]
    assert all(len(row) == 1 + len(PLANS) for row in rows)
    assert all(cell.strip(" |").startswith(("followed", "refused: ")) for row in rows[1:] for cell in row[1:])


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("a LoRA's strength (`set_scale`)", FOLLOWED),
        ("two LoRAs set at once (`set_adapters`)", FOLLOWED),
        ("a first LoRA loaded after compiling", FOLLOWED),
        ("a LoRA prepared for hot-swapping, swapped for another", FOLLOWED),
        ("weights written through `.data`", FOLLOWED),
        ("a forward hook on a layer", "refused: DiTTransformer2DModel is made of other parts"),
    ],
)
def test_an_outcome(what, outcome):
    (change,) = (change for change in CHANGES if change.what == what)
    assert outcome_of(change, "nothing measured").startswith(outcome)
