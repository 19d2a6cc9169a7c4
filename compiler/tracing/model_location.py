"""Where in the model's own code something happens while its forward is traced, for messages."""

import linecache
import sys
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType

import torch

TORCH_FOLDER = str(Path(torch.__file__).parent)


@cache
def _outside(file: str) -> bool:
    """Whether a source file is neither torch's nor the tracer's; asked for every frame above every operation."""
    return not file.startswith((TORCH_FOLDER, "<")) and Path(file).parent != Path(__file__).parent


def model_frame() -> tuple[str, int, str, str] | None:
    """File, line, function and source of the innermost frame outside torch and the tracer: the model's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if _outside(file):
            return file, frame.f_lineno, frame.f_code.co_name, linecache.getline(file, frame.f_lineno).strip()
        frame = frame.f_back
    return None


def model_location() -> str:
    """ "file:line (source)" of the place in the model's own code that is running."""
    frame = model_frame()
    if frame is None:
        return "an unknown place"
    file, line, _, source = frame
    return f"{file}:{line}" + (f" ({source})" if source else "")


def frame_location(trail: TracebackType | None) -> str:
    """ "file:line" of the innermost frame of a traceback that lies in the model's own code."""
    place = "an unknown place"
    while trail is not None:
        file = trail.tb_frame.f_code.co_filename
        place = f"{file}:{trail.tb_lineno}" if _outside(file) else place
        trail = trail.tb_next
    return place
