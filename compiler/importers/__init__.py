"""Published plan formats, one file each; recognised by content."""

from collections.abc import Callable
from typing import Any

from stepgraph.compiler.importers import invardiff_book, invardiff_flux_book, smoothcache_schedule  # noqa: TID251
from stepgraph.compiler.importers.cache_dit_mask import CACHE_DIT_MASK  # noqa: TID251
from stepgraph.compiler.importers.invardiff_book import INVARDIFF_BOOK  # noqa: TID251
from stepgraph.compiler.importers.invardiff_flux_book import INVARDIFF_FLUX_BOOK  # noqa: TID251
from stepgraph.compiler.importers.l2c_router import L2C_ROUTER  # noqa: TID251
from stepgraph.compiler.importers.l2c_uvit_router import L2C_UVIT_ROUTER  # noqa: TID251
from stepgraph.compiler.importers.smoothcache_schedule import SMOOTHCACHE_SCHEDULE  # noqa: TID251
from stepgraph.compiler.interfaces.importer import Importer
from stepgraph.plan import CachePlan

IMPORTERS: dict[str, Importer] = {
    "invardiff": INVARDIFF_BOOK,
    "invardiff-flux": INVARDIFF_FLUX_BOOK,
    "smoothcache": SMOOTHCACHE_SCHEDULE,
    "l2c": L2C_ROUTER,
    "l2c-uvit": L2C_UVIT_ROUTER,
    "cache-dit": CACHE_DIT_MASK,
}

EXPORTERS: dict[str, Callable[[CachePlan], dict[str, Any]]] = {
    "invardiff": invardiff_book.export,
    "invardiff-flux": invardiff_flux_book.export,
    "smoothcache": smoothcache_schedule.export,
}
