"""What `sg.policies()` says of every policy, against signatures and docstrings read another way."""

import ast
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import stepgraph as sg
from stepgraph.compiler.entry.make_plan import runs_model
from stepgraph.compiler.interfaces.policy import Policy
from stepgraph.compiler.planning.list_policies import describe_policy, documented_arguments, type_name
from stepgraph.compiler.policies import POLICIES
from stepgraph.errors import PlanError


@pytest.mark.parametrize("name", POLICIES)
def test_every_argument_has_a_default_or_is_required_and_a_meaning(name):
    record = sg.policies()[name]
    assert record.summary.endswith(".")
    assert record.source
    for argument in record.arguments:
        assert len(argument.meaning) > 10, f"{name}: describe {argument.name} under Args of its docstring"
        assert argument.type, argument.name
        assert argument.required == (argument.default is None and _without_default(name, argument.name))


def _without_default(policy: str, argument: str) -> bool:
    """Whether the source text gives the keyword no default."""
    function = ast.parse(inspect.getsource(POLICIES[policy].decide)).body[0]
    defaults = dict(zip((a.arg for a in function.args.kwonlyargs), function.args.kw_defaults, strict=True))
    return defaults[argument] is None


@pytest.mark.parametrize("name", POLICIES)
def test_the_arguments_are_those_that_make_plan_takes(dit, ddim, name):
    with pytest.raises(PlanError) as refused:
        sg.make_plan(name, model=dit, scheduler=ddim, steps=4, no_such_argument=1)
    listed = [argument.name for argument in sg.policies()[name].arguments]
    assert str(refused.value).endswith(f"it takes {', '.join(listed)}" if listed else "it takes none")


def test_what_policies_need():
    records = sg.policies()
    assert list(records) == list(POLICIES)
    assert records["full"].needs == records["interval"].needs == ()
    assert records["smoothcache"].needs == ("stats",)
    assert records["invardiff"].needs == ("stats", "model")
    assert list(records["invardiff"].services) == ["again"]
    assert (records["magcache"].needs, records["magcache"].unless) == (("stats",), "ratios")
    assert "needs calibration (--stats, or -a ratios)" in str(records["magcache"])
    for name, record in records.items():
        assert ("model" in record.needs) == runs_model(name)
    assert json.loads(json.dumps(records["interval"].as_dict()))["arguments"][0]["unit"] == "steps, at least 1"


def example(
    sites: Sequence[Any],
    steps: int,
    stats: Any = None,
    *,
    tau: float | Mapping[str, float] = 0.5,
    names: Sequence[str] | None = None,
    file: str,
    again: Callable[[int], int] | None = None,
    bare: bool = False,
) -> Mapping[str, str]:
    """Do something
    over two lines.

    More about it: this: is no argument.

    Args:
        sites: The sites.
        stats: Calibration; its lags.
        tau (quantile, 0..1): First line
            and second: line.
        names: Some names.
        file: Where it lies.
        again: Runs it.

    Returns:
        nothing: at all
    """
    return {}


def test_a_record_from_signature_and_docstring():
    record = describe_policy("example", Policy(example, source="a paper"))
    assert record.summary == "Do something over two lines."
    assert (record.needs, record.stats, dict(record.services)) == (("model",), "Calibration; its lags.", {"again": "Runs it."})
    found = {a.name: (a.type, a.required, a.default, a.unit, a.meaning) for a in record.arguments}
    assert found == {
        "tau": ("float or float by kind", False, 0.5, "quantile, 0..1", "First line and second: line."),
        "names": ("list of str", False, None, "", "Some names."),
        "file": ("str", True, None, "", "Where it lies."),
        "bare": ("bool", False, False, "", ""),
    }
    assert set(documented_arguments(example)) == {"sites", "stats", "tau", "names", "file", "again"}
    text = str(record)
    assert "    -a tau: float or float by kind (quantile, 0..1); default 0.5\n        First line and second: line." in text
    assert "    -a file: str; required" in text
    assert "-a bare: bool; default false" in text


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (int | Mapping[str, int], "int or int by kind"),
        (bool | None, "bool"),
        (Sequence[int], "list of int"),
        (list[str] | str, "list of str or str"),
        (tuple[float, ...], "list of float"),
        (Any, "Any"),
    ],
    ids=str,
)
def test_types_in_words(annotation, text):
    assert type_name(annotation) == text
