"""Frozen values as texts that say the same in another process where the values are the same, and something else where not."""

import hashlib
import platform
import re
import sys
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType

import torch
from torch import nn

from stepgraph.fingerprint import has_data, tensor_digest
from stepgraph.runtime.program.freeze import BUFFERS, LEAVES, LIBRARIES, Frozen

# What stands in modules and defaults of these is theirs, and other with another version; their code is not the user's.
KNOWN_LIBRARIES = LIBRARIES | {
    "stepgraph", "torchgen", "packaging", "diffusers", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "gguf",
}  # fmt: skip
# Behind the path of a container: how many entries it has, or under which keys.
ENTRIES = " (entries)"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# A function's code, which is another one with another version of Python.
CODE = re.compile(r" \(code (\d+\.\d+) [0-9a-f]{16}\)")
# Longer texts are told by a digest.
LONGEST = 200
LISTS, MAPPINGS = (list, tuple, deque), (dict, types.MappingProxyType, types.SimpleNamespace)


def texts_of(path: str, value: Frozen, defaults: bool = True) -> Iterator[tuple[str, str]]:
    """A value and all that it holds, by path.

    Leaves are their text and class, tensors and arrays a digest of their contents, functions and classes their module and
    qualified name, functions outside of libraries a hash of their code beside, objects their class and what they hold.
    Containers have their number of entries, or their keys, as a text of its own, so that one that grew is told from one of
    which less was read.

    Args:
        path: The value's.
        value: The value.
        defaults: Whether arguments' defaults of functions count.
    """
    yield path, text_of(value)
    if issubclass(value.kind, LISTS):
        yield path + ENTRIES, str(sum(name.startswith("[") for name, _ in value.parts))
    elif issubclass(value.kind, MAPPINGS):
        yield path + ENTRIES, _short(", ".join(name for name, _ in value.parts))
    for name, part in value.parts:
        if defaults or not name.startswith(" (default"):
            yield from texts_of(path + name, part, defaults)


def text_of(value: Frozen) -> str:
    """A value itself, without what it holds."""
    kind = value.kind.__name__
    if issubclass(value.kind, LEAVES):
        return f"{_short(value.text)} ({kind})"
    if issubclass(value.kind, (*BUFFERS, set, frozenset)):
        return f"{_short(ADDRESS.sub('', value.text))} ({kind})"
    if isinstance(value.same, torch.Tensor):
        return f"{name_of(value.kind)} {_contents(value.same)}"
    if isinstance(value.same, CodeType):
        return f"{value.text.replace('__main__', _main(), 1)}{_code(value.text, value.same)}"
    # Modules of a model are parts of their own.
    named = value.same is not None and not isinstance(value.same, nn.Module) and hasattr(value.same, "__qualname__")
    if isinstance(value.same, types.ModuleType):
        return f"module {value.same.__name__}"
    if isinstance(value.same, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(value.same)
    return name_of(value.same if named else value.kind)


def name_of(thing: object) -> str:
    """Module and qualified name of a class or a function, with the function's code; of anything else its class's."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(kind, "__module__", None) or "")
    name = f"{_main() if module == '__main__' else module}.{getattr(kind, '__qualname__', '')}"
    function = thing.__func__ if isinstance(thing, MethodType) else thing
    return name + (_code(name, function.__code__) if isinstance(function, FunctionType) else "")


def label_of(label: str) -> str:
    """What stands before the names of a module's globals; a script has the name under which it is imported."""
    return label.replace("__main__", _main(), 1) if label.partition(".")[0] == "__main__" else label


def same_text(one: str, other: str) -> bool:
    """Whether two texts say the same; code that other versions of Python made is not compared."""
    versions = {match.group(1) for text in (one, other) if (match := CODE.search(text))}
    return one == other or (len(versions) == 2 and CODE.sub("", one) == CODE.sub("", other))


def _main() -> str:
    """The name under which the script that runs is imported elsewhere."""
    main = sys.modules.get("__main__")
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else "__main__"


def _code(name: str, code: CodeType) -> str:
    """A function's code in a text; nothing for libraries' functions, whose code changes with their versions."""
    if name.partition(".")[0] in KNOWN_LIBRARIES:
        return ""
    major, minor, _ = platform.python_version_tuple()
    return f" (code {major}.{minor} {_hash(repr(_contents_of_code(code)))})"


def _contents_of_code(code: CodeType) -> tuple[object, ...]:
    """What a function's code does: its instructions, constants (functions within it too) and names."""
    constants = tuple(_contents_of_code(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_freevars, code.co_varnames


def _constant(value: object) -> object:
    """A constant, in which the order of a set says nothing."""
    return ("frozenset", *sorted(map(repr, value))) if isinstance(value, frozenset) else value


def _contents(tensor: torch.Tensor) -> str:
    about = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.layout != torch.strided or not has_data(tensor):
        return about
    return f"{about} {tensor_digest(tensor).hex()[:16]}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 4]}... ({_hash(text)})"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
