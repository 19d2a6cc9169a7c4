"""What is handed on between tests is what a new trace would be."""

import pytest
import torch

from helpers import shared_graphs
from helpers.shared_graphs import facts_of, mark_anew, mark_once, trace_once
from helpers.tiny import inputs, tiny_dit
from stepgraph.compiler.models import family_of
from stepgraph.node_facts import MARKER


class OtherProcessor:
    """An attention processor of another class."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def replace_processor(model):
    model.transformer_blocks[0].attn1.processor = OtherProcessor()


def change_strength(model):
    model.transformer_blocks[0].ff.scaling["adapter"] = 0.5


def replace_forward(model):
    block = model.transformer_blocks[1]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)


def replace_module(model):
    model.transformer_blocks[0].ff.net[1] = torch.nn.Identity().eval()


def set_flag(model):
    model.transformer_blocks[0].only_cross_attention = True


CHANGES = [replace_processor, change_strength, replace_forward, replace_module, set_flag]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_however_often_memory_is_used_again(change):
    model = tiny_dit()
    model.transformer_blocks[0].ff.scaling = {"adapter": 1.0}
    for _ in range(20):
        before = facts_of(model)
        assert before == facts_of(model)
        assert hash(before) == hash(facts_of(model))
        change(model)
        assert facts_of(model) != before
        model.transformer_blocks[0].ff.scaling = {"adapter": 1.0}
        model.transformer_blocks[0].only_cross_attention = False


def test_a_marked_graph_is_handed_on_with_its_trace_and_never_rewritten():
    model = tiny_dit()
    trace, family = trace_once(model, inputs()), family_of(model)
    marked = mark_once(trace, family)
    assert marked.trace is trace
    assert mark_once(trace, family) is marked
    other = trace_once(model, inputs(2))
    assert mark_once(other, family).trace is other
    copied = mark_anew(trace, family)
    assert [node.format_node() for node in copied.graph.nodes] == [node.format_node() for node in marked.graph.nodes]
    marker = next(node for node in reversed(marked.graph.nodes) if MARKER in node.meta)
    marker.replace_all_uses_with(marker.args[0])
    with pytest.raises(AssertionError, match="rewritten in place"):
        mark_once(trace, family)
    # Nobody else is handed it.
    del shared_graphs._marked[id(trace), shared_graphs.Same(family)]


def test_a_trace_is_handed_on_while_nothing_changes():
    model = tiny_dit()
    first = trace_once(model, inputs())
    assert trace_once(model, inputs()) is first
    assert trace_once(model, inputs(2)) is not first
    model.transformer_blocks[0].ff.net[1] = torch.nn.Identity().eval()
    assert trace_once(model, inputs()) is not first


def test_a_model_built_anew_gets_the_trace_of_one_like_it():
    model, twin, other = tiny_dit(seed=1), tiny_dit(seed=2), tiny_dit(seed=1, num_layers=1)
    first = trace_once(model, inputs())
    assert trace_once(twin, inputs()) is first
    assert trace_once(other, inputs()) is not first
    bound = first.bind(twin)
    own = twin(**inputs(), return_dict=False)[0]
    assert torch.equal(bound(**inputs())[0], own)
    assert not torch.equal(own, model(**inputs(), return_dict=False)[0])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_not_like_another_is_traced(change):
    model, twin = tiny_dit(), tiny_dit()
    for each in (model, twin):
        each.transformer_blocks[0].ff.scaling = {"adapter": 1.0}
    assert facts_of(model, alike=True) == facts_of(twin, alike=True)
    change(twin)
    assert facts_of(model, alike=True) != facts_of(twin, alike=True)


def test_weights_of_another_kind_are_not_alike():
    assert facts_of(tiny_dit(), alike=True) != facts_of(tiny_dit().to(torch.float64), alike=True)
    frozen = tiny_dit().requires_grad_(False)
    assert facts_of(tiny_dit(), alike=True) != facts_of(frozen, alike=True)
