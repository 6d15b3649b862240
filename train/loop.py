"""The training loop: `train_step` is one optimizer step, `train` a run from configuration to report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from data.shards import Damaged
from model.flops import training_flops_per_token
from model.layout import entry_readers
from model.moe import expert_loads, update_bias
from optim.schedule import decay_start, lr_at
from train.config import RunConfig
from train.engine import Batch, Engine, micro_batches
from train.metrics import Timer, expert_metrics, floats, memory, peak_flops
from train.opening import open_run
from train.quantisation import fp8_metrics, observed
from train.ranks import Ranks
from train.recovery import Routes, recover
from train.replicas import compare
from train.run import Run
from train.spikes import Point
from train.stop import Stop
from train.watch import FailedHere


def train_step(
    engine: Engine,
    batch: Batch,
    config: RunConfig,
    step: int,
    ranks: Ranks,
    timer: Timer | None = None,
    routing: Sequence[Routes] = (),
) -> dict[str, float]:
    """One optimizer step on this rank's sequences [B, S]; returns what is logged about it, over all ranks.

    Ranks that share sequences out take them whole, and count what lies in their part. Loss parts come as
    sums; each is divided by its count over the whole step, so that neither the number of ranks nor of
    micro-batches nor their padding changes anything. `routing`: by micro-batch, experts that were chosen
    before (`train.recovery`).
    """
    timer = timer or Timer(ranks.device)
    weights, lr = loss_weights(config, step), lr_at(step, config.train.steps, config.optim)
    part, moes = engine.model.context.part, engine.model.moes()
    counts = label_counts({name: part(x) for name, x in batch.items()}, config, ranks)
    engine.activate(config.trained_sets)
    loads = torch.zeros(
        len(moes), config.model.n_routed_experts, dtype=torch.int64, device=ranks.device
    )  # [MoE, E]
    sums = torch.zeros(len(counts), dtype=torch.float64, device=ranks.device)
    measured = (step + 1) % config.train.log_every == 0
    rounding: dict[str, Tensor] = {}
    micros = list(micro_batches(batch, config.train.micro_batch))
    for number, micro in enumerate(ranks.watch.each(micros), start=1):
        micro = {name: x.to(ranks.device, non_blocking=True) for name, x in micro.items()}
        replay = on_device(routing[number - 1], ranks.device) if routing else None
        look = measured and number == 1 and engine.precision.fp8
        with observed(engine.model, engine.precision, rounding) if look else nullcontext():
            with timer("forward"):
                output = engine(
                    micro, mode=config.attention_mode, indexer_loss=config.indexer_loss, replay=replay
                )
                parts = {part: output.losses[part][0] / count for part, count in counts.items()}
                weighted = [weight * parts[part] for part, weight in weights.items() if part in parts]
                loss = torch.stack(weighted).sum()
            with timer("backward"):
                engine.backward(loss, last=number == len(micros))
        sums += torch.stack(list(parts.values())).detach()
        for load, indices in zip(loads, output.expert_indices, strict=True):
            load += expert_loads(indices, len(load), part(micro["document_ids"]) >= 0)
    if config.train.checksum_every and (step + 1) % config.train.checksum_every == 0:
        with timer("checksum"):  # before wrong gradients reach the masters
            compare(engine.replicas(), ranks, step + 1)
    with timer("optimizer"):
        norms = engine.step(lr, measure=measured)
    ranks.sum(sums)
    ranks.sum(loads)
    learned = [(moe.gate, load) for moe, load in zip(moes, loads, strict=True) if not moe.gate.is_hash]
    for gate, load in learned if "model" in config.trained_sets else ():
        update_bias(gate.e_score_correction_bias, load, config.train.bias_update_rate)
    logged = {**dict(zip(counts, sums, strict=True)), **norms, **expert_metrics(engine.model, list(loads))}
    return {"lr": lr, **floats(logged), **fp8_metrics(rounding, ranks.sum)}


def on_device(routes: Routes, device: torch.device) -> Routes:
    """As the model takes them; nothing waits for copies under way."""
    return [None if chosen is None else chosen.to(device, non_blocking=True).long() for chosen in routes]


def label_counts(batch: Batch, config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """How many labels, tokens or queries each loss part is the mean over, in the step of all ranks."""
    real = batch["document_ids"] >= 0
    counts = {
        "lm": (batch["labels"] != -100).sum(),
        "mtp": (batch["next_ids"] != -100).sum(),
        "balance": real.sum(),
    }
    if not batch["next_ids"].shape[-1]:
        del counts["mtp"]
    if config.indexer_loss:
        counts["indexer"] = entry_readers(config.model, batch["position_ids"], real)
    total = ranks.sum(torch.stack(list(counts.values())).to(ranks.device))
    return dict(zip(counts, total.clamp(min=1).tolist(), strict=True))


def loss_weights(config: RunConfig, step: int) -> dict[str, float]:
    """Weights of the loss parts that are trained on; MTP's falls when the learning rate starts to decay (V4
    report)."""
    train = config.train
    indexer = {"indexer": train.indexer_loss_weight}
    if "model" not in config.trained_sets:
        return indexer
    decaying = step >= decay_start(train.steps, config.optim)
    mtp = train.mtp_decay_loss_weight if decaying else train.mtp_loss_weight
    return {"lm": 1.0, "mtp": mtp, "balance": config.model.router_aux_loss_coef, **indexer}


def train(config: RunConfig) -> float:
    """Run `config` to its end; returns the last validation loss in nats per token."""
    run = open_run(config)
    exit_code = 1
    try:
        if run.step == 0:
            run.validate()
        with run.report.live(), Stop(config.train.stop_seconds, run.newest) as stop:
            while run.step < config.train.steps:
                advance(run)
                if run.ranks.any(stop.asked or run.saver.failed):
                    if run.step % config.train.save_every:
                        run.save()
                    run.report.stopped(run.saved(), run.step)  # raises what the save has failed with
                    exit_code = 130 if run.ranks.any(stop.interrupted) else 0
                    raise KeyboardInterrupt if exit_code else SystemExit(0)
        loss = run.finish()
        exit_code = 0
        return loss
    finally:
        run.close(exit_code)


def advance(run: Run) -> None:
    """One step with everything around it: data, log, validation, checkpoint."""
    train, timeline = run.config.train, run.config.timeline
    config = run.config.at(run.step)
    timer = Timer(run.ranks.device)
    with timer("data"), run.ranks.watch.patient():
        try:
            batch = run.data.train.batch()
            later = {due: run.data.train.later(due) for due in run.recovery.due(run.step)}
        except Damaged as error:  # found by whoever reads it, and not by the other ranks
            raise FailedHere(str(error)) from error
    if run.engine.use(precision := config.precision.at(run.step)):
        run.report.precision(run.step, precision)
    routing = run.recovery.routing(run.step)
    if later:
        with timer("anticipate"):
            run.recovery.anticipate(run.engine, later, run.ranks)
    logged = train_step(run.engine, batch, config, run.step, run.ranks, timer, routing)
    timing = timer.stop()
    run.step += 1
    tokens = timeline.tokens(run.step)
    flops = training_flops_per_token(
        config.model, config.train.seq_len, config.attention_mode, config.indexer_loss
    ).total
    timing["tokens_per_s"] = (tokens - timeline.tokens(run.step - 1)) / timing["seconds/step"]
    if peak := peak_flops(run.ranks.device):
        timing["mfu"] = flops * timing["tokens_per_s"] / (peak * run.ranks.world)
    if run.step % train.log_every == 0:
        timing |= memory(run.ranks.device)
    logged = {"step": run.step, "tokens": tokens, "sequences": run.data.train.handed_out, **logged}
    run.log(logged, timing)
    finite = all(math.isfinite(value) for value in logged.values())
    spike = run.recovery.look(Point.of(logged), finite)
    if spike and recover(run, spike, finite):
        return
    at_end = run.step == train.steps
    if run.step % train.eval_every == 0 or at_end:
        run.validate()
    if run.step % train.save_every == 0 or at_end or run.recovery.postponed:
        run.save()
