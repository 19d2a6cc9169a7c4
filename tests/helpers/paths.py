"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# Published plans, where they were laid beside the checkout.
PUBLISHED = ROOT.parent / "shared" / "plans"
