"""The model that routers are trained on, and one training of it."""

import pytest
import torch

from helpers.routers import train
from helpers.tiny import tiny_dit
from stepgraph.compiler.routers.router import Router


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.fixture(scope="module")
def router(model) -> Router:
    torch.manual_seed(0)
    return train(model)
