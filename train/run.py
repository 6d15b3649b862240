"""A run: its parts on every rank, its place on disk, and what happens around the steps."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.compose import differences, to_yaml
from configs.errors import ConfigError
from data.config import Shape
from data.files import remedy
from data.opening import Data, open_data
from model.flops import count_parameters
from model.init import initialize
from model.kernels.gpu import has_kernels, planned_for_kernels
from model.layout import WholeSequence
from model.model import ForCausalLM
from train import checkpoint, recompute
from train.adapter import BUCKET
from train.config import RunConfig
from train.engine import Engine, TorchEngine
from train.evaluate import MEANS, evaluate
from train.export import export
from train.memory import predict, refuse_if_too_large
from train.metrics import JsonLines, validation_losses
from train.needle import find_needles, probe_batches, text_tokens
from train.parallel.context import context_of
from train.parallel.mesh import Mesh, build_mesh
from train.plot import plot_run
from train.ranks import Ranks, join
from train.recovery import Recovery, find_recovery
from train.report import Report
from train.resume import (
    drop_after,
    find_checkpoint,
    new_folder,
    remember,
    restarted,
    run_of,
    unless_rolled_back,
)
from train.sample import generate
from train.saving import Saver
from train.spikes import rollbacks
from train.tracking import Tracker
from train.watch import connect
from train.zero import ZeroEngine, zero_ranks

LOSS_WEIGHTS = ("model.router_aux_loss_coef",)  # of the model's keys, what a resumed run may change


@dataclass
class Run:
    """One run in progress on this rank; rank 0 alone prints, logs, exports and decides."""

    config: RunConfig
    folder: Path
    ranks: Ranks
    mesh: Mesh
    data: Data
    engine: Engine
    report: Report
    saver: Saver
    tracker: Tracker
    recovery: Recovery
    tracking: dict[str, str] = field(default_factory=dict)  # e.g. the W&B run's id
    logs: dict[str, JsonLines] = field(default_factory=dict)  # "metrics", "timing"; rank 0
    step: int = 0

    def log(self, logged: dict[str, float], timing: dict[str, float]) -> None:
        """What a step did, and how fast."""
        if self.ranks.first:
            self.report.step(logged, timing)
            self.logs["metrics"].write(**logged)
            self.logs["timing"].write(step=self.step, **timing)
            self.tracker.log(self.step, logged | timing)

    def validate(self) -> None:
        config = self.config.at(max(0, self.step - 1))
        rows, length = config.train.micro_batch * self.mesh.data_world, config.train.seq_len
        batches = self.data.valid.one_pass(rows, length, max(1, config.train.eval_tokens // length))
        found = evaluate(
            self.engine,
            self.ranks.watch.each(batches),
            self.ranks.device,
            config.attention_mode,
            self.ranks.sum,
            look=self.ranks.first,
            indexer_loss=config.indexer_loss,
            sources=self.data.valid.sources,
        )
        found |= self._needles(config)
        if self.ranks.first:
            named = {f"valid_{n}" if n.partition("/")[0] in MEANS else n: x for n, x in found.items()}
            self.logs["metrics"].write(step=self.step, **named)
            self.tracker.log(self.step, named)
            self.report.validation(self.step, found)

    def _needles(self, config: RunConfig) -> dict[str, float]:
        count, length, mesh = config.train.needle, config.train.seq_len, self.mesh
        if not count:
            return {}
        batches = probe_batches(
            self.data.valid.text(text_tokens(count, length), length),
            count,
            length,
            config.train.micro_batch,
            config.model.num_nextn_predict_layers,
            mesh.data_rank,
            mesh.data_world,
        )
        watched, mode = self.ranks.watch.each(batches), config.attention_mode
        return find_needles(self.engine, watched, self.ranks.device, mode, self.ranks.sum)

    def save(self) -> None:
        """Begin to save this step, and log the seconds for which training stood still. While routing is
        anticipated it waits: going on from there would not be exact."""
        if self.recovery.postpone():
            return
        manifest = {
            "config": to_yaml(self.config),
            "data": self.data.train.state_dict(),
            "tracking": self.tracking,
            "rollbacks": len(rollbacks(self.recovery.spikes)),
            "tokenizer": self.data.tokenizer.fingerprint,
            "world": self.ranks.world,
        }
        texts = {"tokenizer.json": self.data.tokenizer.to_json()}
        began = time.perf_counter()
        with self._disk():
            self.saver.save(self.step, self.engine.state(), manifest, texts)
        if not self.config.train.async_save:
            self.saved()
        if self.ranks.first:
            stall = {"seconds/checkpoint": time.perf_counter() - began}
            self.logs["timing"].write(step=self.step, **stall)
            self.tracker.log(self.step, stall)

    def saved(self) -> Path | None:
        """The run's newest checkpoint, once the last save is on disk."""
        with self._disk():
            self.saver.wait()
        return self.newest()

    def newest(self) -> Path | None:
        """The newest checkpoint on disk now."""
        return next(reversed(checkpoint.all_steps(self.folder / "checkpoints")), None)

    def go_back(self, place: Path) -> None:
        """Go on from a checkpoint of this run, exactly as one does that is started anew from it."""
        config, data, ranks = self.config, self.data, self.ranks
        self.step = checkpoint.step_of(place)
        ranks.together(lambda: _prepare(self.folder, config, self.step), only_first=True)
        self.recovery = find_recovery(config, self.folder, ranks)
        data.train.passed_over = self.recovery.passed_over
        _, state = ranks.together(lambda: _restore(place, config, self.engine, data))
        self.engine.state_was_loaded(state)
        self.engine.use(config.at(self.step).precision.at(self.step))
        self.open_logs()

    def open_logs(self) -> None:
        """After the files were cut back, which makes new ones."""
        if self.ranks.first:
            for log in self.logs.values():
                log.file.close()
            self.logs = {name: JsonLines(self.folder / f"{name}.jsonl") for name in ("metrics", "timing")}

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A rank that cannot write fails on all ranks: one line is enough."""
        try:
            with self.ranks.watch.patient():
                yield
        except OSError as error:
            raise ConfigError(
                f"{error}; this checkpoint is lost, those before it remain: {remedy(error)}"
            ) from error

    def finish(self) -> float:
        """Export the model and close the books; returns the last validation loss."""
        saved, text = self.saved(), self._sample()
        with self.ranks.watch.patient():
            self.ranks.together(lambda: self._conclude(saved, text), only_first=True)
        return self.ranks.share(
            validation_losses(self.folder / "metrics.jsonl")[-1] if self.ranks.first else 0.0
        )

    def _conclude(self, saved: Path | None, text: str) -> None:
        exported = self._export(saved)
        plot_run(self.folder)
        if text:
            (self.folder / "sample.txt").write_text(text)
        losses = validation_losses(self.folder / "metrics.jsonl")
        self.tracker.summary(valid_lm=losses[-1], sample=text)
        if (self.folder / "model").is_dir():
            self.tracker.artifact(self.folder / "model")
        self.report.finish(self.folder, losses, text, exported)

    def _export(self, saved: Path | None) -> str:
        """Write the last checkpoint's weights for others to load; returns where they are, or why there are
        none. No rank needs to hold the whole model."""
        folder = self.folder / "model"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that is finished once more
        try:
            assert saved is not None
            export(saved, folder, getattr(torch, self.config.precision.compute_dtype))
        except ConfigError as error:  # a baseline that no other library knows
            return f"not exported: {error}"
        return str(folder)

    def _sample(self) -> str:
        """The same text on every rank: together they hold the model."""
        train, model = self.config.train, self.engine.model
        if not train.sample_tokens:
            return ""
        parts, model.context = model.context, WholeSequence()  # every rank computes whole sequences
        try:
            return generate(
                model,
                self.data.tokenizer,
                train.sample_prompt,
                train.sample_tokens,
                context=train.seq_len,
                seed=train.seed,
                mode=self.config.at(self.step).attention_mode,
                agree=self.ranks.share,
            )
        finally:
            model.context = parts

    def close(self, exit_code: int) -> None:
        """End what runs beside the training."""
        with self.ranks.watch.patient():
            self.data.close()
            self.tracker.close(exit_code)
        if exit_code != 1:  # all ranks have come to an end, as far as the run goes or as asked
            self.ranks.watch.stop()


def open_run(config: RunConfig) -> Run:
    """Everything a run needs, checked and read in the order in which mistakes are cheap."""
    ranks = join(config.train.device, config.parallel.timeout_seconds)
    with ranks.watch.patient():
        return _open(config, ranks)


def _open(config: RunConfig, ranks: Ranks) -> Run:
    config.check_ranks(ranks.world)
    report = Report(config.train, quiet=not ranks.first)
    found = ranks.together(lambda: _place(config, report), only_first=True)
    folder, resumed = ranks.share(found)
    mesh = make_mesh(config, ranks)
    buckets = bucket_bytes(config, ranks)
    available = _available(ranks.device)
    with planned_for_kernels(has_kernels(ranks.device)):
        phases = [predict(config.during(phase), mesh, buckets) for phase in config.timeline]
        memory = max(phases, key=lambda memory: memory.total)
        ranks.together(
            lambda: refuse_if_too_large(memory, available, config, states_only=ranks.device.type == "cpu")
        )
    data = ranks.together(lambda: _open_data(config, mesh, report))
    torch.manual_seed(config.train.seed + ranks.rank)  # today nothing draws from it, and a change might
    engine = build_engine(config, ranks.device, mesh)
    manifest: dict[str, Any] = {}
    if resumed:
        manifest, state = ranks.together(lambda: _restore(resumed, config, engine, data))
        engine.state_was_loaded(state)
    step = manifest.get("step", 0)
    engine.use(config.at(step).precision.at(step))
    ranks.together(lambda: _prepare(folder, config, step if resumed else -1), only_first=True)
    train = config.train
    saver = Saver(folder / "checkpoints", train.keep_last, train.keep_every, ranks.files)
    recovery = find_recovery(config, folder, ranks)
    data.train.passed_over = recovery.passed_over
    tracker = Tracker(report.warn)
    run = Run(config, folder, ranks, mesh, data, engine, report, saver, tracker, recovery, step=step)
    run.open_logs()
    if ranks.first:
        run_id = run.tracker.start(config, folder, manifest.get("tracking", {}).get("wandb"), step)
        run.tracking = {"wandb": run_id} if run_id else {}
        if resumed:
            report.resumed(resumed, _changes(manifest, config, ranks))
        report.start(config, engine, data.summary, folder, memory, available)
    return run


def mesh_of(config: RunConfig, world: int) -> Mesh:
    """The first rank's place in the mesh of so many, without process groups; sizes have been checked."""
    parallel, zero = config.parallel, config.parallel.zero_ranks
    if zero is None:
        with torch.device("meta"):
            zero = zero_ranks(ForCausalLM(config.model), config.optim, world)
    return Mesh(0, world, parallel.ep, parallel.cp, zero)


def make_mesh(config: RunConfig, ranks: Ranks) -> Mesh:
    """Who shares what."""
    sizes = mesh_of(config, ranks.world)
    return build_mesh(ranks.rank, ranks.world, sizes.ep_size, sizes.cp_size, sizes.zero_size)


def build_engine(config: RunConfig, device: torch.device, mesh: Mesh) -> Engine:
    """The model with its initial weights, in the engine that the configuration names."""
    dtype, train, parallel = getattr(torch, config.precision.compute_dtype), config.train, config.parallel
    with device if parallel.engine == "torch" else torch.device("meta"):
        model = ForCausalLM(config.model)
    recompute.apply(model, config.recompute)
    model.context = context_of(mesh)
    if parallel.engine == "torch":
        model = initialize(model, train.seed)
        return TorchEngine(model, config.optim, dtype, train.compile, config.fp4_experts)
    return ZeroEngine(
        model,
        config.optim,
        dtype,
        stage=config.zero_stage(mesh.world),
        mesh=mesh,
        compiled=train.compile,
        rounded=parallel.expert_gradients == "bfloat16",
        shard_dense=parallel.shard_dense,
        seed=train.seed,
        device=device,
    )


def _place(config: RunConfig, report: Report) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint that it goes on from."""
    store = connect()
    config = restarted(config, store)
    resumed = find_checkpoint(config, report.warn)
    resumed = resumed and unless_rolled_back(resumed, report.warn)
    folder = run_of(resumed) if resumed else new_folder(config)
    remember(folder, store)
    if resumed and checkpoint.step_of(resumed) > config.train.steps:
        raise ConfigError(f"train.steps is {config.train.steps}, but {resumed} is beyond it; train longer")
    return folder, resumed


def _open_data(config: RunConfig, mesh: Mesh, report: Report) -> Data:
    def shape(step: int) -> Shape:
        phase = config.timeline.at(step)
        return Shape(phase.sequences(step), phase.seq_len, phase.weights or None)

    builder = int(os.environ.get("LOCAL_RANK", "0")) == 0
    data = open_data(
        config.data,
        shape,
        mtp_depth=config.model.num_nextn_predict_layers,
        seed=config.train.seed,
        rank=mesh.data_rank,
        world=mesh.data_world,
        builder=builder,
        say=report.warn if mesh.rank == 0 else None,
    )
    ends, marks = config.model.eos_token_id, data.tokenizer.eos_id
    if ends != marks:
        raise ConfigError(f"model.eos_token_id is {ends}, but the tokenizer's is {marks}; set it to {marks}")
    return data


def _restore(
    folder: Path, config: RunConfig, engine: Engine, data: Data
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a checkpoint's state into the data and the engine's tensors; returns its manifest and these."""
    manifest = checkpoint.read_manifest(folder)
    for line in differences(manifest["config"], config):
        key = line.partition(":")[0]
        if key.startswith("model.") and key not in LOSS_WEIGHTS:
            raise ConfigError(f"resume: the checkpoint is of another model ({line}); restore that key")
    if manifest["tokenizer"] != data.tokenizer.fingerprint:
        meant = (
            config.data.on_change == "restart" and config.data.tokenizer.kind != "bpe" and manifest["data"]
        )
        if not meant:  # a BPE is another one as soon as the text is: nobody wants the model to change with it
            kept = f"{folder}/tokenizer.json"
            raise ConfigError(
                f"data.tokenizer: is another one than {kept}; restore its keys, or keep that one:"
                f" data.tokenizer.kind=file data.tokenizer.path={kept}"
            )
    if manifest["data"]:  # imported weights have seen no data
        data.train.load_state_dict(manifest["data"])
    with checkpoint.open_tensors(folder) as stored:
        targets = engine.state_to_load({key: stored.shape(key) for key in stored})
    checkpoint.load(folder, targets)
    return manifest, targets


def _prepare(folder: Path, config: RunConfig, step: int) -> None:
    """The run's folder as it was after `step`, with today's configuration."""
    try:
        drop_after(folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run.dir: {folder}: {error.strerror}; choose another, or mend it") from error


def _changes(manifest: Mapping[str, Any], config: RunConfig, ranks: Ranks) -> list[str]:
    places = ("resume:", "run.")
    changed = [line for line in differences(manifest["config"], config) if not line.startswith(places)]
    if manifest["world"] != ranks.world:
        changed.append(f"ranks: {manifest['world']} -> {ranks.world}")
    return changed


def bucket_bytes(config: RunConfig, ranks: Ranks) -> int:
    """What DeepSpeed reduces gradients in; the bare engine has none."""
    if config.parallel.engine == "torch":
        return 0
    count = count_parameters(config.model)
    numbers = min(BUCKET, count.total + count.mtp)
    overlapping = ranks.world > 1 and ranks.device.type == "cuda"  # one fills while the other travels
    return 4 * numbers * (2 if overlapping else 1)


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
