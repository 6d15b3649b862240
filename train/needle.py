"""A retrieval probe that needs no download: is what was said once, far back, found again?

A row is one document of held-out text. At some depth it holds a needle, a key of a few random tokens
followed by a value of a few more; it ends with the key, and the value is what the model is to predict. The
same row without the needle is the control: what the value costs when it has to be guessed. Text and needle
are the same in all rows of a probe, at every validation, for every seed and on any number of ranks.

Legend: B batch, S sequence, P prediction depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from configs.errors import ConfigError
from data.corpus import generator
from model.attention import AttentionMode
from train.engine import Batch, Engine
from train.tally import Tally

KEY, VALUE = 4, 4  # tokens
DEPTHS = (0, 25, 50, 75, 100)  # percent of the text that lie before the needle
HIDDEN = tuple(f"needle_loss/{depth}" for depth in DEPTHS)
GROUPS = (*HIDDEN, "needle_control")


def text_tokens(count: int, seq_len: int) -> int:
    """How many tokens of text so many probes need."""
    return count * (seq_len - KEY - VALUE)


def probes(text: Tensor, count: int, seq_len: int) -> Tensor:
    """`count` probes, each of a row in every one of GROUPS, in that order, from as many parts of `text`
    (int64) -> [count, len(GROUPS), seq_len].

    A key occurs nowhere in its text. Raises ConfigError where the text is too uniform for that.
    """
    vocabulary, found = text.unique(), []
    for number, part in enumerate(text.view(count, seq_len - KEY - VALUE)):
        needle = _needle(number, vocabulary, part)
        hay = part[: len(part) - len(needle)]
        borders = [round(depth * len(hay) / 100) for depth in DEPTHS]
        rows = [torch.cat((hay[:at], needle, hay[at:], needle)) for at in borders]
        found.append(torch.stack([*rows, torch.cat((part, needle))]))
    return torch.stack(found)


def _needle(number: int, vocabulary: Tensor, text: Tensor) -> Tensor:
    """Key and value of a probe, all different tokens."""
    draw, windows = generator("needle", number), text.unfold(0, KEY, 1)
    for _ in range(100 if len(vocabulary) >= KEY + VALUE else 0):
        needle = vocabulary[draw.permutation(len(vocabulary))[: KEY + VALUE].tolist()]
        if not (windows == needle[:KEY]).all(1).any():
            return needle
    raise ConfigError("train.needle: the held-out text has too few different tokens; set train.needle=0")


def probe_batches(
    text: Tensor,
    count: int,
    seq_len: int,
    micro_batch: int,
    mtp_depth: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """This rank's rows of `count` probes, `micro_batch` at a time: as many batches on every rank.

    Tensors are those of `data.loader.Loader.one_pass`, with the number in GROUPS for the source; only the
    value's tokens are labels. What lacks in the last batch is padding.
    """
    rows = probes(text, count, seq_len).flatten(0, 1)
    group = torch.arange(len(GROUPS)).repeat(count)
    for start in range(0, len(rows), micro_batch * world):
        first = start + rank * micro_batch
        own = rows[first : first + micro_batch]
        ids = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
        ids[: len(own)] = own
        real = torch.arange(micro_batch) < len(own)
        labels = torch.full_like(ids, -100)
        labels[: len(own), -VALUE - 1 : -1] = own[:, -VALUE:]
        sources = torch.full((micro_batch,), -1)
        sources[: len(own)] = group[first : first + micro_batch]
        yield {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.arange(seq_len).repeat(micro_batch, 1),
            "document_ids": (real.long() - 1).unsqueeze(1).repeat(1, seq_len),
            "next_ids": torch.full((micro_batch, seq_len, mtp_depth), -100),
            "sources": sources,
        }


@torch.no_grad()
def find_needles(
    engine: Engine,
    batches: Iterable[Batch],
    device: torch.device,
    mode: AttentionMode,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """What the model makes of `probe_batches`:

    needle_loss/<depth>   nats per value token with the needle after so many percent of the text
    needle_control        the same without a needle
    needle_accuracy       share of value tokens that are the likeliest, over all depths

    `reduce` adds up a 1-D fp64 tensor over ranks, each with rows of its own; it is called once.
    """
    tally = Tally(GROUPS, device)
    for batch in batches:
        inputs = {name: x.to(device) for name, x in batch.items()}
        source = inputs.pop("sources")
        scores = engine(inputs, mode=mode, return_scores=True).scores[0]
        tally.add(scores, source.unsqueeze(1).expand_as(scores.loss))
    tally.totals = reduce(tally.totals.flatten()).view_as(tally.totals)
    return tally.losses() | {"needle_accuracy": tally.accuracy(HIDDEN) or 0.0}
