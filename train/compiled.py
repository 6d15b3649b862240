"""What torch.compile makes of a model: few large kernels of many small operations (`train.compile`).

Layers of one kind share what was compiled. Small models wait for Python most of the time, and large ones read
and write activations less often. Kernels of our own and libraries' products stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from model.block import DecoderLayer
from model.hyper_connection import HyperConnection
from model.model import ForCausalLM
from model.moe import LocalDispatcher
from train.recompute import keeps_some

warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools")  # what a GPU can do never changes
warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # fp32 products of router and mHC stay exact

KINDS = 64  # of layers, in all their modes, shapes and precisions; beyond it torch goes on without compiling


def compile_layers(model: ForCausalLM, whole: bool = True) -> None:
    """Compile each layer, or only how its streams are mixed if it may not be `whole` (on a CPU whole layers
    compile for many minutes).

    Whole layers need all that they read on this rank, hide the operations between which
    `train.recompute=selective` chooses, and are in bf16: torch traces grouped products of nothing else.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    for moe in model.moes():
        local, dtype = isinstance(moe.dispatcher, LocalDispatcher), moe.experts.gate_up_proj.dtype
        whole = whole and local and dtype == torch.bfloat16
    whole = whole and model.context.size == 1 and not keeps_some(model)
    for module in model.modules():
        if whole and isinstance(module, DecoderLayer):
            module.forward = compiled(module.forward)  # type: ignore[method-assign]
        elif not whole and isinstance(module, HyperConnection):
            module.enter = compiled(module.enter)  # type: ignore[method-assign]
            module.leave = compiled(module.leave)  # type: ignore[method-assign]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled for training alone: evaluation has other shapes, looks inside, and is rare."""
    fast = torch.compile(function, dynamic=False)

    def call(*inputs: Any, **options: Any) -> Any:
        return (fast if torch.is_grad_enabled() else function)(*inputs, **options)

    return call
