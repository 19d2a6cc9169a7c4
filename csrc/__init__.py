"""C++ providers of fused operations for the CPU: one source file per operation, and their loader.

Importing the package registers the providers under the name "cpu"; the library itself is loaded when one is first asked
whether it takes some arguments. A provider registers on `stepgraph.ops`, and imports nothing of the compiler or the runtime.
"""

from stepgraph.csrc.elementwise import (
    declines_gated_residual,
    declines_linear_combination,
    declines_modulated_norm,
    run_gated_residual,
    run_linear_combination,
    run_modulated_norm,
)  # fmt: skip
from stepgraph.csrc.library import LEVELS, native
from stepgraph.csrc.lowrank import declines_lowrank_delta, declines_lowrank_input, run_lowrank_delta, run_lowrank_input
from stepgraph.ops import gated_residual, linear_combination, lowrank_delta, lowrank_input, modulated_norm

lowrank_input.register("cpu", run_lowrank_input, declines_lowrank_input)
lowrank_delta.register("cpu", run_lowrank_delta, declines_lowrank_delta)
modulated_norm.register("cpu", run_modulated_norm, declines_modulated_norm)
gated_residual.register("cpu", run_gated_residual, declines_gated_residual, into=True)
linear_combination.register("cpu", run_linear_combination, declines_linear_combination)


def describe() -> tuple[dict[str, str], list[str]]:
    """What `stepgraph doctor` shows of the native library, and advice."""
    library = native()
    shown = f"{library.level}: the highest of {', '.join(LEVELS[1:-1])} that this CPU runs"
    advice = (
        [f"the C++ providers of fused operations are missing ({library.missing}): {library.advice}"] if library.advice else []
    )
    return {"native library": library.missing or shown}, advice
