"""Hyper-parameters of the optimizer and of its schedule; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from configs.errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings, DeepSeek-V4-Flash's by default (arXiv 2606.19348).

    name                 "muon" (matrices by Muon, the rest by AdamW) or "adamw" (everything by AdamW)
    lr                   peak learning rate, the same for both algorithms
    final_lr_ratio       learning rate of the last step as a part of `lr`
    warmup_steps         steps of linear warm-up; 0 starts at the peak
    decay_fraction       the last part of the run, in which the learning rate falls as a cosine
    weight_decay         decoupled, times the learning rate
    momentum             of Muon, Nesterov style
    betas, eps           of AdamW
    clip_norm            largest gradient norm of a set (model, indexer); inf never clips
    update_rms           root mean square of one Muon update at learning rate 1
    indexer_lr           peak learning rate of the lightning indexer; null: `lr`
    newton_schulz_dtype  "float32", "bfloat16", or "auto": bfloat16 on GPUs and float32 on CPUs

    Raises ConfigError, naming `optim.KEY`, when a value is out of range.
    """

    name: str = "muon"
    lr: float = 2.7e-4
    final_lr_ratio: float = 0.1
    warmup_steps: int = 2000
    decay_fraction: float = 0.1
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-20
    clip_norm: float = 1.0
    update_rms: float = 0.18
    indexer_lr: float | None = None
    newton_schulz_dtype: str = "auto"

    def __post_init__(self) -> None:
        self._one_of("name", ("muon", "adamw"))
        self._one_of("newton_schulz_dtype", ("auto", "float32", "bfloat16"))
        for key in ("lr", "eps", "update_rms"):
            self._check(key, 0 < getattr(self, key) < math.inf, "a number above 0")
        self._check("clip_norm", self.clip_norm > 0, "above 0 (inf never clips)")
        if self.indexer_lr is not None:
            self._check("indexer_lr", 0 < self.indexer_lr < math.inf, "above 0, or null for optim.lr")
        for key in ("final_lr_ratio", "decay_fraction"):
            self._check(key, 0 <= getattr(self, key) <= 1, "between 0 and 1")
        self._check("warmup_steps", self.warmup_steps >= 0, "0 or more")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._check("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        two_betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", two_betas, "two numbers, each at least 0 and below 1")

    def _one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        self._check(key, getattr(self, key) in allowed, "one of " + ", ".join(allowed))

    def _check(self, key: str, good: bool, rule: str) -> None:
        if not good:
            raise ConfigError(f"optim.{key} is {getattr(self, key)!r}; it must be {rule}")
