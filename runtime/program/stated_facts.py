"""Facts as texts, to compare a model with one in another process, or one that is built anew."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from stepgraph.errors import MismatchError
from stepgraph.runtime.program.facts import ACTIVE, GATE, NOTHING, Facts, Part, dotted, without_adapters
from stepgraph.runtime.program.value_texts import KNOWN_LIBRARIES, label_of, name_of, same_text, texts_of

# Behind the path of a module: what runs around its forward, and what stands in for it.
AROUND, INSTEAD = " (hooks)", " (forward)"
# A block's number in a path.
NUMBER = re.compile(r"\.\d+(?=[.\[ ]|$)")
# Attributes that fingerprints cover: diffusers' configuration, whether there are adapters, and which are on.
COVERED = frozenset({"_internal_dict", "_hf_peft_config_loaded", ACTIVE, GATE})


def stated_facts(facts: Facts) -> dict[str, str]:
    """What a graph depends on, by path: classes, hooks, replaced forwards, values; of objects the class and what they hold.

    See `texts_of`.
    """
    stated: dict[str, str] = {}
    for path, part in facts.parts.items():
        stated |= _of_part(path, part)
    for names in facts.names:
        for name, value in names.values.items():
            stated |= texts_of(label_of(names.label) + name, value)
    for name, value in facts.process.items():
        stated |= texts_of(name, value)
    return stated


def other_facts(before: dict[str, str], now: dict[str, str]) -> tuple[str, str, str] | None:
    """Path, former text and present one of what differs first; None where nothing does.

    A value that only one of the two forwards read is none: another version of a library reads others.
    """
    for path, text in before.items():
        if path in now and not same_text(now[path], text):
            return path, text, now[path]
    for path in dict.fromkeys([*before, *now]):
        if path.endswith((AROUND, INSTEAD)) and not (path in before and path in now):
            return path, before.get(path, "nothing"), now.get(path, "nothing")
    return None


def facts_of_plan(facts: Facts) -> dict[str, str]:
    """What a plan keeps of the facts it was made under: what modules are, and what is read of them and of their code's globals.

    Adapters are left out, as a plan has a hash of theirs, and so is what belongs to the process. What is the same in all blocks
    stands once, with "*" in the place of their numbers.
    """
    alike: dict[str, dict[str, str]] = defaultdict(dict)
    for path, text in _plain_facts(facts).items():
        alike[_alike(path)][path] = text
    kept: dict[str, str] = {}
    for pattern, texts in alike.items():
        kept |= {pattern: next(iter(texts.values()))} if len(set(texts.values())) == 1 else texts
    return kept


def other_facts_of_plan(before: Mapping[str, str], facts: Facts) -> str:
    """What differs first between what a plan was made under and a trace, in words; empty where nothing does.

    What only one of them has read is no difference, as in `other_facts`; neither is anything for a plan that does not say.
    """
    now = _plain_facts(facts) if before else {}
    for path, text in now.items():
        known = before.get(path, before.get(_alike(path), "nothing" if path.endswith((AROUND, INSTEAD)) else text))
        if not same_text(known, text):
            return f"{path} is {text}, and was {known!a} when the plan was made"
    for path, text in before.items():
        if path.endswith((AROUND, INSTEAD)) and all(path not in (one, _alike(one)) for one in now):
            return f"{path!a} is nothing, and was {text!a} when the plan was made"
    return ""


def refuse_other_facts(whose: str, before: Mapping[str, str], facts: Facts) -> None:
    """Compare a trace with what something was measured under, as `other_facts_of_plan` does.

    Raises:
        MismatchError: They differ; the message says what, and begins with `whose`, such as "the factors".
    """
    difference = other_facts_of_plan(before, facts)
    if difference:
        raise MismatchError(
            f"{whose} does not fit this model: {difference.replace('the plan', 'that')}; set it back, or measure anew"
        )


def _alike(path: str) -> str:
    return NUMBER.sub(".*", path, count=1)


def _plain_facts(facts: Facts) -> dict[str, str]:
    """Classes, hooks, replaced forwards and values of a model's base, by path; not what libraries have for themselves."""
    stated: dict[str, str] = {}
    for path, part in without_adapters(facts.parts)[0].items():
        stated |= _of_part(path, part, plain=True)
    for names in facts.names:
        if names.label.partition(".")[0] not in KNOWN_LIBRARIES:
            for name, value in names.values.items():
                stated |= texts_of(label_of(names.label) + name, value, defaults=False)
    return stated


def _of_part(path: str, part: Part, plain: bool = False) -> Iterator[tuple[str, str]]:
    """What a module is; if `plain`, without what fingerprints cover and functions' defaults."""
    yield path, name_of(part.kind)
    if part.hooks:
        yield path + AROUND, ", ".join(map(name_of, part.hooks))
    if part.forward is not NOTHING:
        yield from texts_of(path + INSTEAD, part.forward, defaults=not plain)
    for name, value in part.values.items():
        if not (plain and name in COVERED):
            yield from texts_of(dotted(path, name), value, defaults=not plain)
