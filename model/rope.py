"""Partial, interleaved rotary positions with YaRN (Su et al. 2021; Peng et al. 2023).

V4 rotates the last R channels of queries, of the shared key/value and, with the opposite sign, of the
attention output: since a value carries its own rotation, undoing the query's leaves the relative one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cos, sin, each [..., R / 2] fp32


def inverse_frequencies(
    parameters: dict[str, Any], rope_dims: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angular frequency of each channel pair -> [R / 2] fp32.

    `parameters`: `rope_theta`, and for `rope_type: yarn` also `factor`, `beta_fast`, `beta_slow` and
    `original_max_position_embeddings`. YaRN divides by `factor` the frequencies that turn fewer than
    `beta_slow` times within the original length, keeps those above `beta_fast` turns, and blends linearly
    over channel indices in between. V4 uses no attention factor.
    """
    theta = float(parameters["rope_theta"])
    pair = torch.arange(0, rope_dims, 2, device=device).float()
    plain = 1.0 / theta ** (pair / rope_dims)
    if parameters["rope_type"] == "default":
        return plain

    def channel_with(turns: float) -> float:
        length = parameters["original_max_position_embeddings"]
        return rope_dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel_with(parameters["beta_fast"])), 0)
    high = min(math.ceil(channel_with(parameters["beta_slow"])), rope_dims - 1)
    slow = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: divide
    return plain * (1 - slow) + plain / float(parameters["factor"]) * slow


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """cos and sin of position times frequency: [...], [R / 2] -> two of [..., R / 2]."""
    angle = positions.unsqueeze(-1).float() * frequencies
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, rotation: Rotation, inverse: bool = False) -> Tensor:
    """Rotate the last R channels of x [..., C] in interleaved pairs; cos and sin broadcast over x."""
    cos, sin = rotation
    sin = -sin if inverse else sin
    rope_dims = 2 * cos.shape[-1]
    still, turning = x.split([x.shape[-1] - rope_dims, rope_dims], dim=-1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)  # [..., R / 2] each
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)
