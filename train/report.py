"""What a person sees: where the run goes, a line now and then, a bar, and a closing table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from model.flops import count_parameters
from model.model import ForCausalLM
from model.precision import Precision
from optim.groups import build_groups, group_rows
from train.checkpoint import step_of
from train.config import RunConfig
from train.engine import Engine
from train.memory import Memory
from train.memory import table as memory_table
from train.phases import CHANGES
from train.sections import TrainConfig


class Report:
    """Prints the run; on a terminal a progress bar stays below the lines."""

    def __init__(self, config: TrainConfig, console: Console | None = None, quiet: bool = False):
        self.config = config
        self.console = console or Console(highlight=False, markup=False, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.began = time.perf_counter()
        self.recent: list[float] = []  # tokens per second since the last line

    def start(
        self,
        config: RunConfig,
        engine: Engine,
        summary: dict[str, Any],
        folder: Path,
        memory: Memory,
        available: int,
    ) -> None:
        """Say what is trained, on what, how its parameters are updated and what memory that takes."""
        count = count_parameters(config.model)
        device = engine.model.lm_head.weight.device
        table = Table(
            "group", "tensors", "matrices", "parameters", "such as", title="optimizer", title_justify="left"
        )
        with torch.device("meta"):
            whole = ForCausalLM(config.model)  # a rank may hold less
        for row in group_rows(build_groups(whole.named_parameters(), config.model, config.optim)):
            table.add_row(row.group, str(row.tensors), str(row.matrices), f"{row.parameters:,}", row.examples)
        self.console.print(table)
        self.console.print(memory_table(memory, available))
        self.console.print(
            f"model   {(count.total + count.mtp) / 1e6:,.1f}M parameters,"
            f" {count.active / 1e6:,.1f}M active per token, {config.model.num_hidden_layers} layers"
            f" on {device}, {config.precision.name} ({config.precision.compute_dtype})"
        )
        missing = summary["shards"] - summary["shards_ready"]
        waiting = f" ({missing} of {summary['shards']} shards to come)" if missing else ""
        self.console.print(
            f"data    {summary['tokens']:,} tokens in {summary['documents']:,} documents,"
            f" {summary['bytes'] / 1e6:,.1f} of {summary['source_bytes'] / 1e6:,.1f} MB{waiting},"
            f" ready in {summary['seconds']:.1f} s"
        )
        if config.phases:
            self.console.print(phase_table(config))
        self.console.print(
            f"run     {config.train.steps} steps of {config.train.batch_tokens:,} tokens into {folder}\n"
        )
        self.task = self.progress.add_task("training", total=config.train.steps)

    def step(self, logged: dict[str, float], speed: dict[str, float]) -> None:
        """Move the bar; every `log_every` steps print a line."""
        step = int(logged["step"])
        self.progress.update(self.task, completed=step)
        self.recent.append(1 / speed["tokens_per_s"])
        if step % self.config.log_every and step != 1:
            return
        rate, self.recent = len(self.recent) / sum(self.recent), []
        parts = [f"step {step:>6}", f"loss {logged['lm']:.4f}"]
        parts += [f"mtp {logged['mtp']:.4f}"] if "mtp" in logged else []
        parts += [f"balance {logged['balance']:.3f}"]
        parts += [f"kl {logged['indexer']:.3f}"] if "indexer" in logged else []
        norm = logged.get("grad_norm_model", logged.get("grad_norm_indexer", 0.0))  # of what is trained
        parts += [f"lr {logged['lr']:.2e}", f"norm {norm:.3f}"]
        parts += [f"load {logged['max_load']:.2f}"] if "max_load" in logged else []
        parts += [f"{rate:,.0f} tokens/s"]
        parts += [f"mfu {speed['mfu']:.1%}"] if "mfu" in speed else []
        self._line("  ".join(parts))

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Print the validation losses, in nats per token, and how often the next token is the likeliest."""
        parts = [f"{part} {losses[part]:.4f}" for part in ("lm", "mtp") if part in losses]
        parts += [f"kl {losses['indexer']:.4f}"] if "indexer" in losses else []
        shares = {"accuracy": "accuracy", "needle_accuracy": "needle"}
        parts += [f"{word} {losses[name]:.1%}" for name, word in shares.items() if name in losses]
        self._line(f"step {step:>6}  validation  {'  '.join(parts)}", style="bold")

    def precision(self, step: int, now: Precision) -> None:
        """What is rounded from the step after this one on, which it was not before."""
        words = [name for name, value in asdict(now).items() if value]
        self._line(f"step {step:>6}  precision  {', '.join(words) or 'nothing is rounded'}", style="bold")

    def warn(self, text: str) -> None:
        """Something that the run survives."""
        self._line(f"warning: {text}", style="yellow")

    def stopped(self, saved: Path | None, step: int) -> None:
        """A run that was asked to stop: what was kept and how to go on."""
        whole = saved is not None and step_of(saved) == step
        kept = "saved" if whole else "not saved while routing is anticipated"  # `Recovery.postpone`
        self._line(f"stopped after step {step}, {kept}; go on with the same arguments and resume={saved}")

    def resumed(self, saved: Path, changed: list[str]) -> None:
        """Where a run goes on, and which keys are not what they were."""
        for line in (f"resume  {saved}", *(f"changed {line}" for line in changed)):
            self._line(line)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the bar while the run goes on; whatever ends it, the terminal is left in order."""
        self.progress.start()
        try:
            yield
        finally:
            self.progress.stop()

    def finish(self, folder: Path, valid: list[float], sample: str, exported: str) -> None:
        """The closing table, the sample, and what to try next; `valid` are the run's validation losses."""
        table = Table(show_header=False, title="result", title_justify="left")
        seconds = time.perf_counter() - self.began
        table.add_row("validation loss", f"{valid[0]:.3f} -> {valid[-1]:.3f} nats per token")
        table.add_row("time", f"{seconds // 60:.0f} min {seconds % 60:.0f} s")
        table.add_row("weights, for transformers too", exported)
        table.add_row("checkpoints", str(folder / "checkpoints"))
        table.add_row("metrics, timing", f"{folder / 'metrics.jsonl'}, {folder / 'timing.jsonl'}")
        table.add_row("curves", str(folder / "curves.png"))
        table.add_row("configuration", str(folder / "config.yaml"))
        self.console.print(table)
        if sample:
            self.console.print(Panel(Text(sample), title="sample", title_align="left"))
        self.console.print(
            "next: python -m train data.path=FOLDER_OF_YOUR_TEXT   or   python -m train --help"
        )

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, soft_wrap=True)


def phase_table(config: RunConfig) -> Table:
    """The timeline of a run; of what phases change, the columns that some do."""
    columns = [key for key in CHANGES if any(key in phase.changes for phase in config.timeline)]
    names = ["phase", "steps", "sequence", "batch", "micro-batch", "tokens", *columns]
    table = Table(*names, title="phases", title_justify="left")
    timeline = config.timeline
    for phase in timeline:
        ramp = f"{phase.ramp_from:,} to " if phase.ramp_from != phase.batch_tokens else ""
        tokens = timeline.tokens(phase.stop) - timeline.tokens(phase.first)
        steps, batch = f"{phase.first + 1} to {phase.stop}", f"{ramp}{phase.batch_tokens:,}"
        changes = [str(phase.changes.get(key, "")) for key in columns]
        table.add_row(
            phase.name, steps, f"{phase.seq_len:,}", batch, str(phase.micro_batch), f"{tokens:,}", *changes
        )
    return table
