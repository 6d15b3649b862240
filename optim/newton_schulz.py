"""Hybrid Newton-Schulz: the nearest semi-orthogonal matrix, from matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

# DeepSeek-V4 report, "Muon optimizer": eight steps that grow small singular values fast and leave all of them
# near 1, then two that settle them at 1.
STEPS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2

# Squares of entries below 1e-19 leave fp32's range, and a norm that is too small would make the iteration
# diverge. No norm above this floor suffers, and a matrix below it fades to zero instead.
SMALLEST_NORM = 1e-15


def newton_schulz(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Replace the singular values of each matrix of `x` by about 1, and keep zero ones near zero.

    X / |X|_F, then X <- aX + b(XX^T)X + c(XX^T)^2 X for each (a, b, c) of STEPS. Singular values above
    2.4e-5 |X|_F end within 1 +- 0.01; smaller ones end lower. Rounding to bfloat16 makes larger ones out
    of nothing: there a matrix of low rank comes back with full rank.

    x      [..., n, m]: any number of matrices; not modified
    dtype  of the matrix products (default: x's own); the norm is fp32 or better
    Returns [..., n, m] in x's dtype. Zero gives zero; NaN and Inf give NaN.
    """
    if x.size(-2) > x.size(-1):
        return newton_schulz(x.mT, dtype).mT
    batch = x.reshape(-1, *x.shape[-2:])  # [b, n, m], n <= m
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=norm_dtype)
    y = (batch / norm.clamp_min(SMALLEST_NORM)).to(dtype or x.dtype)
    for a, b, c in STEPS:
        gram = torch.bmm(y, y.mT)  # [b, n, n]
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        y = torch.baddbmm(y, poly, y, beta=a)  # [b, n, m]
    return y.to(x.dtype).reshape(x.shape)
