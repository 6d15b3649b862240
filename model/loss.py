"""Cross-entropy straight from hidden states, never holding all logits.

Legend: n tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_BUDGET = 1 << 26  # fp32 logits alive at once


class TokenScores(NamedTuple):
    """What was predicted at every token, in the shape of the labels."""

    loss: Tensor  # cross-entropy in nats; 0 where the label is ignored
    correct: Tensor  # bool: the label is the likeliest token
    counted: Tensor  # bool: the label is not ignored


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients chunk by chunk in forward; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        wide = _wide(weight)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows, log_p in _log_probabilities(hidden, weight):
            h, y = hidden[rows], labels[rows]
            loss += F.nll_loss(log_p, y, ignore_index=-100, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_p.exp_()  # softmax - one_hot(label), zero where ignored
            grad.scatter_add_(1, y.clamp(min=0).unsqueeze(1), grad.new_full((len(y), 1), -1.0))
            grad = grad.mul_((y != -100).unsqueeze(1)).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
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


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _log_probabilities(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of hidden [n, D] after the others, and their log-probabilities [rows, V]."""
    chunk = max(1, LOGIT_BUDGET // weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        yield rows, F.linear(hidden[rows], weight).to(_wide(weight)).log_softmax(-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden @ weight.T) and the number of labels not -100.

    hidden [..., D], weight [V, D], labels [...] int64 -> (scalar fp32, scalar int64), in nats.
    """
    weight = weight.to(hidden.dtype)
    if not torch.is_grad_enabled():  # inside a Function even no_grad reports that gradients are wanted
        hidden, weight = hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return loss, (labels != -100).sum()


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[tuple[Tensor, Tensor], TokenScores]:
    """What `linear_cross_entropy` returns, to the bit and without gradients, and the same token by token."""
    weight, shape = weight.to(hidden.dtype), labels.shape
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    total = hidden.new_zeros((), dtype=_wide(weight))
    losses = torch.empty_like(labels, dtype=total.dtype)
    likeliest = torch.empty_like(labels)
    for rows, log_p in _log_probabilities(hidden, weight):
        total += F.nll_loss(log_p, labels[rows], ignore_index=-100, reduction="sum")
        losses[rows] = F.nll_loss(log_p, labels[rows], ignore_index=-100, reduction="none")
        likeliest[rows] = log_p.argmax(-1)
    counted = labels != -100
    scores = TokenScores(*(x.view(shape) for x in (losses, likeliest == labels, counted)))
    return (total, counted.sum()), scores
