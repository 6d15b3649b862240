"""Muon and AdamW on whole matrices: two pure steps, one torch optimizer over both, and clipping by set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from optim.newton_schulz import newton_schulz


def split_blocks(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Views of `tensor` [..., sum(rows), m] as its single matrices [rows_i, m], block after block."""
    parts = tensor.split(list(rows), dim=-2)
    return [matrix for part in parts for matrix in part.view(-1, *part.shape[-2:]).unbind()]


def muon_step(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    update_rms: float,
    dtype: torch.dtype | None = None,
    chunk_elements: int | None = None,
) -> None:
    """One Muon step, in place on weights and momenta, all lists of single matrices [n, m] (views are fine).

    M <- momentum M + G;  O = NewtonSchulz(momentum M + G) sqrt(max(n, m)) update_rms;
    W <- W (1 - lr weight_decay) - lr O. A full-rank O has the root mean square `update_rms`.
    Source: DeepSeek-V4 report, "Muon optimizer".

    dtype           of the Newton-Schulz products; default: the momenta's
    chunk_elements  equal shapes are orthogonalised together, at most so many numbers at once (but always
                    one matrix); default: what fits a CPU's cache, or what fills a GPU
    """
    if not weights:
        return
    if chunk_elements is None:
        chunk_elements = 2**19 if weights[0].device.type == "cpu" else 2**26
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    for chunk in _same_shape_chunks(weights, chunk_elements):
        nesterov = torch.stack([momenta[i] for i in chunk]).mul_(momentum)  # [k, n, m]
        nesterov += torch.stack([grads[i] for i in chunk])
        update = newton_schulz(nesterov, dtype)  # [k, n, m]
        scale = -lr * update_rms * math.sqrt(max(update.shape[-2:]))
        torch._foreach_add_([weights[i] for i in chunk], update.unbind(), alpha=scale)


def _same_shape_chunks(matrices: list[Tensor], elements: int) -> Iterator[list[int]]:
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    for shape, indices in by_shape.items():
        length = max(1, elements // max(1, shape.numel()))
        for start in range(0, len(indices), length):
            yield indices[start : start + length]


def adamw_step(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step, in place on weights and moments, as torch.optim.AdamW; `step` counts from 1."""
    beta1, beta2 = betas
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(weights, exp_avgs, denominators, -lr / (1 - beta1**step))


class HybridOptimizer(torch.optim.Optimizer):
    """Muon and AdamW over the groups of `optim.groups.build_groups`.

    Moments are fp32 whatever the parameter's dtype: `momentum` for Muon; `exp_avg`, `exp_avg_sq` and `step`
    for AdamW. An inactive group is left alone altogether. So is a parameter without a gradient: None says
    that it took no part in this step, and since Newton-Schulz ignores size, old momentum would move it at
    full speed.
    The class is not named after Muon because DeepSpeed takes that word in a name for its own optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every active group from `.grad`, which stays as it is; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["active"] and group["algorithm"] == "muon":
                self._muon_group(group)
            elif group["active"]:
                self._adamw_group(group)
        return loss

    def _muon_group(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        for parameter, rows in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is not None:
                weights += split_blocks(parameter, rows)
                grads += split_blocks(parameter.grad.contiguous(), rows)
                momenta += split_blocks(self._moment(parameter, "momentum"), rows)
        muon_step(
            weights,
            grads,
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            update_rms=group["update_rms"],
            dtype=_products_dtype(group["newton_schulz_dtype"], group["params"][0].device),
        )

    def _adamw_group(self, group: dict[str, Any]) -> None:
        by_step: dict[int, list[Tensor]] = defaultdict(list)  # equal step counts share one call
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
                by_step[int(state["step"])].append(parameter)
        for step, parameters in by_step.items():
            adamw_step(
                parameters,
                [p.grad.float() for p in parameters if p.grad is not None],
                [self._moment(p, "exp_avg") for p in parameters],
                [self._moment(p, "exp_avg_sq") for p in parameters],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def _moment(self, parameter: Tensor, key: str) -> Tensor:
        state = self.state[parameter]
        if key not in state:
            state[key] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return state[key]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and group settings; ConfigError when the names differ from this optimizer's.

        torch casts moments to the dtype of the parameter; here they stay fp32.
        """
        ours = [group["names"] for group in self.param_groups]
        if ours != [group.get("names") for group in state_dict["param_groups"]]:
            raise ConfigError("the optimizer state is of another model; load it into the one it came from")
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, torch.float32, copy=True)


def _products_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@torch.no_grad()
def clip_grad_norm_per_set(groups: Iterable[dict[str, Any]], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each active set to a joint norm of at most `max_norm`, in place.

    Returns set -> norm before clipping, a 0-d fp32 tensor on the gradients' device, without waiting for it.
    A NaN or Inf anywhere in a set makes its norm NaN or Inf: test it before the step, which would spread it.
    Sets stay apart so that the indexer's loss cannot weaken the model's step. Inactive sets are left out.
    """
    by_set: dict[str, list[Tensor]] = {}
    for group in groups:
        if group["active"]:
            grads = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            by_set.setdefault(group["set"], []).extend(grads)
    return {name: _clip(grads, max_norm) for name, grads in by_set.items()}


def _clip(grads: list[Tensor], max_norm: float) -> Tensor:
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm < math.inf:
        torch._foreach_mul_(grads, max_norm / total.clamp_min(max_norm))
    return total
