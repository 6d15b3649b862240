"""RMS normalisation in fp32, cast back once."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype where that is wider (fp64 oracles)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in fp32 (or wider), returned in x's dtype."""
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """Weighted RMS norm over the last axis [..., D]; its weight stays fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
