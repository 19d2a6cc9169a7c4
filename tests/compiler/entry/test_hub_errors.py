"""What loading from a hub raises becomes one message; memory that is out passes."""

import diffusers
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from stepgraph.compiler.entry.load_model import load_model
from stepgraph.errors import CompileError


@pytest.mark.parametrize(
    "error",
    [OSError("offline\nmore"), HfHubHTTPError.__bases__[0]("offline"), KeyError("offline"), ValueError("offline")],
    ids=repr,
)
def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fails)
    with pytest.raises(
        CompileError, match=r"no model folder 'owner/model' here, and loading it from the hub failed: .?offline"
    ):
        load_model("owner/model")


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr)
def test_what_is_not_the_hubs_passes(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fails)
    with pytest.raises(type(error)) as caught:
        load_model("owner/model")
    assert caught.value is error
