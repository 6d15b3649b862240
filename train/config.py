"""The whole configuration of a run, and the checks that need more than one part of it; no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from configs.errors import ConfigError
from data.config import DataConfig
from model.config import ModelConfig
from model.precision import NAMED, Precision
from optim.config import OptimConfig
from optim.schedule import decay_start
from train.phases import Phase, PhaseConfig, Timeline
from train.spikes import SpikesConfig

AttentionMode = Literal["sparse", "dense", "warmup"]
SHORTEST_WITH_NEEDLE = 32  # tokens: half of them text
DEEPSEEK_V4_IDS = 129_280  # of the released tokenizer, added tokens included


def _require(good: bool, key: str, value: object, rule: str) -> None:
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
    compile                torch.compile the hyper-connections
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
        _require(good, f"train.{key}", getattr(self, key), rule)


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
        _require(allowed, "precision.compute_dtype", self.compute_dtype, "float32 or bfloat16")
        _require(self.qat_start >= 0, "precision.qat_start", self.qat_start, "0 or more")

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
        _require(good, f"parallel.{key}", getattr(self, key), rule)


@dataclass(frozen=True)
class RunDirConfig:
    """Where a run writes: the folder `dir`/`name`; without a name, the trainer makes one from the time."""

    dir: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.dir), "run.dir", self.dir, "a folder")
        plain = self.name is None or (self.name not in ("", ".", "..") and Path(self.name).name == self.name)
        _require(plain, "run.name", self.name, "one folder name; run.dir takes the folders above it")


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
        _require(backends, "tracking.backend", self.backend, "none, wandb or tensorboard")
        modes = self.mode in ("auto", "online", "offline")
        _require(modes, "tracking.mode", self.mode, "auto, online or offline")
        _require(bool(self.project), "tracking.project", self.project, "the name of a W&B project")
        possible = not self.artifacts or self.backend == "wandb"
        _require(possible, "tracking.artifacts", self.artifacts, "false, unless tracking=wandb")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; `configs.compose.compose` is what makes one.

    resume   "auto" (the newest checkpoint of this run, if there is one), a checkpoint folder, or None
    phases   by name, in order: parts of the run with their own lengths, batches and mixture; none: one phase

    Raises ConfigError when parts contradict each other: every such line names the key to change.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    precision: PrecisionConfig
    train: TrainConfig
    run: RunDirConfig
    resume: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)

    def __post_init__(self) -> None:
        self.data.chosen()
        for phase in self.timeline:
            self._check_lengths(phase)
            self._check_weights(phase)
            self._check_whole(phase)
        self._check_vocabulary()
        self._check_rotation()
        self._check_indexer()
        decay_start(self.train.steps, self.optim)  # raises when warm-up and decay do not fit into the run
        if self.resume not in (None, "auto"):
            exists = Path(str(self.resume)).is_dir()
            _require(exists, "resume", self.resume, "auto, null, or the folder of a checkpoint that exists")

    @property
    def attention_mode(self) -> AttentionMode:
        return cast(AttentionMode, self.train.attention_mode)  # checked by TrainConfig

    @property
    def trained_sets(self) -> tuple[str, ...]:
        """The sets of parameters (`optim.groups`) that a step updates; the indexer's where it has a loss."""
        if self.attention_mode == "warmup":
            return ("indexer",)
        has_one = "compressed_sparse_attention" in self.model.layer_types
        return ("model", "indexer") if has_one and self.train.indexer_loss_weight else ("model",)

    @property
    def indexer_loss(self) -> bool:
        """Whether the indexer's loss is computed."""
        return "indexer" in self.trained_sets

    @property
    def recompute(self) -> str:
        """`train.recompute`, but where dense weights are sharded backward keeps no gathered layer."""
        return "full" if self.parallel.shard_dense else self.train.recompute

    def zero_stage(self, world: int) -> int:
        """The ZeRO stage for so many ranks."""
        return self.parallel.zero_stage or (1 if world == 1 else 2)

    def check_ranks(self, world: int) -> None:
        """Raise ConfigError when so many ranks cannot run this, naming the key to change; no torch."""
        parallel, experts = self.parallel, self.model.n_routed_experts
        if parallel.engine == "torch" and world > 1:
            raise ConfigError(
                "parallel.engine is torch, which is for one process; use parallel=zero under torchrun"
            )
        for key in ("ep", "cp", "zero_ranks"):
            size = getattr(parallel, key) or 1
            rule = f"a divisor of the number of ranks, {world}"
            _require(world % size == 0, f"parallel.{key}", size, rule)
        rule = f"a divisor of model.n_routed_experts = {experts}"
        _require(experts % parallel.ep == 0, "parallel.ep", parallel.ep, rule)
        sharers = world // parallel.cp
        sequences = min(phase.sequences(phase.first) for phase in self.timeline)
        if sharers > sequences:
            raise ConfigError(
                f"train.batch_tokens: a step has {sequences} sequences, fewer than the {sharers} ranks that"
                f" take some; use {sharers * self.train.seq_len} or more, or raise parallel.cp"
            )

    @cached_property
    def timeline(self) -> Timeline:
        """The phases of the run; one without a name where none are configured."""
        train = self.train
        return Timeline(
            self.phases,
            steps=train.steps,
            seq_len=train.seq_len,
            batch_tokens=train.batch_tokens,
            micro_batch=train.micro_batch,
        )

    def during(self, phase: Phase) -> RunConfig:
        """This configuration with a phase's values in their places."""
        own = {key: getattr(phase, key) for key in ("seq_len", "batch_tokens", "micro_batch")}
        changes = dict(phase.changes)
        optim = {"lr": changes.pop("lr")} if "lr" in changes else {}
        precision = asdict(NAMED[changes.pop("precision")]) if "precision" in changes else {}
        return replace(
            self,
            train=replace(self.train, **own, **changes),
            optim=replace(self.optim, **optim),
            precision=replace(self.precision, **precision),
            phases={},
        )

    def at(self, step: int) -> RunConfig:
        """This configuration with the values of the step's phase."""
        return self.during(self.timeline.at(step))

    def last_switch(self, step: int) -> int:
        """The last step, from `step` back, before which phase or precision were others; 0 without any."""
        entered = self.precision.qat_start
        return max(self.timeline.at(step).first, entered if entered <= step else 0)

    @cached_property
    def fp4_experts(self) -> bool:
        """Whether experts compute in FP4 in some phase."""
        return any(self.during(phase).precision.fp4_experts for phase in self.timeline)

    def _check_weights(self, phase: Phase) -> None:
        if unknown := set(phase.weights) - set(self.data.chosen() if phase.weights else ()):
            names = ", ".join(self.data.chosen())
            raise ConfigError(
                f"phases.{phase.name}.weights: there is no source {min(unknown)!r}; there are {names}"
            )

    def _check_lengths(self, phase: Phase) -> None:
        """Positions, compression windows and prediction depth must fit into a sequence."""
        seq_len, model = phase.seq_len, self.model
        key = f"phases.{phase.name}.seq_len" if phase.name else "train.seq_len"
        limit = model.max_position_embeddings
        rule = f"at most model.max_position_embeddings = {limit}"
        _require(seq_len <= limit, key, seq_len, rule)
        for kind in sorted(set(model.layer_types) & set(model.compress_rates)):
            rate = model.compress_rates[kind]
            rule = f"at least model.compress_rates.{kind} = {rate}, or these layers never compress anything"
            _require(seq_len >= rate, key, seq_len, rule)
        hides = not self.train.needle or seq_len >= SHORTEST_WITH_NEEDLE
        _require(hides, key, seq_len, f"{SHORTEST_WITH_NEEDLE} or more, or train.needle 0")
        self._check_parts(seq_len, key)
        depth = model.num_nextn_predict_layers
        rule = f"less than {key} - 1 = {seq_len - 1}"
        _require(depth < seq_len - 1, "model.num_nextn_predict_layers", depth, rule)

    def _check_parts(self, seq_len: int, key: str) -> None:
        """A rank's part of a sequence reaches back into the part before it, not further."""
        parts, model = self.parallel.cp, self.model
        if parts == 1:
            return
        rule = f"a multiple of parallel.cp = {parts}"
        _require(seq_len % parts == 0, key, seq_len, rule)
        reach = {"model.sliding_window": model.sliding_window}
        for kind, times in (("heavily_compressed_attention", 1), ("compressed_sparse_attention", 2)):
            if kind in model.layer_types:
                name = f"model.compress_rates.{kind}"
                reach[f"{times} · {name}" if times > 1 else name] = times * model.compress_rates[kind]
        name, least = max(reach.items(), key=lambda item: item[1])
        rule = f"parallel.cp · {name} = {parts * least} or more"
        _require(seq_len >= parts * least, key, seq_len, rule)

    def _check_whole(self, phase: Phase) -> None:
        """A phase is possible by itself."""
        try:
            if phase.name:
                self.during(phase)
        except ConfigError as error:
            raise ConfigError(f"phases.{phase.name}: {error}") from None

    def _check_rotation(self) -> None:
        channels = self.model.index_head_dim
        possible = not self.precision.fp4_indexer or channels & (channels - 1) == 0
        rule = "a power of two with precision.fp4_indexer=true"
        _require(possible, "model.index_head_dim", channels, rule)

    def _check_indexer(self) -> None:
        if self.attention_mode == "warmup":
            has_one = "compressed_sparse_attention" in self.model.layer_types
            rule = "sparse or dense without a compressed_sparse_attention layer in model.layer_types"
            _require(has_one, "train.attention_mode", "warmup", rule)
            weight, rule = self.train.indexer_loss_weight, "more than 0 with train.attention_mode=warmup"
            _require(weight > 0, "train.indexer_loss_weight", weight, rule)

    def _check_vocabulary(self) -> None:
        """Every id that the tokenizer can make has a row in the embedding."""
        tokenizer, rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "deepseek_v4":
            rule = f"{DEEPSEEK_V4_IDS} or more with data.tokenizer.kind=deepseek_v4"
            _require(rows >= DEEPSEEK_V4_IDS, "model.vocab_size", rows, rule)
        rule = f"at most model.vocab_size = {rows}"
        _require(tokenizer.vocab_size <= rows, "data.tokenizer.vocab_size", tokenizer.vocab_size, rule)
