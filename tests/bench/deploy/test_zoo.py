"""A handful of the zoo: plans on classes without an adapter give the bits of an oracle that replaces forwards."""

import pytest

from stepgraph.bench.deploy.zoo import COLUMNS, TABLE, examine
from stepgraph.bench.deploy.zoo_draws import MODELS
from stepgraph.bench.record import CHECKOUT


# Maps of the block's own, a module called twice, tensors in lists, tables of a first call.
@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("PRXTransformer2DModel", 7),
        ("CogView4Transformer2DModel", 9),
        ("Kandinsky5Transformer3DModel", 9),
        ("AnyFlowTransformer3DModel", 9),
    ],
)
def test_plans_on_a_found_class_are_exact(name, sites):
    row = examine(name)
    assert (row["result"], row["sites"]) == ("exact", sites)
    assert int(row["share"].rstrip("%")) >= 80


def test_what_is_refused_says_why():
    row = examine("OmniGenTransformer2DModel")
    assert row["refusal"] == "TraceError"
    assert row["result"].startswith("refused: diffusers/models/transformers/transformer_omnigen.py:")


def test_the_page_has_a_row_for_every_class_and_none_is_wrong():
    page = (CHECKOUT / TABLE).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines() if "Transformer" in line]
    rows = [row for row in rows if len(row) == len(COLUMNS)]
    assert [row[0] for row in rows] == sorted(MODELS)
    assert all(row[-1] == "exact" or row[-1].startswith("refused: ") for row in rows)
    assert all(row[3] == "" or int(row[3].rstrip("%")) >= 80 for row in rows)
