"""Published plan formats, one file each; recognised by content."""

from stepgraph.compiler.importers.importer import Importer
from stepgraph.compiler.importers.invardiff_book import INVARDIFF_BOOK
from stepgraph.compiler.importers.l2c_router import L2C_ROUTER
from stepgraph.compiler.importers.smoothcache_schedule import SMOOTHCACHE_SCHEDULE

IMPORTERS: dict[str, Importer] = {
    "invardiff": INVARDIFF_BOOK,
    "smoothcache": SMOOTHCACHE_SCHEDULE,
    "l2c": L2C_ROUTER,
}
