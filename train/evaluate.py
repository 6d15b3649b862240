"""Validation: the same held-out sequences every time, and a look into the model on the first of them.

Beside the mean losses: losses by source and by position, and how often the likeliest token is the right one.

The look records the inputs of a few methods while a batch passes; the model knows nothing of it.

Legend: B batch, S sequence, N streams, D hidden, H heads, C head_dim, T compressed slots, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention, AttentionMode
from model.hyper_connection import HyperConnection, Mix
from model.kernels.attention import Seen
from model.layout import Layout
from model.loss import TokenScores
from model.model import ForCausalLM
from model.norm import rms_norm, widen
from model.rope import apply_rope
from train.engine import Batch, Engine
from train.tally import POSITIONS, Tally, position_group

PARTS = ("lm", "mtp", "indexer")
MEANS = (*PARTS, "accuracy", "mtp_accuracy")  # metrics of these names get the prefix valid_
RECALLS = ("indexer_recall", "indexer_recall_best", "indexer_fp4_recall")
QUERIES = 2048  # of one layer whose attention is computed in full for the indexer's recall
LOGIT_BUDGET = 1 << 24  # numbers that such a computation holds at once


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    device: torch.device,
    mode: AttentionMode,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    look: bool = True,
    indexer_loss: bool = False,
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Means over the labels of `batches`, which are `data.loader.Loader.one_pass`'s of these `sources`:

    lm, mtp                  loss in nats of the next token, and of MTP blocks where the model has them
    indexer                  with `indexer_loss`, the divergence of the indexer from attention, in nats
    lm/<source>, lm/at_<n>   of the next token by source, if there are several, and by `position_group`
    accuracy, mtp_accuracy   share of labels that are the likeliest token

    `reduce` adds up a 1-D fp64 tensor over ranks, each with batches of its own; it is called once. With
    `look` (on one rank: nothing of it is reduced) also what `watched` finds in the first batch.
    """
    totals = torch.zeros(2 * len(PARTS), dtype=torch.float64, device=device)  # sums, then counts
    tallies = [Tally(sources, device), Tally(POSITIONS, device), Tally(("mtp",), device)]
    found: dict[str, float] = {}
    for number, batch in enumerate(batches):
        inputs = {name: x.to(device) for name, x in batch.items()}
        source = inputs.pop("sources", None)
        with watched(engine.model, found) if look and number == 0 else nullcontext():
            output = engine(inputs, mode=mode, indexer_loss=indexer_loss, return_scores=True)
        losses = output.losses
        _count(tallies, output.scores, engine.model.context.part(inputs["position_ids"]), source)
        for i, part in enumerate(PARTS):
            if part in losses:
                totals[i] += losses[part][0]
                totals[i + len(PARTS)] += losses[part][1]
    values = reduce(torch.cat((totals, *(tally.totals.flatten() for tally in tallies)))).cpu()
    sums, counts = values[: 2 * len(PARTS)].view(2, -1).tolist()
    means = {part: total / count for part, total, count in zip(PARTS, sums, counts, strict=True) if count}
    sizes = [tally.totals.numel() for tally in tallies]
    for tally, whole in zip(tallies, values[2 * len(PARTS) :].split(sizes), strict=True):
        tally.totals = whole.view_as(tally.totals)
    return means | _means_of(*tallies) | found


def _count(tallies: list[Tally], scores: list[TokenScores], positions: Tensor, source: Tensor | None) -> None:
    """Add a batch's scores to those by source, by position and of MTP; positions [B, L], source [B]."""
    by_source, by_position, mtp = tallies
    following, *further = scores
    by_position.add(following, position_group(positions))
    if source is not None and len(by_source.groups) > 1:
        by_source.add(following, source.unsqueeze(1).expand_as(positions))
    for predicted in further:
        mtp.add(predicted, torch.zeros_like(positions))


def _means_of(by_source: Tally, by_position: Tally, mtp: Tally) -> dict[str, float]:
    means = {f"lm/{group}": loss for group, loss in {**by_source.losses(), **by_position.losses()}.items()}
    accuracies = {"accuracy": by_position.accuracy(), "mtp_accuracy": mtp.accuracy()}
    return means | {name: share for name, share in accuracies.items() if share is not None}


@contextmanager
def watched(model: ForCausalLM, found: dict[str, float]) -> Iterator[None]:
    """Put into `found` what the batch says that passes through `model` meanwhile:

    hc_row_error, hc_spectral_norm   of the hyper-connections' mixing, first row (`mixing_errors`)
    stream_norm/<i>                  root mean square of residual stream i before the head
    indexer_recall/<layer>           and indexer_recall_best/<layer>, of every CSA layer (`indexer_recall`);
                                     means over layers without `/<layer>`; absent where nothing is selected
                                     and where ranks share sequences: it would take all of them
    indexer_fp4_recall/<layer>       share of what the indexer would select without rounding that it selects
                                     with FP4, where it rounds; its mean likewise

    Of sequences that ranks share this is about the part held here.
    """
    combs: list[Tensor] = []
    norms: list[Tensor] = []
    recalls: dict[str, Tensor] = {}
    with ExitStack() as stack:

        def watch(owner: nn.Module, method: str, see: Callable[..., None]) -> None:
            stack.enter_context(_observed(owner, method, see))

        watch(model.hc_head, "forward", lambda _, streams: norms.append(_rms_of_streams(streams)))
        for module in model.modules():
            if isinstance(module, HyperConnection):
                watch(module, "leave", lambda _, output, streams, mix: combs.append(_first_comb(mix)))
        for number, layer in enumerate(model.layers):
            attention = layer.self_attn
            shared = model.context.size > 1
            if isinstance(attention, Attention) and hasattr(attention, "indexer") and not shared:
                watch(attention, "_far", _recall_into(recalls, str(number), attention))
        yield
    found |= mixing_errors(combs)
    found |= {f"stream_norm/{i}": norm for i, norm in enumerate(norms[0].tolist())}
    if recalls:
        for kind, values in zip(RECALLS, torch.stack(list(recalls.values()), dim=1)):
            found[kind] = float(values.mean())
            found |= {f"{kind}/{layer}": value for layer, value in zip(recalls, values.tolist(), strict=True)}


@contextmanager
def _observed(owner: nn.Module, name: str, see: Callable[..., None]) -> Iterator[None]:
    """Meanwhile every call of the method `owner.name` is followed by `see(result, *arguments)`."""
    method, own = getattr(owner, name), vars(owner).get(name)

    def call(*args: Any) -> Any:
        result = method(*args)
        see(result, *args)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:  # such as a compiled one
            setattr(owner, name, own)


def _rms_of_streams(streams: Tensor) -> Tensor:
    """[B, S, N, D] -> [N]."""
    return widen(streams).square().mean((0, 1, 3)).sqrt()


def _first_comb(mix: Mix) -> Tensor:
    """The mixing matrices of the first row, [S, N, N]."""
    return mix[1][0].float()


def mixing_errors(combs: list[Tensor]) -> dict[str, float]:
    """How far mixing matrices [S, N, N] are from doubly stochastic: the largest |row sum - 1| and norm.

    Columns are exact by construction. A spectral norm of 1 means that mixing never amplifies the streams.
    """
    if not combs:
        return {}
    comb = torch.cat(combs)
    squared = torch.linalg.eigvalsh((comb.mT @ comb).cpu())[..., -1]  # cuSOLVER fails on so many
    return {
        "hc_row_error": float((comb.sum(-1) - 1).abs().max()),
        "hc_spectral_norm": float(squared.max().sqrt()),
    }


def _recall_into(recalls: dict[str, Tensor], layer: str, attention: Attention) -> Callable[..., None]:
    """What to do after `attention._far`: put the recall of its indexer into `recalls[layer]`."""

    def see(
        far: tuple[Tensor, Seen, Any],
        x: Tensor,
        q_latent: Tensor,
        kv: Tensor,
        layout: Layout,
        mode: str,
        indexer_loss: bool,
    ) -> None:
        entries, seen, _ = far
        slots, indexer = layout.slots[attention.layer_type], attention.indexer
        inputs = x, q_latent, slots, layout.rotations["compress"]
        # In other modes, what the indexer would select.
        selected = seen.mask(entries.shape[1]) if mode == "sparse" else indexer(*inputs)
        if (recall := indexer_recall(attention, q_latent, kv, entries, selected, layout)) is not None:
            if indexer.fp4:
                indexer.fp4 = False
                exact = indexer(*inputs)
                indexer.fp4 = True
                contested = ((slots.visible().sum(-1) > indexer.topk) & layout.real).unsqueeze(-1) & exact
                recall = torch.cat((recall, ((selected & contested).sum() / contested.sum()).view(1)))
            recalls[layer] = recall

    return see


def indexer_recall(
    attention: Attention, q_latent: Tensor, kv: Tensor, entries: Tensor, selected: Tensor, layout: Layout
) -> Tensor | None:
    """Share of the true attention to compressed entries that goes to the `selected` [B, S, T] ones.

    Returns it with the share of the best possible selection of as many, [2] fp64. True is a softmax over the
    window, all visible entries and the sink; it is summed over heads and normalised over visible entries.
    Only queries count that see more than top-k entries, at most QUERIES of them, evenly spaced over the
    batch; None without any. q_latent [B, S, q_lora_rank], kv [B, S, C], entries [B, T, C] of a CSA layer.
    """
    visible, topk = layout.slots[attention.layer_type].visible(), attention.indexer.topk
    contested = ((visible.sum(-1) > topk) & layout.real).nonzero()  # [n, 2] row, token
    if not len(contested):
        return None
    count = min(len(contested), QUERIES)
    picked = contested[torch.arange(count, device=kv.device) * len(contested) // count]
    held = torch.zeros(2, dtype=torch.float64, device=kv.device)
    reached = attention.window + entries.shape[1] + 1
    chunk = max(1, LOGIT_BUDGET // (attention.heads * reached + attention.window * attention.channels))
    for row in range(len(kv)):
        cos, sin = (part[row] for part in layout.rotations["compress"])
        for at in picked[picked[:, 0] == row, 1].split(chunk):
            q = attention.q_b_proj(q_latent[row, at]).unflatten(-1, (attention.heads, attention.channels))
            q = apply_rope(rms_norm(q, eps=attention.eps), (cos[at].unsqueeze(1), sin[at].unsqueeze(1)))
            back = torch.arange(attention.window, device=at.device)  # how far each token of a window is
            window = kv[row, (at.unsqueeze(1) - back).clamp(min=0)]  # [n, W, C]
            near = back <= layout.positions[row, at].unsqueeze(1)
            mass = _entry_mass(q, window, near, entries[row], visible[row, at], attention.sinks)
            held[0] += (mass * selected[row, at]).sum()
            held[1] += mass.topk(topk).values.sum()
    return held / count


def _entry_mass(
    q: Tensor, window: Tensor, near: Tensor, entries: Tensor, visible: Tensor, sinks: Tensor
) -> Tensor:
    """What queries [n, H, C] give to each entry, summed over heads, over what they give to all -> [n, T].

    window [n, W, C] with near [n, W] bool; entries [T, C] with visible [n, T] bool; sinks [H].
    """
    q = widen(q) * q.shape[-1] ** -0.5
    logits = torch.cat((q @ widen(window).mT, q @ widen(entries).mT), dim=-1)  # [n, H, W + T]
    logits = logits.masked_fill(~torch.cat((near, visible), dim=-1).unsqueeze(1), -torch.inf)
    sink = widen(sinks).view(1, -1, 1).expand(len(q), -1, 1)
    p = torch.cat((logits, sink), dim=-1).softmax(dim=-1)
    mass = p[..., near.shape[1] : -1].sum(1)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
