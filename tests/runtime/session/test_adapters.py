"""Adapters that change after compiling: an executable follows them to the bits of the eager model, or refuses the run."""

import pytest
import torch

import stepgraph as sg
from helpers.loras import count_traces, eager, full, load, step, tiny_sd3


def check(exe, model) -> torch.Tensor:
    got = step(exe)
    assert torch.equal(got, eager(model))
    return got


def test_adapters_are_set_switched_fused_and_deleted_as_diffusers_does_it(monkeypatch):
    model = tiny_sd3()
    load(model, "one", 1)
    load(model, "two", 2, rank=3)
    model.set_adapters(["one"])
    exe, traced = full(model), count_traces(monkeypatch)
    results = {"one": check(exe, model)}

    model.set_adapters(["two"], [0.5])
    results["two"] = check(exe, model)
    model.set_adapters(["one", "two"], [0.3, 0.7])
    results["both"] = check(exe, model)
    model.disable_lora()
    results["none"] = check(exe, model)
    assert len(traced) == 3
    assert len({tuple(value.flatten().tolist()) for value in results.values()}) == 4

    # All of these were met before, at whatever strength.
    model.enable_lora()
    check(exe, model)
    model.set_adapters("one", 2.0)
    check(exe, model)
    model.set_adapters(["two"], [0.25])
    check(exe, model)
    model.disable_lora()
    assert torch.equal(check(exe, model), results["none"])
    model.enable_lora()
    model.set_adapters(["one"])
    assert torch.equal(check(exe, model), results["one"])
    assert len(traced) == 3

    model.fuse_lora(adapter_names=["one"])
    fused = check(exe, model)
    assert torch.allclose(fused, results["one"], atol=1e-4)
    model.unfuse_lora()
    check(exe, model)
    assert len(traced) == 4
    model.delete_adapters("two")
    assert torch.allclose(check(exe, model), results["one"], atol=1e-4)
    assert len(traced) == 5


def test_a_first_lora_after_compiling_and_its_end(monkeypatch):
    model = tiny_sd3()
    exe, traced = full(model), count_traces(monkeypatch)
    plain = check(exe, model)
    load(model, "one", 1)
    assert not torch.equal(check(exe, model), plain)
    model.unload_lora()
    assert torch.equal(check(exe, model), plain)
    assert len(traced) == 1
    # Other modules of the same make.
    load(model, "one", 2)
    assert not torch.equal(check(exe, model), plain)
    assert len(traced) == 1
    # Without a run in between.
    model.unload_lora()
    load(model, "one", 3)
    check(exe, model)
    model.delete_adapters("one")
    load(model, "one", 4)
    check(exe, model)
    assert len(traced) == 1
    model.fuse_lora()
    model.unload_lora()
    check(exe, model)
    assert len(traced) == 1


def test_merged_adapters_that_are_switched_off_are_taken_out_as_their_forward_would():
    model = tiny_sd3()
    load(model, "one", 1)
    exe = full(model)
    model.fuse_lora()
    model.disable_lora()
    got = step(exe)
    assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())
    assert torch.equal(got, eager(model))


@pytest.mark.parametrize("change", ["disable_lora", "fuse_lora", "unload_lora"])
def test_an_option_refuses(change):
    model = tiny_sd3()
    load(model, "one", 1)
    exe = full(model, respecialize=False)
    getattr(model, change)()
    with pytest.raises(sg.CompileError, match="respecialize=True"):
        step(exe)


def test_what_is_no_adapters_is_refused_with_them():
    model = tiny_sd3()
    load(model, "one", 1)
    exe = full(model)
    model.disable_lora()
    model.transformer_blocks[1].ff.register_forward_hook(lambda module, arguments, output: output)
    with pytest.raises(sg.CompileError, match=r"transformer_blocks\.1\.ff \(forward hook 0\)"):
        step(exe)


def test_a_run_that_is_under_way_is_not_compiled_anew_but_refused_at_its_end(monkeypatch):
    model = tiny_sd3()
    load(model, "one", 1)
    exe = full(model)
    began, traced = exe.session(), count_traces(monkeypatch)
    from helpers.pixart_sd3 import sd3_inputs

    began(**sd3_inputs())
    model.disable_lora()
    check(exe, model)
    with pytest.raises(sg.CompileError, match=r"was changed within the run: .*_disable_adapters was False when it began"):
        began(**sd3_inputs())
    assert len(traced) == 1


def test_hot_swapped_adapters_need_no_compilation(monkeypatch):
    model = tiny_sd3()
    model.enable_lora_hotswap(target_rank=4)
    load(model, "one", 1)
    exe, traced = full(model), count_traces(monkeypatch)
    results = [check(exe, model)]
    for seed, rank, alpha in ((2, 4, 8.0), (3, 1, 1.0)):
        load(model, "one", seed, rank, alpha, hotswap=True)
        results.append(check(exe, model))
    model.set_adapters("one", 0.5)
    results.append(check(exe, model))
    model.disable_lora()
    results.append(check(exe, model))
    model.enable_lora()
    assert torch.equal(check(exe, model), results[-2])
    load(model, "one", 4, 2, 5.0, hotswap=True)
    results.append(check(exe, model))
    assert len({tuple(value.flatten().tolist()) for value in results}) == len(results)
    assert not traced


def test_a_scaling_that_is_written_to_in_place_is_noticed():
    model = tiny_sd3()
    model.enable_lora_hotswap(target_rank=4)
    load(model, "one", 1)
    exe = full(model)
    before = check(exe, model)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling["one"].data.mul_(3)
    assert not torch.equal(check(exe, model), before)
