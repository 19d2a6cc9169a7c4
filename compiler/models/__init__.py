"""Model families, one file each."""

from typing import Any

from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.models.dit import DIT  # noqa: TID251
from stepgraph.compiler.models.flux import FLUX  # noqa: TID251
from stepgraph.compiler.models.pixart import PIXART  # noqa: TID251
from stepgraph.compiler.models.sd3 import SD3  # noqa: TID251
from stepgraph.compiler.models.uvit import UVIT  # noqa: TID251
from stepgraph.errors import CompileError
from stepgraph.schedule import register_timestep

FAMILIES = (DIT, FLUX, PIXART, SD3, UVIT)
for _family in FAMILIES:
    register_timestep(_family.classes, _family.timestep)


def family_of(model: Any) -> Family:
    """The family of a model, by its class name or that of the class it is made from.

    Raises:
        CompileError: No adapter covers this class.
    """
    for name in [kind.__name__ for kind in type(model).__mro__]:
        for family in FAMILIES:
            if name in family.classes:
                return family
    name = type(model).__name__
    known = ", ".join(sorted(name for family in FAMILIES for name in family.classes))
    raise CompileError(
        f"no adapter for the model class {name}; supported: {known}. A new family is one file in compiler/models"
    )
