"""Model families, one file each; `found` is that of all other classes."""

from typing import Any

from stepgraph.compiler.interfaces.family import Family
from stepgraph.compiler.models.dit import DIT  # noqa: TID251
from stepgraph.compiler.models.flux import FLUX  # noqa: TID251
from stepgraph.compiler.models.found import found_family  # noqa: TID251
from stepgraph.compiler.models.pixart import PIXART  # noqa: TID251
from stepgraph.compiler.models.sd3 import SD3  # noqa: TID251
from stepgraph.compiler.models.uvit import UVIT  # noqa: TID251
from stepgraph.schedule import register_timestep

FAMILIES = (DIT, FLUX, PIXART, SD3, UVIT)
for _family in FAMILIES:
    if _family.timestep is not None:
        register_timestep(_family.classes, _family.timestep)


def family_of(model: Any) -> Family:
    """The family of a model, by its class name or that of the class it is made from; where no adapter covers it, one whose
    sites are found in its trace.
    """
    for name in [kind.__name__ for kind in type(model).__mro__]:
        for family in FAMILIES:
            if name in family.classes:
                return family
    return found_family(type(model).__name__)
