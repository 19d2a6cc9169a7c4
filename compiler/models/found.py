"""The family of a class that no adapter describes: its sites are found in its trace, and all else is asked of the caller.

`PINS` says of modules that hold an attention, where they or a part of them can be its site, which it is; a class with such a
module is refused without one.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from stepgraph.compiler.interfaces.family import Family
from stepgraph.errors import CompileError

# Class of the module -> "outer" for itself, "inner" for what is found in it.
PINS: Mapping[str, str] = {
    # SanaWM: short convolutions, maps and gates around products of tokens without weights. What the block adds to its tokens is
    # what leaves the whole; a reuse of the products alone would compute all maps for nothing.
    "BidirectionalGDNUCPESinglePathLiteLA": "outer",
    "_SoftmaxUCPESinglePathLiteLA": "outer",
}


def found_family(class_name: str) -> Family:
    """The family of a model class whose stacks are to be found (`stepgraph.compiler.marking.find_sites`)."""

    def example_inputs(*_: Any) -> NoReturn:
        raise CompileError(
            f"no adapter knows what {class_name} is called with; pass the keyword arguments of one call of its forward, with "
            f"tensors of the shapes that it will have (example_inputs= of make_plan and compile, inputs= of calibrate), or the "
            f"call of a pipeline (call= of accelerate)"
        )

    def conditioning(*_: Any) -> NoReturn:
        raise CompileError(
            f"no adapter knows what {class_name} is conditioned on, so that there is no sampling it by name; pass "
            f"conditioning= of your own, or run a session step by step with what a pipeline gives its transformer"
        )

    return Family(
        classes=(class_name,),
        found=True,
        stacks=(),
        example_inputs=example_inputs,
        conditioning=conditioning,
        timestep=None,
        pins=PINS,
    )
