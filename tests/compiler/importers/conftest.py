"""The models that published plans are read for."""

import pytest
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel

from helpers.published import BLOCKS, weightless_flux
from helpers.tiny import tiny_dit


@pytest.fixture(scope="session")
def model() -> DiTTransformer2DModel:
    return tiny_dit(num_layers=BLOCKS)


@pytest.fixture(scope="session")
def flux() -> FluxTransformer2DModel:
    return weightless_flux()
