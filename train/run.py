"""An open run on every rank: what happens around its steps, and at its end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configs.compose import to_yaml
from configs.errors import ConfigError
from data.files import remedy
from data.opening import Data
from model.layout import WholeSequence
from train import checkpoint
from train.config import RunConfig
from train.engine import Engine
from train.evaluate import MEANS, evaluate
from train.export import export
from train.metrics import JsonLines, validation_losses
from train.needle import find_needles, probe_batches, text_tokens
from train.parallel.mesh import Mesh
from train.plot import plot_run
from train.ranks import Ranks
from train.recovery import Recovery, find_recovery
from train.report import Report
from train.resume import prepare_folder, restore
from train.sample import generate
from train.saving import Saver
from train.spikes import rollbacks
from train.tracking import Tracker


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
        ranks.together(lambda: prepare_folder(self.folder, config, self.step), only_first=True)
        self.recovery = find_recovery(config, self.folder, ranks)
        data.train.passed_over = self.recovery.passed_over
        _, state = ranks.together(lambda: restore(place, config, self.engine, data))
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
