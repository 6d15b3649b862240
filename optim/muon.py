"""Muon and AdamW on whole matrices: two pure steps, one torch optimizer over both, and clipping by set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from optim.newton_schulz import newton_schulz
from optim.partition import View, matrices_of, whole_views

# Kinds of moments by algorithm; `step` counts a parameter's updates.
MOMENTS = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq", "step")}
ALL_MOMENTS = ("momentum", "exp_avg", "exp_avg_sq", "step")


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
    measure: bool = False,
) -> Tensor | None:
    """One Muon step, in place on weights and momenta, all lists of single matrices [n, m] (views are fine).

    M <- momentum M + G;  O = NewtonSchulz(momentum M + G) sqrt(max(n, m)) update_rms;
    W <- W (1 - lr weight_decay) - lr O. A full-rank O has the root mean square `update_rms`.
    Source: DeepSeek-V4 report, "Muon optimizer".

    dtype           of the Newton-Schulz products; default: the momenta's
    chunk_elements  equal shapes are orthogonalised together, at most so many numbers at once (but always
                    one matrix); default: what fits a CPU's cache, or what fills a GPU
    measure         return the sum of squares of O's numbers, a 0-d fp32 tensor
    """
    if not weights:
        return None
    if chunk_elements is None:
        chunk_elements = 2**19 if weights[0].device.type == "cpu" else 2**26
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    squares = []
    for chunk in same_shape_chunks(weights, chunk_elements):
        nesterov = torch.stack([momenta[i] for i in chunk]).mul_(momentum)  # [k, n, m]
        nesterov += torch.stack([grads[i] for i in chunk])
        update = newton_schulz(nesterov, dtype)  # [k, n, m]
        scale = update_rms * math.sqrt(max(update.shape[-2:]))
        torch._foreach_add_([weights[i] for i in chunk], update.unbind(), alpha=-lr * scale)
        if measure:
            squares.append((torch.linalg.vector_norm(update, dtype=torch.float32) * scale).square())
    return torch.stack(squares).sum() if measure else None


def same_shape_chunks(matrices: list[Tensor], elements: int) -> Iterator[list[int]]:
    """Indices of matrices of one shape, together of at most so many elements, or of one matrix."""
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
    measure: bool = False,
) -> Tensor | None:
    """One AdamW step, in place on weights and moments, as torch.optim.AdamW; `step` counts from 1.

    `measure`: return the sum of squares of the updates at learning rate 1, a 0-d fp32 tensor.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(weights, exp_avgs, denominators, -lr / (1 - beta1**step))
    if not measure:
        return None
    updates = torch._foreach_norm(torch._foreach_div(exp_avgs, denominators))
    return (torch.stack(updates) / (1 - beta1**step)).square().sum()


class HybridOptimizer(torch.optim.Optimizer):
    """Muon and AdamW over the groups of `optim.groups.build_groups`.

    Moments are fp32 whatever the parameter's dtype: `momentum` for Muon; `exp_avg`, `exp_avg_sq` and `step`
    for AdamW. An inactive group is left alone, but its moments exist, zero at first: checkpoints are the same
    whatever rested when. Left alone, too, is a parameter without a gradient: None says
    that it took no part in this step, and since Newton-Schulz ignores size, old momentum would move it at
    full speed.
    A group's params are whole parameters or, under ZeRO, one flat partition of them; its `views` tell where
    each piece lies. With `measure` set, `step` leaves in every active group `square`, the sum of squares of
    its updates at learning rate 1.
    The class is not named after Muon because DeepSpeed takes that word in a name for its own optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        groups = list(groups)
        for group in groups:
            if "views" not in group:
                group["views"] = whole_views(group)
        super().__init__(groups, defaults={})
        self.measure = False

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
            else:
                for parameter in group["params"]:
                    for kind in MOMENTS[group["algorithm"]]:
                        self.moment(parameter, kind)
        return loss

    def _muon_group(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        params = group["params"]
        every_grad = [None if p.grad is None else p.grad.contiguous() for p in params]
        every_momentum = [p if p.grad is None else self.moment(p, "momentum") for p in params]
        for matrices in matrices_of(group["views"]):
            if every_grad[matrices.param] is not None:
                weights += matrices.of(params)
                grads += matrices.of(every_grad)  # type: ignore[arg-type]
                momenta += matrices.of(every_momentum)
        group["square"] = muon_step(
            weights,
            grads,
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            update_rms=group["update_rms"],
            dtype=_products_dtype(group["newton_schulz_dtype"], params[0].device),
            measure=self.measure,
        )

    def _adamw_group(self, group: dict[str, Any]) -> None:
        by_step: dict[int, list[Tensor]] = defaultdict(list)  # equal step counts share one call
        for parameter in group["params"]:
            if parameter.grad is not None:
                count = self.moment(parameter, "step").add_(1)
                by_step[int(count)].append(parameter)
        group["square"] = None
        for step, parameters in by_step.items():
            square = adamw_step(
                parameters,
                [p.grad.float() for p in parameters if p.grad is not None],
                [self.moment(p, "exp_avg") for p in parameters],
                [self.moment(p, "exp_avg_sq") for p in parameters],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                measure=self.measure,
            )
            if square is not None:
                group["square"] = square if group["square"] is None else group["square"] + square

    def moment(self, parameter: Tensor, kind: str) -> Tensor:
        """The moment of a parameter, fp32 and of its shape; `step` is a number on the CPU. Zero if new."""
        state = self.state[parameter]
        if kind not in state:
            shape, device = (torch.Size(), "cpu") if kind == "step" else (parameter.shape, parameter.device)
            state[kind] = torch.zeros(shape, dtype=torch.float32, device=device)
        return state[kind]

    def named_state(self, share: bool = False) -> dict[str, Tensor]:
        """Weights and moments by `<kind>.<key of the piece>`; all but the AdamW steps share memory.

        `share`: of pieces that several ranks hold (`holders` of a group, of which this is `holder`), only
        those whose turn is this rank's, so that each is there once over all ranks.
        """
        named: dict[str, Tensor] = {}
        for view, kind, tensor in self._named_tensors(share):
            named[f"{kind}.{view.piece.key}"] = tensor
        return named

    def state_to_load(self, shapes: Iterable[str]) -> dict[str, Tensor]:
        """The tensors that a saved `named_state` is to be read into; `shapes` has its keys.

        Moments that were saved are made, all others dropped: only a set that rests, or a state of weights
        alone, may lack them. Raises ConfigError when they are another algorithm's or incomplete.
        """
        kept = set(shapes)
        self.state.clear()
        trained = any(key.startswith(ALL_MOMENTS) for key in kept)
        for group in self.param_groups:
            wanted = MOMENTS[group["algorithm"]]
            for view in group["views"]:
                key = view.piece.key
                found = tuple(kind for kind in ALL_MOMENTS if f"{kind}.{key}" in kept)
                if set(found) - set(wanted):
                    raise ConfigError(
                        f"resume: {key} was trained by another algorithm; use that run's optim.name"
                    )
                if found != wanted and (found or (trained and group["active"])):
                    raise ConfigError(f"resume: the checkpoint lacks the moments of {key}; use another one")
                for kind in found:
                    self.moment(group["params"][view.param], kind)
        return self.named_state()

    def state_was_loaded(self, loaded: Mapping[str, Tensor]) -> None:
        """Take over what does not share memory: the AdamW steps."""
        for group in self.param_groups:
            for view in group["views"]:
                if (step := loaded.get(f"step.{view.piece.key}")) is not None:
                    self.state[group["params"][view.param]]["step"] = step.clone()

    def _named_tensors(self, share: bool) -> Iterator[tuple[View, str, Tensor]]:
        for group in self.param_groups:
            params = [parameter.detach() for parameter in group["params"]]
            holder, holders = (group.get("holder", 0), group.get("holders", 1)) if share else (0, 1)
            for view in group["views"][holder::holders]:
                yield view, "weight", view.of(params)
                for kind, tensor in self.state.get(group["params"][view.param], {}).items():
                    yield view, kind, tensor.clone() if kind == "step" else view.of([tensor] * len(params))


def _products_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@torch.no_grad()
def clip_grad_norm_per_set(
    groups: Iterable[dict[str, Any]],
    max_norm: float,
    grads: Iterable[Sequence[Tensor]] | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Scale the gradients of each active set to a joint norm of at most `max_norm`, in place.

    Returns set -> norm before clipping, a 0-d fp32 tensor on the gradients' device, without waiting for it.
    A NaN or Inf anywhere in a set makes its norm NaN or Inf: test it before the step, which would spread it.
    Sets stay apart so that the indexer's loss cannot weaken the model's step. Inactive sets are left out.
    A group's `holders` (1 by default) is the number of ranks that hold the same part of it.

    grads           of every group, where they are not its parameters' `.grad`
    sum_over_ranks  adds a 1-D tensor up over the ranks that share the gradients out
    """
    groups = list(groups)
    if grads is None:
        grads = [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
    by_set: dict[str, list[Tensor]] = {}
    squares_of: dict[str, list[Tensor]] = {}
    for group, own in zip(groups, grads, strict=True):
        if group["active"]:
            by_set.setdefault(group["set"], []).extend(own)
            shares = squares_of.setdefault(group["set"], [])
            shares += [_sum_of_squares(own) / group.get("holders", 1)] if own else []
    squares = torch.stack(
        [sum(shares, torch.zeros((), dtype=torch.float64)) for shares in squares_of.values()]
    )
    norms = sum_over_ranks(squares).sqrt().float()
    for own, norm in zip(by_set.values(), norms, strict=True):
        if max_norm < math.inf and own:
            torch._foreach_mul_(own, max_norm / norm.clamp_min(max_norm))
    return dict(zip(by_set, norms, strict=True))


def _sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)).double().square().sum()
