"""No public function lets an error of Python's or torch's depths reach its caller, whatever it is given.

Every function is called with valid arguments of which one or two are replaced by malformed ones. The call works, or is refused
by an error of ours. What cannot be written is an OSError, as Python has it, and what a model that is not compiled cannot take,
such as a class label that it has no row for, is the model's own error.
"""

import enum
import inspect
import random
import traceback
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch

import stepgraph as sg
from helpers.malformed import Junk, junk_values, malformed
from helpers.public_calls import World, public_functions, valid_calls

# Not called by users: what compiling, sessions and operations make.
MADE_BY_OTHERS = {
    "WatchedCall",
    "Executable",
    "Executable.find_program",
    "Executable.known",
    "Session",
    "env.Env",
    "ops.Op",
    "ops.Op.__call__",
    "ops.Op.choose",
    "ops.Op.register",
    "ops.Provider",
}
# Calls beside those of the list, by their first word: other forms of a function.
FORMS = ("accelerate ", "make_plan ", "sample ", "compile ", "the attached ")
DEAR = {
    "accelerate",
    "accelerate a call",
    "watch",
    "calibrate",
    "compile",
    "compile with factors",
    "fit_forecast",
    "fit_whole_step",
    "measure_covariances",
    "residual_affine",
    "sample",
    "sweep",
    "train_router",
    "load",
    "Session.__call__",
    "the attached transformer",
    "Executable.program",
    "make_plan l2c",
    "make_plan whole-step",
    "make_plan invardiff",
}
DRAWS = {"CachePlan.plot", "CalibrationStats.plot", "Sweep.plot"}
# Where there are few ways to call a function wrongly, draws repeat themselves; so many are made for one example at most.
DRAWN_FOR_ONE = 5
# These know from the graph which class labels there are.
COMPILED = ("sample", "Session.__call__", "the attached transformer")
WRITES = ("save", "plot", "export", "accelerate")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    mpl.use("agg")
    return World(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def calls(world):
    return valid_calls(world)


@pytest.fixture(scope="module")
def junk(world):
    return junk_values(world.folder, world.others())


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, world):
    """Texts that are taken for paths name places in the folder."""
    monkeypatch.chdir(world.folder)


def test_every_public_function_has_a_valid_call(calls):
    functions = set(public_functions()) - MADE_BY_OTHERS
    assert functions <= set(calls), "give these a valid call in helpers/public_calls.py"
    assert {name for name in set(calls) - functions if not name.startswith(FORMS)} == set()
    assert {name for name in MADE_BY_OTHERS if name not in public_functions()} == set()


NAMES = [*sorted(set(public_functions()) - MADE_BY_OTHERS), *(f"make_plan {policy}" for policy in sg.policies()),
         "accelerate a call",
         "sample with a model", "compile with factors", "the attached transformer"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_malformed_arguments(name, calls, junk):
    function, valid = calls[name]
    expected = function(**valid)
    names = _parameters(function, valid)

    def refused_or_right(wrong):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = function(**valid | {argument: entry.value for argument, entry in wrong.items()})
        except sg.StepgraphError as error:
            if not 10 < len(str(error)) < 3000:
                pytest.fail(f"{name}({wrong}): {error}")
        except Exception as error:
            if not _is_of_others(name, wrong, error):
                pytest.fail(f"{name}({wrong}) raised {type(error).__name__}: {error}")
        else:
            assert type(outcome) is type(expected) or outcome is None or "return_dict" in valid, f"{name}({wrong}) -> {outcome}"

    examples = 10 if name in DRAWS else 25 if name in DEAR else 200
    draw, known = random.Random(name), set[str]()
    for _ in range(DRAWN_FOR_ONE * examples):
        chosen = draw.sample(names, draw.randint(1, min(2, len(names))))
        wrong = {argument: malformed(draw, valid.get(argument), junk) for argument in chosen}
        if _is_long(wrong) or repr(wrong) in known:
            continue
        known.add(repr(wrong))
        refused_or_right(wrong)
        if len(known) == examples:
            break


def _parameters(function, valid) -> list[str]:
    """The arguments that a call can be given; of an enumeration's its value."""
    if inspect.isclass(function) and issubclass(function, enum.Enum):
        return ["value"]
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return list(dict.fromkeys([*valid, *named]))


def _is_long(wrong: dict[str, Junk]) -> bool:
    """Whether what is asked for is valid and takes hours, or no function of ours is reached."""
    # Python compares them with an enumeration's values before it asks.
    if "value" in wrong and isinstance(wrong["value"].value, (int, np.ndarray, torch.Tensor)):
        return True
    counts = ("iterations", "pool", "batch", "samples", "steps")
    many = [entry.value for name, entry in wrong.items() if name in counts and type(entry.value) is int]
    settings_given = [entry.value for entry in wrong.values() if isinstance(entry.value, sg.RouterSettings)]
    many += [getattr(record, name) for record in settings_given for name in ("iterations", "pool", "batch")]
    return any(100 < count < 2**60 for count in many) or any(
        entry.value is None for name, entry in wrong.items() if name == "router"
    )


def _is_of_others(name: str, wrong: dict[str, Junk], error: Exception) -> bool:
    """Whether an error is the system's, the model's or that of a function that the caller has given."""
    if isinstance(error, OSError):
        return any(word in name for word in WRITES)
    if isinstance(wrong.get("on_step", Junk("", None)).value, torch.nn.Module):
        return True
    if "index out of range in self" in str(error):
        return name not in COMPILED
    frames = traceback.extract_tb(error.__traceback__)
    # What a pipeline says of the values of its call is its own.
    return name in ("sample with a model", "watch", "accelerate a call") and any(
        "diffusers" in frame.filename for frame in frames
    )
