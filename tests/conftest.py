"""Tiny models and schedulers, fixed seeds, and NaN in memory that nobody has written to."""

import os

# Inductor, here and in the processes that tests start: no pool of workers that each import torch, and no trial programs for
# instructions that the processor says it has.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers.shared_graphs import mark_once, trace_anew, trace_once
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.compiler.marking import traced_model
from stepgraph.ops import forget_choices

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def dit() -> diffusers.DiTTransformer2DModel:
    """The tiny DiT. Tests that change it (attach, patch) put it back."""
    return tiny_dit()


@pytest.fixture
def ddim() -> diffusers.DDIMScheduler:
    """The most common scheduler."""
    return tiny_scheduler("ddim")


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request):
    """Fixed seeds; torch.empty is filled with NaN, so that a read of unwritten memory shows in the results."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu"):
        yield
        return
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(previous)


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory):
    """Of fixtures that several tests share, too: graphs are handed on, the settings of whoever runs the tests do not count, and
    nothing is kept in their home folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_model, "trace", trace_once)
        patch.setattr(traced_model, "mark_sites", mark_once)
        for name in list(os.environ):
            if name.startswith("STEPGRAPH_"):
                patch.delenv(name)
        patch.setenv("STEPGRAPH_CACHE", str(tmp_path_factory.mktemp("stepgraph-cache")))
        # Regions are shared by all tests through inductor's own cache.
        patch.setenv("STEPGRAPH_REGIONS", "0")
        yield


@pytest.fixture(autouse=True)
def _surroundings_of_each(request, monkeypatch, tmp_path):
    """Nothing that one test keeps is there for another; tests marked `traces` trace for themselves."""
    monkeypatch.setenv("STEPGRAPH_CACHE", str(tmp_path / "stepgraph-cache"))
    forget_choices()
    if request.node.get_closest_marker("traces"):
        monkeypatch.setattr(traced_model, "trace", trace_anew)
