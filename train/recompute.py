"""Activation checkpointing: what backward computes again instead of keeping it (`train.recompute`).

The model runs each layer and each MTP block through `ForCausalLM.around`; here it gets one that checkpoints
them. Without gradients, as in evaluation, nothing is checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import model.kernels.index_loss
import model.kernels.product  # noqa: F401  registers fourfold::grouped_product
from model.model import ForCausalLM

# What "selective" keeps: outputs whose arithmetic or traffic costs more than their bytes. Every product with
# a weight arrives here as one of the first five (`F.linear` folds leading axes, whatever the strides), but
# for the grouped output of attention: an einsum, so a `bmm`. All `bmm` and `baddbmm` are computed again, as
# most of them are mHC's, as large as all streams, or attention's logits.
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.fourfold.product.default,
    torch.ops.fourfold.grouped_product.default,
    torch.ops.fourfold.index_select.default,
    torch.ops.fourfold.index_divergence.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
)
CONTEXTS: dict[str, Callable[[], Any]] = {
    "selective": partial(create_selective_checkpoint_contexts, list(KEPT)),
    "full": noop_context_fn,
}
HOW = ("none", *CONTEXTS)  # from most to least memory


def apply(model: ForCausalLM, how: str) -> ForCausalLM:
    """Have `model` recompute as `how` says: one of `HOW`, with the meanings of `TrainConfig.recompute`."""
    model.around = partial(_checkpointed, CONTEXTS[how]) if how != "none" else ForCausalLM.around
    return model


def keeps_some(model: ForCausalLM) -> bool:
    """Whether it depends on the operation what `model` keeps."""
    return isinstance(model.around, partial) and model.around.args == (CONTEXTS["selective"],)


def _checkpointed(contexts: Callable[[], Any], block: Callable[..., Any], *inputs: Any) -> Any:
    """block(*inputs), of which only the inputs stay, and what `contexts` keep."""
    if not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )  # the model draws no random numbers
