"""Changes to what a forward reads, of every kind, each with the path of the fact that is to say so."""

import argparse
import functools

import torch
import torch.nn.functional as F

from helpers import read_late, read_values
from helpers.read_values import Mode, Processor, closing_over, doubled
from stepgraph.compiler.tracing.trace import trace
from stepgraph.runtime.program.watch import FactsWatch


def watched(model, example):
    """The trace of a model, and the watch of its facts."""
    traced = trace(model, example)
    watcher = FactsWatch(traced.facts)
    assert list(watcher.follow(model)) == []
    return traced, watcher


def layer(name, value):
    return lambda monkeypatch, model: setattr(model.first, name, value)


def inside(reach, name, value):
    return lambda monkeypatch, model: monkeypatch.setattr(reach(model), name, value)


def entry(reach, key, value):
    return lambda monkeypatch, model: monkeypatch.setitem(reach(model), key, value)


def hook(monkeypatch, model):
    model.first.linear.register_forward_hook(lambda *_: None)


def ordinary():
    """Take back what no patch does."""
    torch.set_default_dtype(torch.float32)
    read_values.CONTEXT.set(0.5)


class Other(argparse.Namespace):
    pass


def other(x, shift=0.5, *, more=0.25):
    return x


# Of a tree (`helpers.read_values`): what changes something, by a patch or not, and where that is.
VALUES = {
    "bool": (layer("flag", False), "first.flag"),
    "int": (layer("count", 3), "first.count"),
    "int that equals": (layer("count", 2.0), "first.count"),
    "float that is added": (layer("number", 1.25), "first.number"),
    "str": (layer("text", "gelu"), "first.text"),
    "None": (layer("nothing", 0), "first.nothing"),
    "enum": (layer("mode", Mode.DOUBLED), "first.mode"),
    "dtype": (layer("dtype_of", torch.float64), "first.dtype_of"),
    "size": (layer("size", torch.Size([3])), r"first.size[0]"),
    "slice": (layer("cut", slice(0, 3)), "first.cut"),
    "list": (lambda _, m: m.first.items.__setitem__(0, 5), "first.items[0]"),
    "longer list": (lambda _, m: m.first.items.append(5), "first.items[2]"),
    "tuple": (layer("pair", (3, 5)), "first.pair[1]"),
    "set": (lambda _, m: m.first.names.add("y"), "first.names"),
    "dict": (entry(lambda m: m.first.entries, "a", 7), "first.entries['a']"),
    "dict with more": (entry(lambda m: m.first.entries, "c", 7), "first.entries['c']"),
    "in a list of modules": (lambda _, m: setattr(m.rest[0], "count", 9), "rest.0.count"),
    "function": (layer("act", F.gelu), "first.act"),
    "argument of a partial": (layer("part", functools.partial(doubled, factor=4)), "first.part.keywords['factor']"),
    "closure": (layer("closed", closing_over(5)), "first.closed (number)"),
    "variable of a closure": (lambda _, m: setattr(m.first.closed.__closure__[0], "cell_contents", 6), "first.closed (number)"),
    "object": (inside(lambda m: m.first.options, "name", "b"), "first.options.name"),
    "nested in an object": (
        lambda _, m: m.first.options.nested["deep"].__setitem__(1, 2.5),
        "first.options.nested['deep'][1]",
    ),
    "class of an object": (inside(lambda m: type(m.first.options), "shift", 0.5), "first.options.shift"),
    "processor's number": (inside(lambda m: m.first.processor, "gain", 1.0), "first.processor.gain"),
    "processor's class": (inside(lambda m: Processor, "backend", "flash"), "first.processor.backend"),
    "processor's code": (inside(lambda m: Processor, "__call__", lambda self, layer, x: x), "Processor.__call__"),
    "class of a module": (inside(lambda m: type(m.first), "level", 2), "Layer.level"),
    "over the class": (layer("level", 2), "first.level"),
    "what was not there": (layer("extra", 1), "first.extra"),
    "tensor that is no buffer": (layer("held", torch.zeros(6)), "first.held"),
    "torch.nn's own": (lambda _, m: setattr(m.first.norm, "eps", 0.1), "first.norm.eps"),
    "global number": (inside(lambda m: read_values, "SCALE", 2.0), "helpers.read_values.SCALE"),
    "global dict": (entry(lambda m: read_values.TABLE, "bias", 1.0), "helpers.read_values.TABLE['bias']"),
    "global class": (inside(lambda m: read_values.Limits, "TOP", 0.1), "Limits.TOP"),
    "global function": (inside(lambda m: read_values, "helper", lambda x: x), "helpers.read_values.helper"),
    "function of torch": (inside(lambda m: F, "relu", F.gelu), "torch.nn.functional.relu"),
    "default dtype": (lambda patch, _: torch.set_default_dtype(torch.float64), "torch.get_default_dtype()"),
    "hook": (hook, "first.linear (forward hook 0)"),
    "replaced forward": (lambda _, m: setattr(m.first, "forward", lambda x: x), "first.forward"),
    "namespace": (lambda _, m: setattr(m.first.args, "shift", 1.0), "first.args.shift"),
    "slots": (lambda _, m: setattr(m.first.slotted, "shift", 1.0), "first.slotted.shift"),
    "user's dict": (lambda _, m: m.first.user.__setitem__("a", 1.0), "first.user.data['a']"),
    "key that begins with _": (entry(lambda m: m.first.private, "_a", 1.0), "first.private['_a']"),
    "dict behind a proxy": (entry(lambda m: read_values.BEHIND, "a", 1.0), "helpers.read_values.PROXY['a']"),
    "variable of a context": (lambda *_: read_values.CONTEXT.set(1.0), "helpers.read_values.CONTEXT.get()"),
    "in vars()": (layer("direct", 1.0), "first.direct"),
    "in __dict__": (layer("got", 1.0), "first.got"),
    "another dict of an object": (lambda _, m: setattr(m.first.options, "__dict__", {"name": "b"}), "first.options.name"),
    "another class of an object": (lambda _, m: setattr(m.first.args, "__class__", Other), "first.args"),
    "helper's method": (inside(lambda m: read_values.Helper, "moved", lambda self, x: x), "Helper.moved"),
    "helper's property": (inside(lambda m: read_values.Helper, "amount", 3), "Helper.amount"),
    "global of a helper's property": (inside(lambda m: read_values, "AMOUNT", 1.0), "helpers.read_values.AMOUNT"),
    "object of a helper's class": (inside(lambda m: read_values.Helper.inner, "gain", 1.0), "Helper.inner.gain"),
    "over a helper's class": (lambda _, m: setattr(m.first.helper, "inner", 1), "first.helper.inner"),
    "global of a function in a dict": (inside(lambda m: read_values, "IN_DICT", 1.0), "helpers.read_values.IN_DICT"),
    "function imported when it runs": (inside(lambda m: read_late, "late", lambda x: x), "helpers.read_late.late"),
    "global of that": (inside(lambda m: read_late, "LATE", 1.0), "helpers.read_late.LATE"),
    "default": (inside(lambda m: read_values.defaulted, "__defaults__", (1.0,)), "helpers.read_values.defaulted (default 0)"),
    "default by name": (
        entry(lambda m: read_values.defaulted.__kwdefaults__, "more", 1.0),
        "helpers.read_values.defaulted (default of more)",
    ),
    "code": (inside(lambda m: read_values.defaulted, "__code__", other.__code__), "helpers.read_values.defaulted"),
    "weight of a module in no tree": (
        entry(lambda m: read_values.HIDDEN[0]._parameters, "weight", torch.zeros(6, 6)),
        "a Linear in no module: weight",
    ),
    "before a buffer": (lambda _, m: vars(m.first).__setitem__("kept", torch.zeros(6)), "first.kept"),
    "forward of torch's": (inside(lambda m: torch.nn.LayerNorm, "forward", lambda self, x: x), "LayerNorm.forward"),
    "what torch's forward calls": (inside(lambda m: F, "layer_norm", lambda x, *_: x), "torch.nn.functional.layer_norm"),
    "method of tensors": (inside(lambda m: torch.Tensor, "clamp", lambda x, **_: x), "torch.Tensor.clamp"),
    "replaced submodule": (lambda _, m: setattr(m.first, "linear", torch.nn.Identity()), "first.linear"),
}
