"""Whose an error is that comes out of a forward while it is traced: the model's own code's, or the trace's."""

import dis
import sys
from types import FrameType, TracebackType

from torch import OutOfMemoryError
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from stepgraph.compiler.tracing.model_location import frame_location
from stepgraph.errors import TraceError

# Not the user's code, but what it calls or is called by.
LIBRARIES = frozenset({
    "torch", "torchgen", "numpy", "stepgraph", "diffusers", "transformers", "accelerate", "peft", "torchao", "bitsandbytes",
    "gguf",
})  # fmt: skip
RAISES = {dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"]}
# What a traced forward alone can meet.
OF_TRACES = (TraceError, DataDependentOutputException, DynamicOutputShapeException)
STAND_INS = ("TracedTensor", "FakeTensor")


class OwnError(TraceError):
    """Carries an error of the model's own code out of a trace."""

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__(f"{where}: {type(error).__name__}: {error}")
        self.error, self.where = error, where


class ForwardErrors:
    """While a forward runs on traced tensors: its errors become TraceErrors, each with what was raised as its cause.

    Refusals of ours, memory that is out and interruptions pass.
    """

    def __enter__(self) -> None:
        """Nothing happens before an error does."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trail: TracebackType | None) -> None:
        """Raise in an error's place."""
        if not isinstance(error, Exception) or isinstance(error, (TraceError, MemoryError, OutOfMemoryError)):
            return
        if is_own(error):
            innermost = _innermost(error)
            raise OwnError(error, f"{innermost.tb_frame.f_code.co_filename}:{innermost.tb_lineno}") from error
        where = frame_location(trail)
        raise TraceError(f"{where}: the forward cannot be traced: {type(error).__name__}: {error}") from error


def own_error(wrapped: BaseException) -> Exception | None:
    """The error that an `OwnError` carries, with a note of where the model was traced; None of other errors."""
    if not isinstance(wrapped, OwnError):
        return None
    error = wrapped.error
    note = f"{wrapped.where}: stepgraph traced the model's forward when this was raised; tensors have no values then"
    # Python 3.10 has no notes.
    if hasattr(error, "add_note") and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error


def is_own(error: BaseException) -> bool:
    """Whether an error is one that the user's code raises, traced or not.

    It is if the innermost frame of its traceback that lies in no module of Python's own belongs to none of `LIBRARIES`, and

    - a `raise` stands there, or what fails there is Python itself (an index, a key, a type). RuntimeErrors without a `raise`
      are those of extensions in C, which cannot work on tensors without values;
    - neither its text nor that of an error on whose account it was raised speaks of what stands in for a tensor.
    """
    innermost = _innermost(error)
    frame = innermost.tb_frame
    if _root(frame) in LIBRARIES:
        return False
    raised = frame.f_code.co_code[innermost.tb_lasti] in RAISES
    if isinstance(error, RuntimeError) and not raised:
        return False
    return not any(isinstance(one, OF_TRACES) or any(name in str(one) for name in STAND_INS) for one in _chain(error))


def _innermost(error: BaseException) -> TracebackType:
    """The innermost place outside Python's own modules that an error came through."""
    trail = error.__traceback__
    assert trail is not None
    innermost = trail
    while trail is not None:
        if _root(trail.tb_frame) not in sys.stdlib_module_names:
            innermost = trail
        trail = trail.tb_next
    return innermost


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised on account of."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
