"""Whose an error is that comes out of a forward while it is traced: the model's own code's, or the trace's."""

import dis
import sys
from types import CodeType, FrameType, FunctionType, TracebackType

from torch import OutOfMemoryError, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from stepgraph.compiler.tracing.model_location import frame_location
from stepgraph.errors import TraceError
from stepgraph.runtime.program.value_texts import KNOWN_LIBRARIES

RAISES = {dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"]}
# What a traced forward alone can meet.
OF_TRACES = (TraceError, DataDependentOutputException, DynamicOutputShapeException)
STAND_INS = ("TracedTensor", "FakeTensor")
# What raises on behalf of whoever calls it: torch's assertions, and the answer to an attribute that a module lacks.
ANSWERS = frozenset({nn.Module.__getattr__.__code__})
ASSERTIONS = ("_assert", "_check")


class OwnError(TraceError):
    """Carries an error of the model's own code out of a trace."""

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__(f"{where}: {type(error).__name__}: {text_of_error(error)}")
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
            place, _ = _place(error)
            raise OwnError(error, f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}") from error
        where, text = frame_location(trail), text_of_error(error)
        raise TraceError(f"{where}: the forward cannot be traced: {type(error).__name__}: {text}") from error


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

    It is if the innermost frame of its traceback that lies in no module of Python's own belongs to none of `KNOWN_LIBRARIES`,
    or calls one of torch's assertions (`torch._assert`, `torch._check`) or asks a module for what it lacks; and

    - a `raise` stands there, or what fails there is Python itself (an index, a key, a type). RuntimeErrors without a `raise`
      are those of extensions in C, which cannot work on tensors without values, but for a recursion that most of the stack is;
    - neither its text nor that of an error on whose account it was raised speaks of what stands in for a tensor, unless the
      code that raises has that text of its own.
    """
    place, raised = _place(error)
    frame = place.tb_frame
    if _root(frame) in KNOWN_LIBRARIES:
        return False
    if isinstance(error, RuntimeError) and not raised and not _recurs(error, frame.f_code):
        return False
    texts = " ".join(constant for constant in frame.f_code.co_consts if isinstance(constant, str))
    stand_ins = [name for name in STAND_INS if not (raised and name in texts)]
    chain = _chain(error)
    speaks = any(name in text_of_error(one) for one in chain for name in stand_ins)
    return not speaks and not any(isinstance(one, OF_TRACES) for one in chain)


def text_of_error(error: BaseException) -> str:
    """An error's text; of one whose class words it with code of the user's, which may fail, what it was raised with."""
    wording = type(error).__str__
    library = not isinstance(wording, FunctionType) or wording.__module__.partition(".")[0] in KNOWN_LIBRARIES
    return str(error) if library else BaseException.__str__(error)


def _place(error: BaseException) -> tuple[TracebackType, bool]:
    """The innermost place outside Python's own modules that an error came through, or, where torch answers there on behalf of
    its caller, that caller's; and whether the error was raised there by a `raise`.
    """
    trail: TracebackType | None = error.__traceback__
    assert trail is not None
    last = innermost = caller = trail
    called: TracebackType | None = None
    while trail is not None:
        last, root = trail, _root(trail.tb_frame)
        if root not in sys.stdlib_module_names:
            innermost = trail
        # Between a caller and what answers it lies nothing but the trace.
        if root not in ("torch", "stepgraph"):
            caller, called = trail, None
        elif root == "torch" and called is None:
            called = trail
        trail = trail.tb_next
    if called is not None and _answers(called.tb_frame) and _answers(last.tb_frame):
        return caller, True
    return innermost, innermost.tb_frame.f_code.co_code[innermost.tb_lasti] in RAISES


def _answers(frame: FrameType) -> bool:
    """Whether a frame is of torch's code that raises on behalf of its caller."""
    return frame.f_code in ANSWERS or (_root(frame) == "torch" and frame.f_code.co_name.startswith(ASSERTIONS))


def _recurs(error: BaseException, code: CodeType) -> bool:
    """Whether a recursion of some code has used up the stack."""
    if not isinstance(error, RecursionError):
        return False
    calls, trail = 0, error.__traceback__
    while trail is not None:
        calls += trail.tb_frame.f_code is code
        trail = trail.tb_next
    return calls > sys.getrecursionlimit() // 2


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised on account of."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and all(following is not one for one in chain):
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
