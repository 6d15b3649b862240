"""Manifold-constrained hyper-connections: N residual streams mixed by doubly stochastic matrices.

    pre = sigmoid(a1 W x + b1) + eps,  post = 2 sigmoid(a2 W x + b2),  comb = Sinkhorn(softmax(a3 W x + b3))
    block input = sum_i pre_i X_i,     new X_j = post_j * output + sum_i comb_ij X_i

with x the RMS-normalised concatenation of the streams (V4 report, section 2.2; Xie et al. 2026).
Note the sum over comb's first axis.

Legend: B batch, S sequence, N streams, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.kernels.sinkhorn import sinkhorn
from model.kernels.stream_product import stream_product

Mix = tuple[Tensor, Tensor]  # post [B, S, N], comb [B, S, N, N], fp32


def project_normed(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    """W times the RMS-normalised vec(X), in fp32: [B, S, N, D], [O, N * D] -> [B, S, O].

    The norm is one number per token, so it is applied after the product.
    """
    product, mean_square = stream_product(streams.flatten(2), weight)
    return product * torch.rsqrt(mean_square + eps)


def mixed(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [..., M, N] @ streams [..., N, D].

    Libraries are slow with so few rows; a compiler sums them up in the kernel of what surrounds it.
    """
    if torch.compiler.is_compiling():
        return (weights.unsqueeze(-1) * streams.unsqueeze(-3)).sum(-2)
    return weights @ streams


def collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """sum_i pre_i X_i: [B, S, N], [B, S, N, D] -> [B, S, D] in the streams' dtype."""
    return mixed(pre.unsqueeze(2).to(streams.dtype), streams).squeeze(2)


class HyperConnection(nn.Module):
    """The mixing around one block: `enter` before it, `leave` after it. Parameters stay fp32."""

    def __init__(self, streams: int, hidden_size: int, iterations: int, eps: float, norm_eps: float):
        super().__init__()
        outputs = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(outputs, streams * hidden_size))  # rows: pre N, post N, comb N * N
        self.base = nn.Parameter(torch.empty(outputs))
        self.scale = nn.Parameter(torch.empty(3))
        self.streams, self.iterations, self.eps, self.norm_eps = streams, iterations, eps, norm_eps

    def enter(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """Streams [B, S, N, D] -> block input [B, S, D] and the weights with which `leave` mixes."""
        n = self.streams
        mixes = project_normed(streams, self.fn, self.norm_eps)  # [B, S, (2 + N) N]
        parts = zip(mixes.split([n, n, n * n], -1), self.scale, self.base.split([n, n, n * n]), strict=True)
        pre, post, comb = (part * scale + base for part, scale, base in parts)
        comb = sinkhorn(comb.unflatten(-1, (n, n)), self.iterations, self.eps)
        return collapse(pre.sigmoid() + self.eps, streams), (2 * post.sigmoid(), comb)

    def leave(self, output: Tensor, streams: Tensor, mix: Mix | None) -> Tensor:
        """Block output [B, S, D] and the streams before it -> new streams [B, S, N, D]."""
        assert mix is not None
        post, comb = (weights.to(streams.dtype) for weights in mix)
        return post.unsqueeze(-1) * output.unsqueeze(2) + mixed(comb.transpose(-1, -2), streams)


class PlainResidual(nn.Module):
    """Baseline with one stream and no parameters: new X = X + output."""

    def enter(self, streams: Tensor) -> tuple[Tensor, None]:
        return streams.squeeze(2), None

    def leave(self, output: Tensor, streams: Tensor, mix: Mix | None) -> Tensor:
        return streams + output.unsqueeze(2)


class HyperHead(nn.Module):
    """Collapses the streams before the final norm: [B, S, N, D] -> [B, S, D]."""

    def __init__(self, streams: int, hidden_size: int, eps: float, norm_eps: float):
        super().__init__()
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * hidden_size))
        self.hc_base = nn.Parameter(torch.empty(streams))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.eps, self.norm_eps = eps, norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        mixes = project_normed(streams, self.hc_fn, self.norm_eps)
        return collapse((mixes * self.hc_scale + self.hc_base).sigmoid() + self.eps, streams)
