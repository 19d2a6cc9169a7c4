"""A module tree that reads every kind of Python value in its forward."""

import enum
import functools

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


SCALE = 3.0
TABLE = {"bias": 0.25}


class Limits:
    TOP = 50.0


def helper(x):
    return (x * SCALE + TABLE["bias"]).clamp(max=Limits.TOP)


def doubled(x, factor=2):
    return x * factor


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
        return helper(self.processor(self, x)) + self.held


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
