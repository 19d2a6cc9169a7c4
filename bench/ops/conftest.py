"""Options of the benchmark."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Device, time per case, and one operation alone."""
    parser.addoption("--device", default="cpu")
    parser.addoption("--seconds", type=float, default=0.5)
    parser.addoption("--only-op", default="")
