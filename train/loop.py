"""The training loop: `train_step` is one optimizer step, `train` a run from configuration to report."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from configs.compose import differences, to_yaml
from configs.errors import ConfigError
from data.loader import Data, open_data
from model.attention import AttentionMode
from model.flops import count_parameters, training_flops_per_token
from model.hf import save_pretrained
from model.init import initialize
from model.model import ForCausalLM
from model.moe import expert_loads, update_bias
from optim.schedule import decay_start, lr_at
from train import checkpoint
from train.config import RunConfig
from train.engine import Batch, TorchEngine
from train.evaluate import evaluate
from train.metrics import JsonLines, peak_flops, validation_losses
from train.plot import plot_run
from train.report import Report
from train.resume import drop_after, find_checkpoint, new_folder, run_of
from train.sample import generate


def train_step(engine: TorchEngine, batch: Batch, config: RunConfig, step: int) -> dict[str, float]:
    """One optimizer step on this step's sequences [B, S]; returns what is logged about it.

    Loss parts come as sums; each is divided by its count over the whole step, so that neither the number of
    micro-batches nor their padding changes anything.
    """
    weights, lr = loss_weights(config, step), lr_at(step, config.train.steps, config.optim)
    counts = {
        "lm": (batch["labels"] != -100).sum(),
        "mtp": (batch["next_ids"] != -100).sum(),
        "balance": (batch["document_ids"] >= 0).sum(),
    }
    moes = engine.model.moes()
    loads = [
        torch.zeros(moe.experts.gate_up_proj.shape[0], dtype=torch.int64, device=device_of(engine))
        for moe in moes
    ]
    sums: dict[str, Tensor] = {}
    for micro in micro_batches(batch, config.train.micro_batch, device_of(engine)):
        output = engine(micro, mode=attention_mode(config))
        parts = {part: loss / counts[part].clamp(min=1).item() for part, (loss, _) in output.losses.items()}
        engine.backward(torch.stack([weights[part] * loss for part, loss in parts.items()]).sum())
        for part, loss in parts.items():
            sums[part] = sums.get(part, 0) + loss.detach()
        for load, indices in zip(loads, output.expert_indices, strict=True):
            load += expert_loads(indices, len(load), micro["document_ids"] >= 0)
    norms = engine.step(lr)
    logged = {**sums, **{f"grad_norm_{name}": norm for name, norm in norms.items()}}
    for moe, load in zip(moes, loads, strict=True):
        if not moe.gate.is_hash:
            update_bias(moe.gate.e_score_correction_bias, load, config.train.bias_update_rate)
            busiest = load.max() * len(load) / load.sum().clamp(min=1)  # over the mean load, 1 is balanced
            logged["max_load"] = torch.maximum(logged.get("max_load", busiest), busiest)
    return {"step": step + 1, "lr": lr, **{name: float(value) for name, value in logged.items()}}


def loss_weights(config: RunConfig, step: int) -> dict[str, float]:
    """Weights of the loss parts; MTP's falls when the learning rate starts to decay (V4 report)."""
    train = config.train
    decaying = step >= decay_start(train.steps, config.optim)
    mtp = train.mtp_decay_loss_weight if decaying else train.mtp_loss_weight
    return {"lm": 1.0, "mtp": mtp, "balance": config.model.router_aux_loss_coef}


def micro_batches(batch: Batch, rows: int, device: torch.device) -> Iterator[Batch]:
    """The step's sequences `rows` at a time, on the device."""
    for start in range(0, batch["input_ids"].shape[0], rows):
        yield {name: x[start : start + rows].to(device) for name, x in batch.items()}


def attention_mode(config: RunConfig) -> AttentionMode:
    return cast(AttentionMode, config.train.attention_mode)  # checked by TrainConfig


def device_of(engine: TorchEngine) -> torch.device:
    return engine.model.lm_head.weight.device


def train(config: RunConfig) -> float:
    """Run `config` to its end; returns the last validation loss in nats per token."""
    run = open_run(config)
    report = run.report
    report.start(config, run.engine, run.data.summary, run.folder)
    tokens = config.train.batch_tokens
    flops = training_flops_per_token(config.model, config.train.seq_len, attention_mode(config), False).total
    peak = peak_flops(run.device)
    if run.step == 0:
        run.validate()
    with report.live(), stop_after_step() as stopping:
        for step in range(run.step, config.train.steps):
            began = time.perf_counter()
            logged = train_step(
                run.engine, run.data.train.batch(tokens // config.train.seq_len), config, step
            )
            seconds = time.perf_counter() - began
            speed = {"tokens_per_s": tokens / seconds}
            if peak:
                speed["mfu"] = flops * tokens / seconds / peak
            run.step = step + 1
            run.log(logged, speed)
            if not all(math.isfinite(value) for value in logged.values()):
                raise ConfigError(
                    f"step {run.step}: the loss or a gradient norm is not finite; lower optim.lr"
                )
            if run.step % config.train.eval_every == 0 or run.step == config.train.steps:
                run.validate()
            if run.step % config.train.save_every == 0 or run.step == config.train.steps:
                run.save()
            if stopping():
                report.stopped(run.save(), run.step)
                raise KeyboardInterrupt
    run.finish()
    return run.valid_losses()[-1]


@contextmanager
def stop_after_step() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noticed by the function this yields; a second one interrupts at once, as usual.

    Stopping in the middle of a step would leave weights half updated.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Run:
    """One run in progress: its parts, its place on disk and what it has done so far."""

    config: RunConfig
    folder: Path
    device: torch.device
    data: Data
    engine: TorchEngine
    report: Report
    metrics: JsonLines
    timing: JsonLines
    step: int = 0

    def log(self, logged: dict[str, float], speed: dict[str, float]) -> None:
        self.report.step(logged, speed)
        self.metrics.write(**logged)
        self.timing.write(step=self.step, **speed)

    def validate(self) -> None:
        train = self.config.train
        sequences = max(1, train.eval_tokens // train.seq_len)
        batches = self.data.valid.one_pass(train.micro_batch, sequences)
        losses = evaluate(self.engine, batches, self.device, attention_mode(self.config))
        self.metrics.write(step=self.step, **{f"valid_{part}": loss for part, loss in losses.items()})
        self.report.validation(self.step, losses)

    def save(self) -> Path:
        meta = {"step": self.step, "data": self.data.train.state_dict(), "config": to_yaml(self.config)}
        return checkpoint.save(self.folder / "checkpoints", self.step, self.engine.state(), meta)

    def valid_losses(self) -> list[float]:
        """Of the whole run, what went before a resumption included."""
        return validation_losses(self.folder / "metrics.jsonl")

    def finish(self) -> None:
        config = self.config
        exported = self.export()
        plot_run(self.folder)
        prompt, length = config.train.sample_prompt, config.train.sample_tokens
        text = ""
        if length:
            text = generate(
                self.engine.model,
                self.data.tokenizer,
                prompt,
                length,
                context=config.train.seq_len,
                seed=config.train.seed,
                mode=attention_mode(config),
            )
            (self.folder / "sample.txt").write_text(text)
        self.report.finish(self.folder, self.valid_losses(), text, exported)

    def export(self) -> str:
        """Write the weights for others to load; returns where they are, or why there are none."""
        folder = self.folder / "model"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that is finished once more
        try:
            save_pretrained(self.engine.model, folder)
            (folder / "tokenizer.json").write_text(self.data.tokenizer.to_json())
        except ConfigError as error:  # a baseline that no other library knows
            return f"not exported: {error}"
        return str(folder)


def open_run(config: RunConfig) -> Run:
    """Everything a run needs, checked and read in the order in which mistakes are cheap."""
    device = _device(config.train.device)
    _check_memory(config, device)
    resumed = find_checkpoint(config)
    folder = run_of(resumed) if resumed else new_folder(config)
    if resumed and checkpoint.step_of(resumed) > config.train.steps:
        raise ConfigError(f"train.steps is {config.train.steps}, but {resumed} is beyond it; train longer")
    data = open_data(
        config.data,
        seq_len=config.train.seq_len,
        mtp_depth=config.model.num_nextn_predict_layers,
        seed=config.train.seed,
    )
    ends, marks = config.model.eos_token_id, data.tokenizer.eos_id
    if ends != marks:
        raise ConfigError(f"model.eos_token_id is {ends}, but the tokenizer's is {marks}; set it to {marks}")
    with torch.device(device):
        model = ForCausalLM(config.model)
    initialize(model, config.train.seed)
    engine = TorchEngine(
        model, config.optim, getattr(torch, config.precision.compute_dtype), config.train.compile
    )
    step, report = 0, Report(config.train)
    if resumed:
        tensors, meta = checkpoint.load(resumed)
        data.train.load_state_dict(meta["data"])
        engine.load_state(tensors)
        step = meta["step"]
        report.resumed(resumed, differences(meta["config"], config))
    drop_after(folder, step if resumed else -1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    logs = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "timing.jsonl")
    return Run(config, folder, device, data, engine, report, *logs, step=step)


def _check_memory(config: RunConfig, device: torch.device) -> None:
    """Refuse what cannot fit: fp32 weights, gradients and one moment, and narrow copies of the first two."""
    count = count_parameters(config.model)
    each = 12 if config.precision.compute_dtype == "float32" else 16
    need = (count.total + count.mtp) * each / 2**30
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory / 2**30
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if need > have:
        raise ConfigError(
            f"model: needs {need:,.0f} GiB at least, {device.type} has {have:,.0f}; choose a smaller model"
        )


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is cuda, but torch sees no GPU here; use train.device=cpu or install a CUDA torch"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
