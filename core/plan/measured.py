"""What of a plan was measured on weights, and so whether it may run with others."""

from stepgraph.errors import MismatchError
from stepgraph.plan.header import CHOICE, NOTHING
from stepgraph.plan.plan import CachePlan
from stepgraph.plan.site import LOWRANK

# What goes into the computation beside the weights: coefficients that were fitted, factors of low-rank increments.
NUMBERS = "numbers"
# Corrections whose coefficients follow from the schedule alone.
FORMULAS = frozenset({"forecast"})
# Policies that measure without a calibration, for files that do not say what was measured.
TRAINED = frozenset({"l2c"})


def measured(plan: CachePlan) -> str:
    """What of a plan was measured on the weights it was made with: "nothing", its "choice" of actions, or "numbers" in it."""
    header = plan.header
    if header.factors or any(LOWRANK in row for row in plan.rows):
        return NUMBERS
    makers = {record.get("by") for record in header.arguments.get("corrections", []) if isinstance(record, dict)} - {"lowrank"}
    # Coefficients that nobody accounts for may be anybody's.
    if plan.forecasts and not (makers and makers <= FORMULAS):
        return NUMBERS
    if header.measured:
        return header.measured
    return CHOICE if header.samples is not None or header.policy in TRAINED else NOTHING


def rests_on_measurement(plan: CachePlan) -> bool:
    """Whether a plan holds only for the schedule and the sizes it was made for.

    One that rests on no measurement, and computes with no coefficients (which depend on the schedule at the least), holds for
    any schedule of its length, and for inputs of any size.
    """
    return measured(plan) != NOTHING or bool(plan.forecasts or plan.increments)


def refuse_other_values(plan: CachePlan, difference: str, strict: bool, adapters: bool = False) -> str:
    """Decide whether a plan runs with other values of the weights than those it was made with.

    Args:
        plan: The plan.
        difference: What differs, as the beginning of a sentence.
        strict: Whether a plan whose choice was measured is refused too (`CompileConfig.strict`).
        adapters: Whether only adapters differ: what they hold, or which are on.

    Returns:
        What the user should be told once; empty where nothing was measured.

    Raises:
        MismatchError: Numbers of the plan were measured on its weights; or, if `strict`, its choice was.
    """
    policy, kind = plan.header.policy, measured(plan)
    if adapters and plan.header.any_adapters and kind != NOTHING:
        what = "the numbers it computes with were" if kind == NUMBERS else f"what it ({policy}) reuses was chosen by what was"
        return (
            f"{difference}; the plan is declared to hold for any adapters and goes on, but {what} measured with the former "
            f"ones: how good images are with others, nobody has measured. Compare some with the eager model's"
        )
    if kind == NUMBERS:
        raise MismatchError(
            f"{difference}; the plan ({policy}) computes with numbers that were measured on its weights (fitted forecasts or "
            f"low-rank factors): put those weights back, or measure and make the plan anew"
        )
    if kind != CHOICE:
        return ""
    if strict:
        raise MismatchError(
            f"{difference}; what the plan ({policy}) reuses was chosen by measuring its weights, and strict=True refuses "
            f"others: make a plan for these weights, or leave strict out"
        )
    return (
        f"{difference}; the plan goes on with them, but what it ({policy}) reuses was chosen by measuring the former ones: "
        f"images can be worse. Make a plan for these weights, or pass strict=True to refuse"
    )
