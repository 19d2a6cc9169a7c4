"""Which inputs are looked up in tables, and how many rows these have."""

import torch
from torch import nn

from stepgraph.compiler.tracing.table_rows import table_rows
from stepgraph.compiler.tracing.trace import trace


class Lookups(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.table, self.third = nn.Embedding(7, 3), nn.Parameter(torch.ones(5, 3)), nn.Embedding(9, 3)

    def forward(self, x, y, z):
        looked_up = self.first(x.long().view(-1)) + nn.functional.embedding(x.to(torch.int64), self.table)
        return looked_up + self.third(y) + self.third(z + 1)


def test_rows_of_the_smallest_table_by_input():
    model, numbers = Lookups().eval(), torch.arange(4)
    traced = trace(model, {"x": numbers, "y": numbers, "z": numbers})
    # What is computed of an input says nothing of the input.
    assert table_rows(traced.graph, model) == {"x": 5, "y": 9}
