"""cache-dit with a step mask on DiT, and what it computes, written out.

A plan says what every module does at every step. cache-dit (1.5.3) can express one dimension of that: a mask over steps
(`steps_computation_mask` with the static policy). At a masked step the first `Fn_compute_blocks` blocks run, of which it
demands at least one; what the other blocks added at the last computed step is added again. Reuse of single modules, or of
single blocks by step, has no setting there.
"""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from stepgraph.bench.speed.hook_runtime import sharing_weights
from stepgraph.errors import CompileError, PlanError

REPEATED = ["BasicTransformerBlock"]


class CacheDit:
    """A copy of a model, sharing its weights, under cache-dit's step mask."""

    def __init__(self, model: nn.Module, mask: Sequence[bool], regional: bool) -> None:
        """Enable the cache, and compile the blocks where asked.

        Args:
            model: A DiTTransformer2DModel.
            mask: Whether each step is computed.
            regional: Compile the blocks, as diffusers' `compile_repeated_blocks` does for models that name theirs.

        Raises:
            CompileError: cache-dit is not installed.
        """
        # It tells every step of its set-up unless told not to before it is imported.
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
        try:
            import cache_dit
        except ImportError as error:
            raise CompileError(f"cache-dit is not installed ({error}); pip install 'stepgraph[peers]'") from error
        self._library, self.mask = cache_dit, list(mask)
        self.model = cast("Any", sharing_weights(model))
        if regional:
            self.model._repeated_blocks = REPEATED
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        cache_dit.enable_cache(self.model, cache_config=self._config())

    def _config(self) -> Any:
        return self._library.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, num_inference_steps=len(self.mask),
            enable_separate_cfg=False, steps_computation_mask=[int(flag) for flag in self.mask],
            steps_computation_policy="static",
        )  # fmt: skip

    def start(self) -> Any:
        """The model, with its cache emptied: without that, a run reuses what the one before left."""
        self._library.refresh_context(self.model, cache_config=self._config())
        return self.model

    def refuse_other_steps(self, steps: int) -> None:
        """Compare the steps in which it used its cache with the mask.

        Raises:
            PlanError: They differ within the first `steps` steps.
        """
        # Its summary is filled in at the end of a whole run only.
        used = sorted(self.model._context_manager.get_cached_steps())
        expected = [step for step, computed in enumerate(self.mask[:steps]) if not computed]
        if used != expected:
            raise PlanError(f"cache-dit used its cache at the steps {used}; the mask says {expected}")


class FirstBlockAndResidual:
    """The same on the eager model: at a masked step the first block, and what the others last added.

    For checking cache-dit's results; nothing of it is used.
    """

    def __init__(self, model: nn.Module, mask: Sequence[bool]) -> None:
        self.model, self.mask, self.step = sharing_weights(model), list(mask), 0
        self.residual: torch.Tensor | None = None
        self.ran = 0
        blocks: Any = list(self.model.get_submodule("transformer_blocks").children())
        for index, block in enumerate(blocks):
            vars(block)["forward"] = self._forward(index, len(blocks), block.forward)

    def start(self) -> "FirstBlockAndResidual":
        """Begin a run."""
        self.step, self.residual, self.ran = 0, None, 0
        return self

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward at the next step."""
        result = self.model(**inputs)
        self.step += 1
        return result

    def _forward(self, block: int, count: int, original: Any) -> Any:
        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            computed = self.mask[self.step]
            out = tokens
            if block == 0 or computed:
                out = original(tokens, *args, **kwargs)
                self.ran += 1
            if block == 0:
                self.after_first = out
            if block == count - 1:
                if computed:
                    self.residual = out - self.after_first
                elif self.residual is not None:
                    out = out + self.residual
            return out

        return forward
