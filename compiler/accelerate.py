"""The one-line use: plan, compile and attach."""

from typing import Any

from stepgraph.compiler.describe import example_inputs
from stepgraph.compiler.make_plan import make_plan
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig, CompileError
from stepgraph.runtime.executable import Executable


def accelerate(
    pipe: Any,
    steps: int = 50,
    policy: str = "interval",
    *,
    batch: int = 2,
    backend: str = "inductor",
    exact: bool = False,
    **arguments: Any,
) -> Executable:
    """Make a plan for a pipeline's transformer and scheduler, compile it and attach it.

    Args:
        pipe: A diffusers pipeline with a transformer.
        steps: The `num_inference_steps` it will be called with.
        policy: Name of a policy that needs no calibration.
        batch: Rows of the transformer's input to compile for first: images per call, twice that with guidance. Other
            sizes compile when they are first met.
        backend: "inductor" or "eager".
        exact: As in `stepgraph.compile`.
        **arguments: The policy's own.

    Returns:
        The attached executable; `detach()` undoes it.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise CompileError(f"{type(pipe).__name__} has no transformer to accelerate")
    plan = make_plan(policy, model=transformer, scheduler=pipe.scheduler, steps=steps, **arguments)
    executable = compile_plan(transformer, plan, example_inputs(transformer, batch), CompileConfig(backend, exact))
    return executable.attach(pipe)
