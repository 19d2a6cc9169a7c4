"""Python's garbage collector, while graphs are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_garbage_collector() -> Iterator[None]:
    """Leave cycles of references where they are until the end.

    Graphs are made of tens of thousands of objects that live on, and each walk of the collector over all of them finds nothing:
    a fifth of the time that tracing and specialising a model of full size take.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def older_objects_aside() -> Iterator[None]:
    """Let collections look only at objects that are made within it, and `gc.get_objects` and the like find no others.

    A process has hundreds of thousands of objects, and a collection takes half a second to find that all are in use. Nothing
    happens where the process has set objects aside itself: these would come back with ours.
    """
    aside = not gc.get_freeze_count()
    if aside:
        gc.freeze()
    try:
        yield
    finally:
        if aside:
            gc.unfreeze()
