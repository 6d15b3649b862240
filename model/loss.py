"""Cross-entropy straight from hidden states, never holding all logits.

Legend: n tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_BUDGET = 1 << 26  # fp32 logits alive at once


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients chunk by chunk in forward; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        chunk = max(1, LOGIT_BUDGET // weight.shape[0])
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]
            log_p = F.linear(h, weight).to(wide).log_softmax(-1)  # [chunk, V]
            loss += F.nll_loss(log_p, y, ignore_index=-100, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_p.exp_()  # softmax - one_hot(label), zero where ignored
            grad.scatter_add_(1, y.clamp(min=0).unsqueeze(1), grad.new_full((len(y), 1), -1.0))
            grad = grad.mul_((y != -100).unsqueeze(1)).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * upstream).to(ctx.weight_dtype),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden @ weight.T) and the number of labels not -100.

    hidden [..., D], weight [V, D], labels [...] int64 -> (scalar fp32, scalar int64), in nats.
    """
    weight = weight.to(hidden.dtype)
    if not torch.is_grad_enabled():  # inside a Function even no_grad reports that gradients are wanted
        hidden, weight = hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return loss, (labels != -100).sum()
