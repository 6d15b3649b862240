"""Engines: what stands between the loop and the arithmetic of a step on one or many ranks.

An engine owns the model, its fp32 masters and the optimizer behind four calls: `engine(batch)`, `backward`,
`step`, and `state` with its two halves of loading. The loop knows nothing else of it. `TorchEngine`, here, is
one process in plain torch and the reference; `train.zero.ZeroEngine` is DeepSpeed's ZeRO over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from model.kernels.accumulate import accumulated
from model.kernels.cast import fp4_values
from model.model import ForCausalLM, ModelOutput, stays_fp32
from model.precision import Precision
from optim.config import OptimConfig
from optim.groups import SETS, build_groups, set_active
from optim.muon import HybridOptimizer, clip_grad_norm_per_set, same_shape_chunks
from optim.partition import is_expert
from optim.schedule import set_lr
from train.compiled import compile_layers
from train.quantisation import fp4_metrics, fp4_statistics
from train.replicas import Replica

Batch = Mapping[str, Tensor]
FP4_CHUNK = 1 << 24  # masters whose rounding is measured at once


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """The step's sequences `rows` at a time."""
    for start in range(0, batch["input_ids"].shape[0], rows):
        yield {name: x[start : start + rows] for name, x in batch.items()}


class Engine(ABC):
    """What both engines share; `model` computes, `optimizer` holds masters and moments of this rank."""

    model: ForCausalLM
    optimizer: HybridOptimizer
    clip_norm: float
    rank: int = 0
    precision = Precision()

    def __call__(self, batch: Batch, **options: Any) -> ModelOutput:
        """Losses of one micro-batch (`data.loader`'s tensors, on the model's device)."""
        return self.model(**batch, **options)

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, already scaled by the counts of the whole step.

        `last`: this is the step's last micro-batch. Over ranks, gradients add up.
        """

    @torch.no_grad()
    def use(self, precision: Precision) -> bool:
        """Compute in what `precision` says, from now on; whether that is something new."""
        if precision == self.precision:
            return False
        self.precision = precision
        self.model.use(precision)
        self._copy_masters()
        return True

    def activate(self, sets: Collection[str]) -> None:
        """Update the parameters of these sets only (`optim.groups`), from now on.

        Selection is not differentiable: without a loss of its own the indexer has nothing to learn from.
        """
        for name in SETS:
            set_active(self.optimizer.param_groups, name, name in sets)

    @torch.no_grad()
    def step(self, lr: float, measure: bool = False) -> dict[str, Tensor]:
        """Clip each set, update the masters, copy them into the model.

        Returns `grad_norm_<set>` before clipping and, where `measure` is set, `update_rms_<algorithm>`, the
        root mean square of the updates at learning rate 1, and, with experts in FP4, `fp4_metrics`. Nothing
        is updated when a norm is not finite.
        """
        self._collect()
        norms = self._clip()
        finite = all(bool(norm.isfinite()) for norm in norms.values())
        if finite:
            set_lr(self.optimizer.param_groups, lr)
            self.optimizer.measure = measure
            self._update()
        self._forget_gradients()
        logged = {f"grad_norm_{name}": norm for name, norm in norms.items()}
        if measure and finite:
            logged |= self._update_rms()
        if measure and self.precision.fp4_experts:
            logged |= self._fp4_metrics()
        return logged

    def state(self) -> dict[str, Tensor]:
        """What of a resumed run's state this rank holds, by kind and piece; most tensors are the live ones.

        Weights, moments and the random number generators' states are on one rank each, buffers on all.
        """
        buffers = {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        return {**self.optimizer.named_state(share=True), **buffers, **self._generators()}

    def replicas(self) -> Iterator[Replica]:
        """What several ranks must hold alike, to the bit; nothing where there is one."""
        return iter(())

    def state_to_load(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors that a saved state, with these keys and shapes, is to be read into.

        Raises ConfigError, naming a tensor, when it is of another model or optimizer.
        """
        buffers = {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        targets = {**self.optimizer.state_to_load(shapes), **buffers}
        for key, target in targets.items():
            name = key.partition(".")[2]
            if key not in shapes:
                raise ConfigError(
                    f"resume: the checkpoint lacks {name}, it is of another model; use the one it came from"
                )
            if tuple(shapes[key]) != tuple(target.shape):
                saved, here = list(shapes[key]), list(target.shape)
                raise ConfigError(f"resume: {name} is {saved} in the checkpoint, {here} here")
        generators = {key: value for key, value in self._generators().items() if key in shapes}
        return {**targets, **generators}

    @torch.no_grad()
    def state_was_loaded(self, loaded: Mapping[str, Tensor]) -> None:
        """Take over the tensors of `state_to_load` after they were filled."""
        self.optimizer.state_was_loaded(loaded)
        if (state := loaded.get(f"rng.cpu.{self.rank}")) is not None:
            torch.set_rng_state(state)
        if (state := loaded.get(f"rng.cuda.{self.rank}")) is not None:
            torch.cuda.set_rng_state(state)
        self._copy_masters()

    def _generators(self) -> dict[str, Tensor]:
        states = {f"rng.cpu.{self.rank}": torch.get_rng_state()}
        if self.model.lm_head.weight.is_cuda:
            states[f"rng.cuda.{self.rank}"] = torch.cuda.get_rng_state()
        return states

    def _update_rms(self) -> dict[str, Tensor]:
        """Root mean square of the updates by algorithm; filler has none and is not counted."""
        algorithms = sorted({group["algorithm"] for group in self.optimizer.param_groups if group["active"]})
        sums = torch.zeros(2, len(algorithms), dtype=torch.float64, device=self.model.lm_head.weight.device)
        for group in self.optimizer.param_groups:
            if group["active"] and group.get("square") is not None:
                column, holders = sums[:, algorithms.index(group["algorithm"])], group.get("holders", 1)
                column[0] += group["square"] / holders
                column[1] += sum(view.piece.numel for view in group["views"]) / holders
        squares, counts = self._sum_over_ranks(sums)
        return {
            f"update_rms_{algorithm}": (square / count.clamp(min=1)).sqrt()
            for algorithm, square, count in zip(algorithms, squares, counts, strict=True)
        }

    def _fp4_metrics(self) -> dict[str, Tensor]:
        """What rounding does to the experts' masters of all ranks."""
        sums = torch.zeros(9, dtype=torch.float64, device=self.model.lm_head.weight.device)
        for group in self.optimizer.param_groups:
            experts = [view.of(group["params"]) for view in group["views"] if is_expert(view.piece.name)]
            for chunk in same_shape_chunks(experts, FP4_CHUNK):
                stack = torch.stack([experts[i] for i in chunk])
                sums += fp4_statistics(stack) / group.get("holders", 1)
        return fp4_metrics(self._sum_over_ranks(sums))

    def _collect(self) -> None:  # noqa: B027
        """Bring the step's gradients to the ranks that update with them; one rank has them."""

    @abstractmethod
    def _clip(self) -> dict[str, Tensor]:
        """Clip the accumulated gradients; norm of every set."""

    @abstractmethod
    def _update(self) -> None:
        """One optimizer step from the clipped gradients, into the model's weights too."""

    @abstractmethod
    def _forget_gradients(self) -> None:
        """Before the next step's first micro-batch."""

    @abstractmethod
    def _copy_masters(self) -> None:
        """Into the weights that the model computes with."""

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return x


class TorchEngine(Engine):
    """Trains `model` in `compute_dtype`; weights that are computed in a narrower dtype get an fp32 master.
    So do experts that compute in fp32 but, at times, with FP4 values (`fp4_experts`).

    The gradient of such a weight is added to its master's in fp32 as soon as backward has made it, and freed.
    """

    def __init__(
        self,
        model: ForCausalLM,
        config: OptimConfig,
        compute_dtype: torch.dtype,
        compiled: bool = False,
        fp4_experts: bool = False,
    ):
        self.masters = dict(model.named_parameters())
        narrow = compute_dtype != torch.float32
        self.narrow = {  # weights that have a master of their own
            name: parameter
            for name, parameter in self.masters.items()
            if (narrow and not stays_fp32(name)) or (fp4_experts and is_expert(name))
        }
        self.masters |= {name: nn.Parameter(p.detach().clone()) for name, p in self.narrow.items()}
        for name, parameter in self.narrow.items():
            parameter.register_post_accumulate_grad_hook(self._accumulate_into(self.masters[name]))
        self.model = model.cast(compute_dtype)
        self.clip_norm = config.clip_norm
        self.optimizer = HybridOptimizer(build_groups(self.masters.items(), model.config, config))
        if compiled:
            compile_layers(self.model, whole=self.model.lm_head.weight.is_cuda)
        self.activate(("model",))

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def _clip(self) -> dict[str, Tensor]:
        return clip_grad_norm_per_set(self.optimizer.param_groups, self.clip_norm)

    def _update(self) -> None:
        self.optimizer.step()
        self._copy_masters()

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _copy_masters(self) -> None:
        for name, parameter in self.narrow.items():
            master = self.masters[name]
            four = self.precision.fp4_experts and is_expert(name)
            parameter.copy_(fp4_values(master, parameter.dtype) if four else master)

    @staticmethod
    def _accumulate_into(master: nn.Parameter) -> Any:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is None:  # a compiled region says so of weights that took no part
                return
            master.grad = accumulated(master.grad, grad)
            parameter.grad = None

        return hook
