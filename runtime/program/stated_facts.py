"""Facts as texts, to compare a model with one in another process, or one that is built anew."""

from collections.abc import Iterator

from stepgraph.runtime.program.facts import NOTHING, Facts, Part, dotted
from stepgraph.runtime.program.freeze import BUFFERS, LEAVES, Frozen

# Behind the path of a module: what runs around its forward, and what stands in for it.
AROUND, INSTEAD = " (hooks)", " (forward)"


def stated_facts(facts: Facts) -> dict[str, str]:
    """What a graph depends on, by path: classes, hooks, replaced forwards, values; of objects the class and what they hold.

    What is the same object or is not (a tensor that is no buffer, the code of a function) is told by its kind alone.
    """
    stated: dict[str, str] = {}
    for path, part in facts.parts.items():
        stated |= _of_part(path, part)
    for names in facts.names:
        for name, value in names.values.items():
            stated |= _of_value(names.label + name, value)
    for name, value in facts.process.items():
        stated |= _of_value(name, value)
    return stated


def other_facts(before: dict[str, str], now: dict[str, str]) -> tuple[str, str, str] | None:
    """Path, former text and present one of what differs first; None where nothing does.

    A value that only one of the two forwards read is none: another version of a library reads others.
    """
    for path, text in before.items():
        if path in now and now[path] != text:
            return path, text, now[path]
    for path in dict.fromkeys([*before, *now]):
        if path.endswith((AROUND, INSTEAD)) and not (path in before and path in now):
            return path, before.get(path, "nothing"), now.get(path, "nothing")
    return None


def _of_part(path: str, part: Part) -> Iterator[tuple[str, str]]:
    yield path, _name(part.kind)
    if part.hooks:
        yield path + AROUND, ", ".join(_name(hook) for hook in part.hooks)
    if part.forward is not NOTHING:
        yield from _of_value(path + INSTEAD, part.forward)
    for name, value in part.values.items():
        yield from _of_value(dotted(path, name), value)


def _of_value(path: str, value: Frozen) -> Iterator[tuple[str, str]]:
    if issubclass(value.kind, (*LEAVES, *BUFFERS, set, frozenset)):
        yield path, f"{value.text} ({value.kind.__name__})"
    else:
        yield path, f"{_name(value.kind)} {value.text if value.same is not None else ''}".rstrip()
    for name, part in value.parts:
        yield from _of_value(path + name, part)


def _name(thing: object) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
