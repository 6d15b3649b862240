"""The whole configuration of a run, and the checks that need more than one section of it; no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from configs.errors import ConfigError
from data.config import DataConfig
from model.config import ModelConfig
from model.precision import NAMED
from optim.config import OptimConfig
from optim.schedule import decay_start
from train.phases import Phase, PhaseConfig, Timeline
from train.sections import (
    AttentionMode,
    ParallelConfig,
    PrecisionConfig,
    RunDirConfig,
    TrackingConfig,
    TrainConfig,
    require,
)
from train.spikes import SpikesConfig

DEEPSEEK_V4_IDS = 129_280  # of the released tokenizer, added tokens included
SHORTEST_WITH_NEEDLE = 32  # tokens: half of them text


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
            require(exists, "resume", self.resume, "auto, null, or the folder of a checkpoint that exists")

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
            require(world % size == 0, f"parallel.{key}", size, rule)
        rule = f"a divisor of model.n_routed_experts = {experts}"
        require(experts % parallel.ep == 0, "parallel.ep", parallel.ep, rule)
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
        require(seq_len <= limit, key, seq_len, rule)
        for kind in sorted(set(model.layer_types) & set(model.compress_rates)):
            rate = model.compress_rates[kind]
            rule = f"at least model.compress_rates.{kind} = {rate}, or these layers never compress anything"
            require(seq_len >= rate, key, seq_len, rule)
        hides = not self.train.needle or seq_len >= SHORTEST_WITH_NEEDLE
        require(hides, key, seq_len, f"{SHORTEST_WITH_NEEDLE} or more, or train.needle 0")
        self._check_parts(seq_len, key)
        depth = model.num_nextn_predict_layers
        rule = f"less than {key} - 1 = {seq_len - 1}"
        require(depth < seq_len - 1, "model.num_nextn_predict_layers", depth, rule)

    def _check_parts(self, seq_len: int, key: str) -> None:
        """A rank's part of a sequence reaches back into the part before it, not further."""
        parts, model = self.parallel.cp, self.model
        if parts == 1:
            return
        rule = f"a multiple of parallel.cp = {parts}"
        require(seq_len % parts == 0, key, seq_len, rule)
        reach = {"model.sliding_window": model.sliding_window}
        for kind, times in (("heavily_compressed_attention", 1), ("compressed_sparse_attention", 2)):
            if kind in model.layer_types:
                name = f"model.compress_rates.{kind}"
                reach[f"{times} · {name}" if times > 1 else name] = times * model.compress_rates[kind]
        name, least = max(reach.items(), key=lambda item: item[1])
        rule = f"parallel.cp · {name} = {parts * least} or more"
        require(seq_len >= parts * least, key, seq_len, rule)

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
        require(possible, "model.index_head_dim", channels, rule)

    def _check_indexer(self) -> None:
        if self.attention_mode == "warmup":
            has_one = "compressed_sparse_attention" in self.model.layer_types
            rule = "sparse or dense without a compressed_sparse_attention layer in model.layer_types"
            require(has_one, "train.attention_mode", "warmup", rule)
            weight, rule = self.train.indexer_loss_weight, "more than 0 with train.attention_mode=warmup"
            require(weight > 0, "train.indexer_loss_weight", weight, rule)

    def _check_vocabulary(self) -> None:
        """Every id that the tokenizer can make has a row in the embedding."""
        tokenizer, rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "deepseek_v4":
            rule = f"{DEEPSEEK_V4_IDS} or more with data.tokenizer.kind=deepseek_v4"
            require(rows >= DEEPSEEK_V4_IDS, "model.vocab_size", rows, rule)
        rule = f"at most model.vocab_size = {rows}"
        require(tokenizer.vocab_size <= rows, "data.tokenizer.vocab_size", tokenizer.vocab_size, rule)
