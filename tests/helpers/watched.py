"""The values of sites as forward hooks see them."""

import torch

from helpers.oracle import run_loop

STEPS, SAMPLES, SEED = 3, 2, 4


def watched_values(model, scheduler, samples: int, steps: int = STEPS, seed: int = SEED) -> list[list[dict[str, torch.Tensor]]]:
    """Values of all sites by sample and step, from forward hooks."""
    blocks = model.transformer_blocks
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, args, kwargs, out: seen.update({name: (out[0] if isinstance(out, tuple) else out).clone()})

    def first_tokens(module, args, kwargs):
        seen["tokens_in"] = args[0].clone()

    hooks = [blocks[0].register_forward_pre_hook(first_tokens, with_kwargs=True)]
    for number, block in enumerate(blocks):
        path = f"transformer_blocks.{number}"
        for name, module in ((f"{path}.attn1", block.attn1), (f"{path}.ff", block.ff), (path, block)):
            hooks.append(module.register_forward_hook(keep(name), with_kwargs=True))
    hooks.append(model.register_forward_hook(keep("output"), with_kwargs=True))
    generator, runs = torch.Generator().manual_seed(seed), []
    for sample in range(samples):
        taken: list[dict[str, torch.Tensor]] = []

        def predict(taken=taken, **given):
            out = model(**given)
            seen["hidden"] = seen[f"transformer_blocks.{len(blocks) - 1}"]
            seen["stack_residual"] = seen["hidden"] - seen["tokens_in"]
            taken.append(dict(seen))
            return out

        noise = torch.randn(1, 4, 8, 8, generator=generator)
        run_loop(predict, scheduler, noise, steps, 1.0, {"class_labels": torch.tensor([sample])})
        runs.append(taken)
    for hook in hooks:
        hook.remove()
    return runs
