"""The sections of a run's configuration, each checked by itself; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.errors import ConfigError
from model.precision import Precision

AttentionMode = Literal["sparse", "dense", "warmup"]


def require(good: bool, key: str, value: object, rule: str) -> None:
    """Raise ConfigError, naming the key, unless it is `good`."""
    if not good:
        raise ConfigError(f"{key} is {value!r}; it must be {rule}")


@dataclass(frozen=True)
class TrainConfig:
    """How long, on what batches and with which losses to train; lengths are in steps or tokens.

    steps                  optimizer steps of the run
    batch_tokens           tokens of one optimizer step, over all ranks and micro-batches
    seq_len                tokens of one sequence
    micro_batch            sequences of one forward pass on one rank
    attention_mode         "sparse" (the indexer selects), "dense" (every visible compressed entry), "warmup"
                           (as dense, and nothing but the indexer is trained)
    indexer_loss_weight    of the indexer's divergence from attention, in nats per query; 0: it is not trained
    mtp_loss_weight        of multi-token prediction, until the learning rate starts to decay
    mtp_decay_loss_weight  the same from there on
    bias_update_rate       step of the routers' load-balancing bias
    log_every, eval_every, save_every   in steps
    keep_last              newest checkpoints that are kept
    keep_every             checkpoints of steps that are multiples of it are kept, too; 0: none
    stop_seconds           from SIGTERM or SIGUSR1 to the end of the run, with a checkpoint or without
    checksum_every         steps after which ranks compare what they must hold alike; 0: never
    async_save             write checkpoints beside the training, which goes on after a copy in host memory
    eval_tokens            validation tokens of one evaluation
    needle                 retrieval probes of one evaluation, each a sequence a depth and a control; 0: none
    compile                torch.compile whole layers, or what ranks do not share of them: the streams' mixing
    recompute              what backward computes again instead of keeping it: "none", "selective" (all but
                           outputs of large products), "full" (whole layers: only their inputs are kept)
    sample_tokens          tokens generated from sample_prompt at the end of the run; 0: none
    device                 "auto" (CUDA where there is one), "cpu" or "cuda"

    Raises ConfigError, naming `train.KEY`, when a value is out of range.
    """

    steps: int
    batch_tokens: int
    seq_len: int
    micro_batch: int
    seed: int = 0
    attention_mode: str = "sparse"
    indexer_loss_weight: float = 1.0
    mtp_loss_weight: float = 0.3
    mtp_decay_loss_weight: float = 0.1
    bias_update_rate: float = 0.001
    log_every: int = 10
    eval_every: int = 100
    eval_tokens: int = 65536
    needle: int = 0
    save_every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    stop_seconds: int = 25
    checksum_every: int = 0
    async_save: bool = True
    compile: bool = False
    recompute: str = "none"
    sample_tokens: int = 64
    sample_prompt: str = "import "
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "batch_tokens",
            "micro_batch",
            "log_every",
            "eval_every",
            "save_every",
            "keep_last",
            "stop_seconds",
        ):
            self._check(key, getattr(self, key) >= 1, "1 or more")
        self._check("seq_len", self.seq_len >= 2, "2 or more")
        self._check("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        for key in ("sample_tokens", "keep_every", "needle", "checksum_every"):
            self._check(key, getattr(self, key) >= 0, "0 or more")
        for key in ("indexer_loss_weight", "mtp_loss_weight", "mtp_decay_loss_weight", "bias_update_rate"):
            self._check(key, 0 <= getattr(self, key) < math.inf, "a finite number, 0 or more")
        modes = self.attention_mode in ("sparse", "dense", "warmup")
        self._check("attention_mode", modes, "sparse, dense or warmup")
        recompute = self.recompute in ("none", "selective", "full")
        self._check("recompute", recompute, "none, selective or full")
        self._check("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        forward_tokens = self.seq_len * self.micro_batch
        rule = f"a multiple of train.seq_len · train.micro_batch = {forward_tokens}"
        self._check("batch_tokens", self.batch_tokens % forward_tokens == 0, rule)
        self._check(
            "eval_tokens", self.eval_tokens >= self.seq_len, f"train.seq_len = {self.seq_len} or more"
        )

    def _check(self, key: str, good: bool, rule: str) -> None:
        require(good, f"train.{key}", getattr(self, key), rule)


@dataclass(frozen=True)
class PrecisionConfig:
    """What the matrix products are computed in; master weights and optimizer states stay float32.

    compute_dtype   "float32" or "bfloat16": of all that is not named below
    fp8, fp4_experts, fp4_indexer, fp8_kv   see `model.precision.Precision`
    qat_start       the step, counted from 0, from which the last three are in effect

    Raises ConfigError, naming `precision.KEY`, when a value is out of range.
    """

    name: str
    compute_dtype: str
    fp8: bool = False
    fp4_experts: bool = False
    fp4_indexer: bool = False
    fp8_kv: bool = False
    qat_start: int = 0

    def __post_init__(self) -> None:
        allowed = self.compute_dtype in ("float32", "bfloat16")
        require(allowed, "precision.compute_dtype", self.compute_dtype, "float32 or bfloat16")
        require(self.qat_start >= 0, "precision.qat_start", self.qat_start, "0 or more")

    def at(self, step: int) -> Precision:
        """What is rounded in this step."""
        if step < self.qat_start:
            return Precision(self.fp8)
        return Precision(self.fp8, self.fp4_experts, self.fp4_indexer, self.fp8_kv)


# What the engine of one process can do, and how YAML writes it.
ALONE = {
    "zero_stage": (None, "null"),
    "ep": (1, "1"),
    "cp": (1, "1"),
    "zero_ranks": (None, "null"),
    "shard_dense": (False, "false"),
}


@dataclass(frozen=True)
class ParallelConfig:
    """Who holds what when several processes train.

    engine            "deepspeed" (ZeRO over all ranks) or "torch" (one process, nothing partitioned)
    zero_stage        1 (gradients of all parameters on every rank, reduced once a step), 2 (a rank's own part
                      only, reduced every micro-batch); None: 1 for one rank, else 2
    ep                ranks that share the routed experts out; tokens travel to them
    cp                ranks that share every sequence out
    zero_ranks        ranks that share the masters and moments of everything else out; groups of so many
                      repeat each other's updates. None: as many as leave less than 5 % of filler
    shard_dense       keep the layers' dense weights sharded, too, and gather them before each use; layers
                      are then computed again in backward as with train.recompute=full
    expert_gradients  what experts' gradients travel in: "float32", or "bfloat16", rounded stochastically
    timeout_seconds   after so long without progress the job ends and names the rank that hangs

    Raises ConfigError, naming `parallel.KEY`, when a value is out of range.
    """

    engine: str = "deepspeed"
    zero_stage: int | None = None
    ep: int = 1
    cp: int = 1
    zero_ranks: int | None = None
    shard_dense: bool = False
    expert_gradients: str = "float32"
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        engines = self.engine in ("deepspeed", "torch")
        self._check("engine", engines, "deepspeed or torch")
        self._check("zero_stage", self.zero_stage in (None, 1, 2), "1, 2 or null")
        for key in ("ep", "cp", "timeout_seconds"):
            self._check(key, getattr(self, key) >= 1, "1 or more")
        self._check("zero_ranks", self.zero_ranks is None or self.zero_ranks >= 1, "1 or more, or null")
        dtypes = self.expert_gradients in ("float32", "bfloat16")
        self._check("expert_gradients", dtypes, "float32 or bfloat16")
        for key, (alone, word) in ALONE.items() if self.engine == "torch" else ():
            self._check(key, getattr(self, key) == alone, f"{word} with parallel.engine=torch")

    def _check(self, key: str, good: bool, rule: str) -> None:
        require(good, f"parallel.{key}", getattr(self, key), rule)


@dataclass(frozen=True)
class RunDirConfig:
    """Where a run writes: the folder `dir`/`name`; without a name, the trainer makes one from the time."""

    dir: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir", self.dir, "a folder")
        plain = self.name is None or (self.name not in ("", ".", "..") and Path(self.name).name == self.name)
        require(plain, "run.name", self.name, "one folder name; run.dir takes the folders above it")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides the run's own files.

    backend    "none", "wandb" or "tensorboard"
    project, entity, name, group, tags   W&B's names of the run; without `name` it is that of the run's folder
    mode       W&B: "online", "offline" (into the run's folder), or "auto": online where an API key is found
    artifacts  W&B: send the exported model, too

    Raises ConfigError, naming `tracking.KEY`, when a value is out of range.
    """

    backend: str = "none"
    project: str = "fourfold"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"
    artifacts: bool = False

    def __post_init__(self) -> None:
        backends = self.backend in ("none", "wandb", "tensorboard")
        require(backends, "tracking.backend", self.backend, "none, wandb or tensorboard")
        modes = self.mode in ("auto", "online", "offline")
        require(modes, "tracking.mode", self.mode, "auto, online or offline")
        require(bool(self.project), "tracking.project", self.project, "the name of a W&B project")
        possible = not self.artifacts or self.backend == "wandb"
        require(possible, "tracking.artifacts", self.artifacts, "false, unless tracking=wandb")
