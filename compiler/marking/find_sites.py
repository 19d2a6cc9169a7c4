"""The sites of a traced model whose class no adapter describes, found from its modules, the module stack and the graph.

Blocks are the outermost elements of a ModuleList, Sequential or ModuleDict whose outputs depend on the latents and keep the
shape of an input that does, with two linear maps or more and an attention beneath. In a block, an attention is the module
that multiplies tokens with tokens, and a feed-forward one that maps tokens twice and hands them on in their shape. What a block
computes with linear maps of its own has its last map as its site. What more than one module could stand for is pinned
(`stepgraph.compiler.models.found`), or refused: never the first that fits.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from stepgraph.compiler.interfaces.family import Family, Stack
from stepgraph.compiler.marking.graphs import live_nodes, macs_of
from stepgraph.compiler.marking.traced_modules import KEYED, TracedModules, shape, tensors_read
from stepgraph.compiler.tracing.trace import Trace
from stepgraph.errors import CompileError
from stepgraph.node_facts import output_of

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
ATTENTION = re.compile(r"Attention|Attn")
# What parts of blocks are called that work on tokens of another stream than the latents' own.
CONTEXT = re.compile(r"context|txt|text|encoder|(^|_)c$|add(ed)?_")
AUDIO = re.compile(r"audio")
# A map of a block's own below this share of its work is no site.
LEAST = 0.05


def find_sites(family: Family, trace: Trace, model: nn.Module) -> Family:
    """A family with the stacks, and the tokens at the stack's two ends, of a model that was traced.

    Raises:
        CompileError: There are no blocks, or an attention could be one module or another within it.
    """
    modules = TracedModules(trace, model)
    blocks = find_blocks(modules)
    if not blocks:
        raise CompileError(
            f"no transformer blocks in {type(model).__name__}: expected elements of a ModuleList that take tokens made of "
            f"{next(iter(trace.inputs))} and return them in their shape, with linear maps and an attention beneath; give the "
            f"class an adapter (compiler/models)"
        )
    stacks = tuple(Stack(block, _Block(modules, block, family.pins).values()) for block in blocks)
    tokens, tokens_in = _ends(modules, blocks)
    return replace(family, stacks=stacks, tokens=tokens, tokens_in=tokens_in)


def find_blocks(modules: TracedModules) -> list[str]:
    """Paths of the transformer blocks in the order in which they are called."""
    paths = [path for path, call_index in modules.trace.calls if call_index == 0 and path]
    blocks: list[str] = []
    for path in sorted(paths, key=lambda path: path.count(".")):
        parent = modules.module(path.rpartition(".")[0])
        within = any(path.startswith(f"{block}.") for block in blocks)
        if not within and isinstance(parent, CONTAINERS) and _is_block(modules, path):
            blocks.append(path)
    return sorted(blocks, key=paths.index)


def _is_block(modules: TracedModules, path: str) -> bool:
    call = modules.call(path)
    taken = [shape(node) for node in call.inputs if node in modules.moving]
    keeps = any(node in modules.moving and shape(node) in taken for node in call.outputs)
    return keeps and len(modules.moving_maps(path)) >= 2 and _attends(modules, path)


def _attends(modules: TracedModules, path: str) -> bool:
    """Whether there is an attention in a module: a product of tokens, or a class that is called so."""
    kinds = (type(module).__name__ for module in modules.module(path).modules())
    return bool(modules.attends(path)) or any(map(ATTENTION.search, kinds))


class _Block:
    """The sites of one block.

    Args:
        modules: Of the traced model.
        path: The block's.
        pins: What is laid down of the model's class.
    """

    def __init__(self, modules: TracedModules, path: str, pins: Mapping[str, str]) -> None:
        self.modules, self.path, self._pins = modules, path, pins
        self._sites: list[str] = []

    def values(self) -> dict[str, tuple[str, ...]]:
        """Child -> kinds, as a stack has them; where another call than the first is of another kind, it stands for itself."""
        values: dict[str, tuple[str, ...]] = {}
        for child in self.modules.children(self.path):
            self._descend(child)
        for site in self._sites:
            name = site[len(self.path) + 1 :]
            for call_index in range(self.modules.calls(site)):
                kinds = self._kinds(site, call_index)
                if call_index == 0 or kinds != values[name]:
                    values[f"{name}#{call_index}" if call_index else name] = kinds
        return values | self._inline()

    # -- modules -----------------------------------------------------------------------------------------------------

    def _descend(self, path: str) -> None:
        """Note the sites in a module: itself, or modules below it."""
        modules = self.modules
        outputs = modules.call(path).outputs
        if modules.is_leaf(path) or not any(node in modules.moving for node in outputs):
            return
        tokens = all(len(shape(node)) >= 2 and node.meta["val"].dtype.is_floating_point for node in outputs)
        if tokens and (self._is_attention(path) or self._is_feed_forward(path)):
            self._sites.append(path)
            return
        for child in modules.children(path):
            self._descend(child)

    def _is_attention(self, path: str) -> bool:
        """Whether a module is an attention itself, and no wrapper of one or of more than that.

        Raises:
            CompileError: It can be that or a wrapper, and nothing is pinned.
        """
        modules, kind = self.modules, type(self.modules.module(path)).__name__
        if not _attends(modules, path):
            return False
        if kind in self._pins:
            return self._pins[kind] == "outer"
        below = [child for child in modules.children(path) if not modules.is_leaf(child)]
        # A module that only multiplies tokens, without maps, is a part of the attention around it.
        inner = [child for child in below if _attends(modules, child) and modules.moving_maps(child)]
        outside = [node for node in modules.attends(path) if all(node not in modules.inside[child] for child in inner)]
        named, feeds = bool(ATTENTION.search(kind)), [child for child in below if self._is_feed_forward(child)]
        if not inner and (named or not feeds):
            return True
        if inner and not outside and not named:
            return False
        raise CompileError(
            f"the attention of {self.path} can be {path} or parts of it ({', '.join(inner or feeds)}); which of them is cached "
            f"changes what a reuse means, so that none is taken: pin {kind} in compiler/models/found.py"
        )

    def _is_feed_forward(self, path: str) -> bool:
        """Whether a module maps tokens twice or more and returns them in their shape."""
        modules, call = self.modules, self.modules.call(path)
        if _attends(modules, path) or modules.is_leaf(path):
            return False
        taken = [shape(node) for node in call.inputs if node in modules.moving]
        maps = modules.moving_maps(path)
        return len(maps) >= 2 and len(call.outputs) == 1 and shape(call.outputs[0]) in taken

    def _kinds(self, path: str, call_index: int) -> tuple[str, ...]:
        """The kinds of a module's outputs."""
        modules, name = self.modules, path[len(self.path) + 1 :]
        outputs = modules.call(path, call_index).outputs
        context = bool(CONTEXT.search(name)) or self._is_other_stream(path, call_index)
        if not _attends(modules, path):
            kind = "audio_ff" if AUDIO.search(name) else "context_ff" if context else "ff"
            return (kind, *["context_ff"] * (len(outputs) - 1))
        rest = ["context_attn"] * (len(outputs) - 1)
        return (self._kind_of_attention(path, call_index, context), *rest)

    def _kind_of_attention(self, path: str, call_index: int, context: bool) -> str:
        """Cross attention has keys that do not depend on the latents, attention across streams another stream's."""
        call, name = self.modules.call(path, call_index), path[len(self.path) + 1 :]
        products = self.modules.attends(path, call_index)
        if products and all(self._is_cross(node) for node in products):
            return "audio_cross_attn" if AUDIO.search(name) else "cross_attn"
        streams = {shape(node) for node in call.inputs if node in self.modules.moving and len(shape(node)) == 3}
        if len(call.outputs) == 1 and len(streams) > 1 and all(self._reads_other(node, streams) for node in products):
            return "modal_attn"
        return "audio_attn" if AUDIO.search(name) else "context_attn" if context else "attn"

    def _is_cross(self, node: fx.Node) -> bool:
        keys = tensors_read(node)
        keyed = getattr(node.target, "__name__", "") in KEYED
        return any(key not in self.modules.moving for key in (keys[1:2] if keyed else keys))

    def _reads_other(self, node: fx.Node, streams: set[tuple[int, ...]]) -> bool:
        """Whether keys are of another stream's length than queries, and not of all together."""
        queries, keys = [shape(tensor) for tensor in tensors_read(node)[:2]]
        lengths = {stream[1] for stream in streams}
        differing = [(q, k) for q, k in zip(queries, keys, strict=False) if q != k]
        return len(differing) == 1 and set(differing[0]) <= lengths

    def _is_other_stream(self, path: str, call_index: int) -> bool:
        """Whether a further call of a module works on tokens of another number than the first."""
        first, this = (self.modules.call(path, i).outputs for i in (0, call_index))
        return [shape(node) for node in first] != [shape(node) for node in this]

    # -- linear maps of the block's own --------------------------------------------------------------------------------

    def _inline(self) -> dict[str, tuple[str, ...]]:
        """The last maps of what the block computes itself: an attention, a feed-forward, or a projection of both."""
        modules = self.modules
        within = {node for site in self._sites for node in modules.inside[site]}
        maps = [node for node in modules.moving_maps(self.path) if node.op == "call_module" and node not in within]
        output, values = output_of(modules.trace.graph), dict[str, tuple[str, ...]]()
        if not maps:
            return values
        everything, total = live_nodes([output]), modules.macs(self.path)
        members = set(modules.inside[self.path])
        covered = set[fx.Node]()
        for node in reversed(maps):
            name = str(node.target)[len(self.path) + 1 :]
            saved = (everything - live_nodes([output], cut=[node]) | {node}) & members
            if node in covered or macs_of(saved) < LEAST * total:
                continue
            covered |= saved
            values[name] = (self._kind_inline(saved, everything, within, name),)
            if values[name] == ("proj_out",):
                values |= self._activations(saved, within)
        return dict(reversed(values.items()))

    def _kind_inline(self, saved: set[fx.Node], everything: set[fx.Node], within: set[fx.Node], name: str) -> str:
        """What a reuse of a map saves says what it is."""
        attention = [node for node in saved & self.modules.products if node not in within]
        if attention:
            return "cross_attn" if all(map(self._is_cross, attention)) else "context_attn" if CONTEXT.search(name) else "attn"
        gone = [site for site in self._sites if saved.issuperset(everything.intersection(self.modules.call(site).outputs))]
        if gone and all(_attends(self.modules, site) for site in gone):
            return "proj_out"
        return "context_ff" if CONTEXT.search(name) else "ff"

    def _activations(self, saved: set[fx.Node], within: set[fx.Node]) -> dict[str, tuple[str, ...]]:
        """The activation between two maps of the block, beside its attention."""
        found = [
            node
            for node in saved - within
            if node.op == "call_module" and isinstance(self.modules.module(str(node.target)), ACTIVATIONS)
        ]
        return {str(node.target)[len(self.path) + 1 :]: ("mlp",) for node in found}


ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU)


def _ends(modules: TracedModules, blocks: list[str]) -> tuple[int | None, int | None]:
    """Which output of the last block are the tokens that the output head takes, and which input of the first they begin as.

    A site for the whole stack stands for everything before it: where another stream leaves the stack beside the tokens, there
    is none.
    """
    first, last = modules.call(blocks[0]), modules.call(blocks[-1])
    output = output_of(modules.trace.graph)
    work = [node for block in blocks for node in modules.moving_maps(block)]
    for number, node in enumerate(last.outputs):
        if node in modules.moving and not live_nodes([output], cut=[node]).intersection(work):
            taken = [i for i, one in enumerate(first.inputs) if one in modules.moving and shape(one) == shape(node)]
            return number, taken[0] if taken else None
    return None, None
