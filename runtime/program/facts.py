"""Facts of a trace: the Python values that a forward read, and what its model was made of; its graph holds for no others."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from stepgraph.adapters import base_paths
from stepgraph.runtime.program.freeze import Containers, Frozen, difference, freeze
from stepgraph.runtime.program.process_state import process_state

NOTHING = Frozen(type(None), "nothing")
# Where peft keeps whether a layer's adapters are switched off, and which of them are on.
GATE, ACTIVE = "_disable_adapters", "_active_adapter"
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Where modules keep what is looked up behind their plain attributes.
STORES = ("_parameters", "_buffers", "_modules")


class Changed(Enum):
    """What kind of thing is another one than at the trace."""

    STRUCTURE = "modules, hooks and replaced forwards"
    VALUE = "a value that the forward read"


class StandIn:
    """What stands in for a model's forward while an executable is attached to it.

    Attributes:
        replaced: The forward that the model had of its own; None where it had its class's.
    """

    replaced: Any = None


@dataclass(frozen=True)
class Difference:
    """Something that is another one than at the trace, with what it was and is."""

    kind: Changed
    path: str
    old: str
    new: str


@dataclass(frozen=True, eq=False)
class Part:
    """What a module was at the trace.

    Attributes:
        kind: Its class.
        children: Names and classes of its submodules.
        hooks: Those that run before and after its forward, in order.
        forward: What stands in for its class's forward.
        values: What the forward read of it, by name.
        shadows: Names of tensors and submodules that a plain attribute hides.
    """

    kind: type
    children: tuple[tuple[str, type], ...]
    hooks: tuple[object, ...]
    forward: Frozen
    values: Mapping[str, Frozen]
    shadows: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Names:
    """What was read of something that is no module of the model: a module's globals, a class, a module in a list.

    Attributes:
        label: What messages put before a name.
        space: Where the names are looked up.
        values: By name; `NOTHING` where there was none.
    """

    label: str
    space: Mapping[str, Any]
    values: Mapping[str, Frozen]


@dataclass(frozen=True, eq=False)
class Strength:
    """A float that the forward only multiplies tensors with: it may change, and the graph follows.

    Attributes:
        module: The path of the module that has it.
        name: The attribute.
        key: Where the attribute is a dict, the float's key in it, in a tuple.
        compiled: What it was at the trace.
        constants: Tensors [] that the graph reads in its place, float64.
        halves: The dtype of half precision that what it multiplies has; None for single and double.
        gated: Whether it is 0 where its tuner layer is switched off, which does nothing else then.
        asked: Whether its class was asked for: it may not become a whole number.
    """

    module: str
    name: str
    key: tuple[Any, ...]
    compiled: float
    constants: tuple[torch.Tensor, ...]
    halves: torch.dtype | None = None
    gated: bool = False
    asked: bool = False

    @property
    def path(self) -> str:
        """As messages and `difference` have it."""
        return dotted(self.module, self.name) + "".join(f"[{key!r}]" for key in self.key)

    @property
    def gate(self) -> str:
        """The path of what switches its layer off."""
        return dotted(self.module, GATE)

    def held(self, model: nn.Module) -> Any:
        """What stands for it now: a number, or a tensor [] of peft's hot-swapping."""
        holder = getattr(model.get_submodule(self.module), self.name)
        return holder[self.key[0]] if self.key else holder

    def is_followed(self, model: nn.Module) -> bool:
        """Whether what stands for it now may be any number; what is no longer there is no matter here."""
        holder = vars(dict(model.named_modules()).get(self.module, model)).get(self.name) if self.asked else None
        held = holder.get(self.key[0]) if self.key and isinstance(holder, dict) else holder
        return not isinstance(held, int)

    def value(self, model: nn.Module) -> float:
        """What it is now."""
        if self.gated and getattr(model.get_submodule(self.module), GATE):
            return 0.0
        held = self.held(model)
        # Elsewhere than on a CPU, a tensor takes on the dtype of what it is multiplied with first.
        rounded = isinstance(held, torch.Tensor) and held.device.type != "cpu" and self.halves is not None
        return float(held.to(self.halves) if rounded else held)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a graph depends on beside inputs and the contents of weights.

    Attributes:
        parts: What every module of the model was, by path.
        names: What was read elsewhere.
        process: Settings of the process, by name.
        strengths: The numbers among `parts` that are followed.
        unread: The paths of numbers among them, in dicts, that the forward has not asked for.
    """

    parts: Mapping[str, Part]
    names: tuple[Names, ...] = ()
    process: Mapping[str, Frozen] = field(default_factory=dict)
    strengths: tuple[Strength, ...] = ()
    unread: frozenset[str] = frozenset()

    def other_forward(self, model: nn.Module) -> Difference | None:
        """How the forward of the model itself was replaced since; None where it is the one that was traced."""
        found = difference("forward", self.parts[""].forward, forward_of(model), frozenset())
        return None if found is None else Difference(Changed.STRUCTURE, *found)

    def differences(self, model: nn.Module, base: bool = False) -> Iterator[Difference]:
        """What is another one now, the weightiest first: what the model is made of, then values.

        Args:
            model: The model.
            base: Leave out adapters, then and now: what they are, and what stands in them.
        """
        modules = dict(model.named_modules())
        now = {path: _part(module, {}, path == "") for path, module in modules.items()}
        then, places = dict(self.parts), {path: path for path in modules}
        if base:
            then, now, places = without_adapters(then)[0], *without_adapters(now)
        followed: set[str] = {strength.path for strength in self.strengths if strength.is_followed(model)}
        followed |= self.unread | {strength.gate for strength in self.strengths if strength.gated}
        later: list[Difference] = []
        for path, part in then.items():
            if path in now:
                yield from _of_structure(path, part, now[path])
                later += _of_values(f"{path}." if path else "", part.values, vars(modules[places[path]]), followed)
        for names in self.names:
            later += _of_values(names.label, names.values, names.space, followed)
        later += _of_values("", self.process, process_state(self.process), followed)
        yield from later

    def matches(self, model: nn.Module) -> bool:
        """Whether nothing is another one."""
        return next(self.differences(model), None) is None


def facts_of(
    model: nn.Module,
    read: Mapping[str, Mapping[str, Frozen]] | None = None,
    names: tuple[Names, ...] = (),
    strengths: tuple[Strength, ...] = (),
    unread: frozenset[str] = frozenset(),
    asked: frozenset[str] = frozenset(),
) -> Facts:
    """The facts of a model as it is, with what was read of it: values by the module's path and the attribute's name.

    `asked` are settings of the process that count beside those which always do (`process_state`).
    """
    parts = {path: _part(module, (read or {}).get(path, {}), path == "") for path, module in model.named_modules()}
    process = {name: freeze(value) for name, value in process_state(asked).items()}
    return Facts(parts, names, process, strengths, unread)


def dotted(path: str, name: str) -> str:
    """The path of a module's attribute."""
    return f"{path}.{name}" if path else name


def _part(module: nn.Module, values: Mapping[str, Frozen], outermost: bool) -> Part:
    children = tuple((name, type(child)) for name, child in module._modules.items())
    # Those of the model itself run around an executable as they run around its forward.
    hooks = () if outermost else hooks_of(module)
    return Part(type(module), children, hooks, forward_of(module), values, shadows_of(module))


def shadows_of(module: nn.Module) -> tuple[str, ...]:
    """Names under which a module has a plain attribute, and a tensor or a submodule that nobody sees for it."""
    attributes = vars(module)
    kinds = (attributes[kind] for kind in STORES if attributes[kind])
    return tuple(name for kind in kinds if not attributes.keys().isdisjoint(kind) for name in kind if name in attributes)


def hooks_of(module: nn.Module) -> tuple[object, ...]:
    """What runs before and after a module's forward."""
    return tuple(hook for kind in HOOKS for hook in vars(module)[kind].values())


def forward_of(module: nn.Module, containers: Containers | None = None) -> Frozen:
    """What stands in for the forward of a module's class, executables aside; NOTHING where nothing does."""
    forward = vars(module).get("forward")
    forward = forward.replaced if isinstance(forward, StandIn) else forward
    same = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return NOTHING if forward is None or same else freeze(forward, containers)


def without_adapters(parts: Mapping[str, Part]) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a model's base, by their paths in it; and by these, the paths in the model."""
    places = {base: path for path, base in base_paths({path: part.kind for path, part in parts.items()}).items()}

    def plain(base: str, path: str) -> Part:
        below = {name: parts.get(places.get(dotted(base, name), "")) for name, _ in parts[path].children}
        kinds = {name: part.kind for name, part in below.items() if part is not None and dotted(base, name) in places}
        children = ((name, kinds.get(name, kind)) for name, kind in parts[path].children)
        return replace(parts[path], children=tuple(children))

    return {base: plain(base, path) for base, path in places.items()}, places


def _of_structure(path: str, part: Part, present: Part) -> Iterator[Difference]:
    def changed(name: str, old: str, new: str) -> Difference:
        return Difference(Changed.STRUCTURE, name, old, new)

    if present.kind is not part.kind:
        yield changed(path, *_names_of(part.kind, present.kind))
    before, now = dict(part.children), dict(present.children)
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) is not now.get(name):
            yield changed(dotted(path, name), *_names_of(before.get(name), now.get(name)))
    if list(before) != list(now):
        yield changed(path, f"submodules {', '.join(before)}", f"submodules {', '.join(now)}")
    for name in sorted(set(part.shadows) ^ set(present.shadows)):
        old, new = (
            f"a tensor or module{' behind a plain attribute' if name in hidden else ''}"
            for hidden in (part.shadows, present.shadows)
        )
        yield changed(dotted(path, name), old, new)
    if not path:
        return
    for index in range(max(len(present.hooks), len(part.hooks))):
        old_hook, new_hook = part.hooks[index : index + 1], present.hooks[index : index + 1]
        if not (old_hook and new_hook and old_hook[0] is new_hook[0]):
            old, new = (f"{hook[0]!r}" if hook else "nothing" for hook in (old_hook, new_hook))
            yield changed(f"{path} (forward hook {index})", old, new)
    differing = difference(f"{path}.forward", part.forward, present.forward, frozenset())
    if differing is not None:
        yield changed(*differing)


def _names_of(old: type | None, new: type | None) -> tuple[str, str]:
    """The names of two classes, with their modules where they have the same."""
    names = ["nothing" if kind is None else kind.__qualname__ for kind in (old, new)]
    if names[0] == names[1]:
        names = ["nothing" if kind is None else f"{kind.__module__}.{kind.__qualname__}" for kind in (old, new)]
    return names[0], names[1]


def _of_values(
    prefix: str, values: Mapping[str, Frozen], space: Mapping[str, Any], followed: Collection[str]
) -> Iterator[Difference]:
    for name, old in values.items():
        now = freeze(space[name]) if name in space else NOTHING
        # What is absent and what is None are not the same.
        if now is NOTHING or old is NOTHING:
            if now is not old:
                yield Difference(Changed.VALUE, prefix + name, old.text, now.text)
            continue
        if name == ACTIVE:
            old, now = _as_list(old), _as_list(now)
        differing = difference(prefix + name, old, now, followed)
        if differing is not None:
            yield Difference(Changed.VALUE, *differing)


def _as_list(names: Frozen) -> Frozen:
    """The names of adapters, of which peft takes one for a list of one."""
    return Frozen(list, "a list of 1", (("[0]", names),)) if names.kind is str else names
