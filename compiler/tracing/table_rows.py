"""Which inputs say rows of tables, such as class labels, and how many rows there are."""

import torch
from torch import fx, nn

# What hands on the numbers that it is given.
HANDS_ON = frozenset({
    "clone", "contiguous", "expand", "flatten", "int", "long", "repeat", "reshape", "squeeze", "to", "unsqueeze", "view",
})  # fmt: skip


def table_rows(graph: fx.Graph, model: nn.Module) -> dict[str, int]:
    """The rows of the smallest table that a traced forward looks up by an input's numbers, by the input's name.

    Args:
        graph: As traced.
        model: Whose forward it is.
    """
    rows: dict[str, int] = {}
    for node in graph.nodes:
        numbers, count = _looked_up(node, model)
        while numbers is not None and numbers.op != "placeholder":
            numbers = numbers.all_input_nodes[0] if _name(numbers) in HANDS_ON else None
        if numbers is not None:
            rows[str(numbers.target)] = min(count, rows.get(str(numbers.target), count))
    return rows


def _looked_up(node: fx.Node, model: nn.Module) -> tuple[fx.Node | None, int]:
    """What a node takes for rows of a table, and how many there are; None where it looks up nothing."""
    arguments = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return (arguments[0], module.num_embeddings) if isinstance(module, nn.Embedding) and arguments else (None, 0)
    if node.op == "call_function" and _name(node) == "embedding" and len(arguments) > 1:
        # torch.embedding and its operator have the table first, torch.nn.functional.embedding has it second.
        table, numbers = sorted(arguments[:2], key=lambda argument: not argument.meta["val"].is_floating_point())
        return numbers, int(table.meta["val"].shape[0])
    return None, 0


def _name(node: fx.Node) -> str:
    """A function's or method's name, without an overload's."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))
