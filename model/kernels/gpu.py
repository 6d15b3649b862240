"""What the Triton kernels share: Triton where it is installed, which GPUs run them, scales of powers of two.

Triton comes with CUDA builds of torch. Elsewhere these modules import just the same, and the public
functions compute what their torch references say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # type: ignore[assignment]

LIBRARY = torch.library.Library("fourfold", "FRAGMENT")  # our operators
BODIES: dict[Any, Callable[..., Any]] = {}  # the functions that operators were made of
HOPPER = (9, 0)  # its compute capability
TILE = 128  # rows and columns of the tiles of the kernels, and of the blocks of FP8

_planned = False  # whether tensors on the meta device stand for those of a GPU that runs the kernels


def jit(kernel: Callable[..., Any] | None = None, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or the function itself where there is no Triton to run it.

    The numbers called `varying` differ from step to step: a kernel is not compiled anew for some of them.
    """
    if kernel is None:
        return partial(jit, varying=varying)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=varying)


def launched(kernel: Any) -> Any:
    """The kernel, to be launched as kernel[grid](...): which does nothing to tensors on the meta device."""
    return _Launched(kernel)


class _Launched:
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], first: Tensor, /, *rest: Any, **constants: Any) -> None:
        if not first.is_meta:
            self.kernel[grid](first, *rest, **constants)


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make of a function the operator `fourfold::name`, which neither changes nor returns its arguments.

    `torch.library.custom_op` does the same and checks at every call, which takes longer than small kernels.
    Its fake says what it returns; on meta tensors the function itself, one of `BODIES`, shows what it
    allocates meanwhile, too (`train.memory`).
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = name + torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        defined = getattr(torch.ops.fourfold, name).default
        BODIES[defined] = function
        return defined

    return register


def runs_kernels(x: Tensor) -> bool:
    """Whether x is on a GPU that `has_kernels`, or stands for a tensor that will be."""
    return _planned if x.is_meta else x.is_cuda and has_kernels(x.device)


def has_kernels(device: torch.device) -> bool:
    """Whether this is a GPU whose tensor cores multiply FP8 as these kernels do: Hopper or newer."""
    return triton is not None and compute_capability(device) >= HOPPER


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's number of what the device can do, such as `HOPPER`; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@contextmanager
def planned_for_kernels(wanted: bool = True) -> Iterator[None]:
    """Meanwhile tensors on the meta device stand for those of a GPU that runs the kernels, if `wanted`."""
    global _planned
    before, _planned = _planned, wanted
    try:
        yield
    finally:
        _planned = before


def tiles(size: int) -> int:
    """How many tiles cover an axis."""
    return -(-size // TILE)


def slots_of(rows: int, groups: int) -> int:
    """Tiles of 128 rows that never hold rows of two groups, counted so that the host need not know the sizes
    of groups: the first row of group e, `start`, begins tile start // 128 + e, and some tiles stay empty."""
    return rows // TILE + groups


def power_of_two_of(count: int) -> int:
    """The smallest power of two, and no less than a warp, that holds so many."""
    return max(32, 1 << (count - 1).bit_length())


@jit
def group_of_slot(offsets, slot, groups, E: tl.constexpr):
    """The group that a tile of `slots_of` belongs to, the tile's first row, and the group's end row, which is
    not beyond the first where the tile is empty."""
    index = tl.arange(0, E)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < groups), other=0)
    e = tl.sum(((starts // 128 + index <= slot) & (index < groups)).to(tl.int32), 0) - 1
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    return e, start + (slot - start // 128 - e) * 128, tl.load(offsets + e)


@jit
def magnitude(x):
    """Bits of |x| in fp32: as integers they are in the order of the numbers, infinity and then NaN on top."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def power_of_two(amax, largest: tl.constexpr):
    """`magnitude` of a block's amax, and of the format's largest number -> scale and its inverse, fp32.

    The integers of `model.quant._scales`. Exponents are from -126 to 120, so both are normal numbers, and
    x times the inverse rounds as x over the scale does. Neither may flush denormals: x of 2^-127 over 2^-126
    is a half. Triton's multiplications do not.
    """
    exponent = tl.maximum((amax - largest + 0x7FFFFF) >> 23, -126)
    finite = amax < 0x7F800000
    scale = tl.where(finite, (127 + exponent) << 23, 0x7FC00000)
    inverse = tl.where(finite, (127 - exponent) << 23, 0x7FC00000)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
