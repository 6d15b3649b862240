"""The hash of a tensor's bytes sees every flipped bit and every exchange."""

from __future__ import annotations

import pytest
import torch

from train import replicas
from train.replicas import _sides, fingerprint

SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_any_flipped_bit_changes_the_fingerprint(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CHUNK", 8)
    x = torch.randint(0, 2, (3, 7)).to(dtype)
    bits = x.view(SIGNED[dtype.itemsize]).view(-1)
    whole, seen = int(fingerprint(x)), set()
    for place in range(x.numel()):
        for bit in range(8 * dtype.itemsize):
            flip = torch.tensor(1 << bit).to(bits.dtype) if bit < 63 else torch.tensor(-(2**63))
            bits[place] ^= flip
            seen.add(int(fingerprint(x)))
            bits[place] ^= flip
    assert int(fingerprint(x)) == whole and whole not in seen
    if dtype.itemsize <= 4:  # in wider words the highest bits of different places count alike
        assert len(seen) == 8 * dtype.itemsize * x.numel()


def test_order_counts_and_layout_does_not() -> None:
    x = torch.randn(4, 6)
    assert fingerprint(x) == fingerprint(x.t().contiguous().t())
    assert fingerprint(x) != fingerprint(x.flip(0)) and fingerprint(x) != fingerprint(x.t())
    assert fingerprint(torch.tensor(0.0)) == fingerprint(torch.zeros(0)) == 0


def test_those_apart_from_most_are_named() -> None:
    assert _sides({0: 5, 1: 5, 2: 7}) == "is not the same on rank 2 as on ranks 0, 1"
    assert _sides({1: 4, 3: 5}) == "is not the same on rank 1 as on rank 3"
    many = dict.fromkeys(range(8), 1) | {2: 3, 5: 4}
    assert _sides(many) == "is not the same on ranks 2, 5 as on ranks 0, 1, 3, 4 and 2 more"
