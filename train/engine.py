"""The reference engine: one process, fp32 masters, micro-batches accumulated in fp32, plain torch.

An engine owns the model, its masters and the optimizer behind four calls: `engine(batch)`, `backward`,
`step`, and `state` / `load_state`. The loop knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from model.hyper_connection import HyperConnection
from model.model import ForCausalLM, ModelOutput, stays_fp32
from optim.config import OptimConfig
from optim.groups import build_groups, set_active
from optim.muon import HybridOptimizer, clip_grad_norm_per_set
from optim.schedule import set_lr

Batch = Mapping[str, Tensor]


def compile_hot_parts(model: nn.Module) -> None:
    """torch.compile what is many small operations on the streams; large products stay library calls.

    Whole layers compile for minutes and gain little more: their time is in products already.
    """
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.enter = torch.compile(module.enter)  # type: ignore[method-assign]
            module.leave = torch.compile(module.leave)  # type: ignore[method-assign]


class TorchEngine:
    """Trains `model` in `compute_dtype`; weights that are computed in a narrower dtype get an fp32 master.

    The gradient of such a weight is added to its master's in fp32 as soon as backward has made it, and freed.
    """

    def __init__(
        self, model: ForCausalLM, config: OptimConfig, compute_dtype: torch.dtype, compiled: bool = False
    ):
        self.masters = dict(model.named_parameters())
        self.narrow: dict[str, nn.Parameter] = {}  # weights that have a master of their own
        if compute_dtype != torch.float32:
            self.narrow = {name: p for name, p in self.masters.items() if not stays_fp32(name)}
            self.masters |= {name: nn.Parameter(p.detach().clone()) for name, p in self.narrow.items()}
            for name, parameter in self.narrow.items():
                parameter.register_post_accumulate_grad_hook(self._accumulate_into(self.masters[name]))
        self.model = model.cast(compute_dtype)
        self.clip_norm = config.clip_norm
        self.optimizer = HybridOptimizer(build_groups(self.masters.items(), model.config, config))
        if compiled:
            compile_hot_parts(self.model)
        # Selection is not differentiable: without a loss of its own the indexer has nothing to learn from.
        set_active(self.optimizer.param_groups, "indexer", False)

    def __call__(self, batch: Batch, **options: Any) -> ModelOutput:
        """Losses of one micro-batch (`data.loader`'s tensors, on the model's device)."""
        return self.model(**batch, **options)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, already scaled by the global counts."""
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, Tensor]:
        """Clip each set, update the masters, copy them into the model; returns the gradient norms by set.

        Nothing is updated when a norm is not finite.
        """
        groups = self.optimizer.param_groups
        norms = clip_grad_norm_per_set(groups, self.clip_norm)
        if all(bool(norm.isfinite()) for norm in norms.values()):
            set_lr(groups, lr)
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad()
        return norms

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, keyed by kind and parameter name; tensors are not copied."""
        state = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises ConfigError when it is of another model or optimizer."""
        weights = {key.partition(".")[2] for key in state if key.startswith("weight.")}
        if weights != set(self.masters):
            odd = sorted(weights ^ set(self.masters))
            raise ConfigError(
                f"resume: the checkpoint is of another model, see {odd[0]}; use the model it came from"
            )
        muon = {p for g in self.optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]}
        tensors = dict(self.model.named_buffers())
        for key, value in state.items():
            kind, _, name = key.partition(".")
            target = self.masters[name] if kind == "weight" else tensors[name] if kind == "buffer" else None
            if target is None:
                if (kind == "momentum") != (self.masters[name] in muon):
                    raise ConfigError(
                        f"resume: {name} was trained by another algorithm; use that run's optim.name"
                    )
                device = "cpu" if kind == "step" else self.masters[name].device
                self.optimizer.state[self.masters[name]][kind] = value.to(device, copy=True)
            elif target.shape != value.shape:
                raise ConfigError(
                    f"resume: {name} is {list(value.shape)} in the checkpoint, {list(target.shape)} here"
                )
            else:
                target.copy_(value)
        self._copy_masters()

    def _copy_masters(self) -> None:
        for name, parameter in self.narrow.items():
            parameter.copy_(self.masters[name])

    @staticmethod
    def _accumulate_into(master: nn.Parameter) -> Any:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is None:  # a compiled region says so of weights that took no part
                return
            if master.grad is None:
                master.grad = grad.float()
            else:
                master.grad += grad
            parameter.grad = None

        return hook
