"""What processes have around them that tests start."""

import os

from helpers.paths import TESTS


def environment(**variables: str) -> dict[str, str]:
    """This process's variables and more: one core, the tests' helpers, and without libraries that nobody there needs."""
    places = (str(TESTS / "helpers" / "spared"), str(TESTS))
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"} | variables
