"""A module tree that reads every kind of Python value in its forward."""

import argparse
import contextvars
import enum
import functools
from collections import UserDict
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn


class Mode(enum.Enum):
    PLAIN, DOUBLED = "plain", "doubled"


class Options:
    """An object that is no module, with a class attribute."""

    shift = 0.0

    def __init__(self):
        self.name, self.nested = "a", {"deep": [1, 2.0]}


class Processor:
    """As an attention processor: called with its module."""

    backend = None

    def __init__(self):
        self.gain = 2.0

    def __call__(self, layer, x):
        return x * self.gain if self.backend is None else x


@dataclass(slots=True)
class Slotted:
    """Without a dict of attributes."""

    shift: float = 0.5


class Inner:
    def __init__(self, gain):
        self.gain = gain


class Helper:
    """No module, and not called itself: its methods are."""

    inner = Inner(0.25)

    def moved(self, x):
        return x + self.inner.gain + self.amount

    @property
    def amount(self):
        return AMOUNT

    def unread_method(self):
        return 0


AMOUNT, IN_DICT = 0.125, 2.0
BEHIND = {"a": 0.5}
PROXY = MappingProxyType(BEHIND)
CONTEXT = contextvars.ContextVar("context", default=0.5)
# Its parameters are in no module's tree.
HIDDEN = [nn.Linear(6, 6).requires_grad_(False)]
SCALE = 3.0
TABLE = {"bias": 0.25}


class Limits:
    TOP = 50.0


def helper(x):
    return (x * SCALE + TABLE["bias"]).clamp(max=Limits.TOP)


def doubled(x, factor=2):
    return x * factor


def defaulted(x, shift=0.5, *, more=0.25):
    return x + shift + more


class Layer(nn.Module):
    """Whose result depends on all of its attributes but `unread`."""

    level = 1

    def __init__(self, width=6):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 6), nn.LayerNorm(6)
        self.flag, self.count, self.number, self.text, self.nothing = True, 2, 1.5, "relu", None
        self.mode, self.dtype_of, self.size, self.cut = Mode.PLAIN, torch.float32, torch.Size([6]), slice(0, 6)
        self.items, self.pair, self.names, self.entries = [1, 2], (3, 4), {"x"}, {"a": 1, "b": 2}
        self.act, self.part, self.options, self.processor = F.silu, functools.partial(doubled, factor=3), Options(), Processor()
        self.closed, self.held, self.strength, self.scaling = closing_over(4), torch.ones(6), 1.0, {"one": 0.5}
        self.args, self.slotted, self.user, self.private = (
            argparse.Namespace(shift=0.5),
            Slotted(),
            UserDict(a=0.5),
            {"_a": 0.5},
        )
        self.helper, self.functions, self.direct, self.got = Helper(), {"f": lambda x: x + IN_DICT}, 0.5, 0.25
        self.register_buffer("kept", torch.ones(6))
        self.unread = 1.0

    def forward(self, x):
        x = self.norm(self.linear(x))
        x = x + self.strength * x + x * self.scaling["one"]
        x = x + self.count if self.flag else x
        x = x + (self.number + self.items[0] + self.pair[1] + len(self.names) + self.entries["a"] + self.level)
        x = x * 2 if self.mode is Mode.DOUBLED else x
        x = F.relu(x) if self.text == "relu" and self.nothing is None else x
        x = self.closed(self.part(self.act(x.to(self.dtype_of)[..., self.cut].reshape(*x.shape[:-1], *self.size))))
        x = x + self.options.nested["deep"][1] + self.options.shift if self.options.name == "a" else x
        x = x - 1 if hasattr(self, "extra") else x
        x = self.beyond(x) + self.kept
        return helper(self.processor(self, x)) + self.held

    def beyond(self, x):
        """Values in objects of the standard library, and what is found where a function runs."""
        from helpers.read_late import late

        x = x + self.args.shift + self.slotted.shift + self.user["a"] + self.private["_a"] + PROXY["a"] + CONTEXT.get()
        x = self.functions["f"](self.helper.moved(x)) + vars(self)["direct"] + self.__dict__.get("got", 0.0)
        return HIDDEN[0](defaulted(late(x)))


class Beside(nn.Module):
    """A linear layer with one that reads everything beside it, and another in a list; named as in a tree."""

    def __init__(self, base):
        super().__init__()
        self.base, self.first, self.rest = base, Layer(base.in_features), nn.ModuleList([Layer(base.in_features)])

    def forward(self, x):
        return self.base(x) + sum(layer(x).mean(-1, keepdim=True) for layer in [self.first, *self.rest])


class Tree(nn.Module):
    """Two layers, one of them within a list."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = Layer(), nn.ModuleList([Layer()])

    def forward(self, x):
        for layer in [self.first, *self.rest]:
            x = layer(x)
        return x


def closing_over(number):
    """A function that remembers a number."""
    return lambda x: x + number


def tree(seed=0):
    torch.manual_seed(seed)
    return Tree().eval()
