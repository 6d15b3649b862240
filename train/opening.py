"""From a configuration to an open run: ranks, mesh, memory, data, engine, and what a checkpoint holds."""

from __future__ import annotations

import os
from typing import Any

import torch

from configs.errors import ConfigError
from data.config import Shape
from data.opening import Data, open_data
from model.kernels.gpu import has_kernels, planned_for_kernels
from train.build import build_engine, make_mesh
from train.config import RunConfig
from train.memory import Memory, bucket_bytes, predict, refuse_if_too_large
from train.parallel.mesh import Mesh
from train.ranks import Ranks, join
from train.recovery import find_recovery
from train.report import Report
from train.resume import changes, find_run, prepare_folder, restore
from train.run import Run
from train.saving import Saver
from train.tracking import Tracker


def open_run(config: RunConfig) -> Run:
    """Everything a run needs, checked and read in the order in which mistakes are cheap."""
    ranks = join(config.train.device, config.parallel.timeout_seconds)
    with ranks.watch.patient():
        return _open(config, ranks)


def _open(config: RunConfig, ranks: Ranks) -> Run:
    config.check_ranks(ranks.world)
    report = Report(config.train, quiet=not ranks.first)
    found = ranks.together(lambda: find_run(config, report.warn), only_first=True)
    folder, resumed = ranks.share(found)
    mesh = make_mesh(config, ranks)
    memory, available = _check_memory(config, mesh, ranks)
    data = ranks.together(lambda: _open_data(config, mesh, report))
    torch.manual_seed(config.train.seed + ranks.rank)  # today nothing draws from it, and a change might
    engine = build_engine(config, ranks.device, mesh)
    manifest: dict[str, Any] = {}
    if resumed:
        manifest, state = ranks.together(lambda: restore(resumed, config, engine, data))
        engine.state_was_loaded(state)
    step = manifest.get("step", 0)
    engine.use(config.at(step).precision.at(step))
    ranks.together(lambda: prepare_folder(folder, config, step if resumed else -1), only_first=True)
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
            report.resumed(resumed, changes(manifest, config, ranks.world))
        report.start(config, engine, data.summary, folder, memory, available)
    return run


def _check_memory(config: RunConfig, mesh: Mesh, ranks: Ranks) -> tuple[Memory, int]:
    """What the phase that needs most will need, and the bytes that the device has; ConfigError if too few."""
    device = ranks.device
    buckets, available = bucket_bytes(config, mesh, device), _available(device)
    with planned_for_kernels(has_kernels(device)):
        phases = [predict(config.during(phase), mesh, buckets) for phase in config.timeline]
        memory = max(phases, key=lambda memory: memory.total)
        ranks.together(
            lambda: refuse_if_too_large(memory, available, config, states_only=device.type == "cpu")
        )
    return memory, available


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


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
