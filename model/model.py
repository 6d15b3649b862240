"""DeepSeek-V4 as one page: tokens -> streams -> layers -> losses.

Legend: B batch, S sequence, D hidden, N streams, V vocabulary, K experts per token, P prediction depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, AttentionMode, as_it_is
from model.block import DecoderLayer, stream_head
from model.config import ModelConfig
from model.fp8 import fp8_expert_mlp, fp8_linear
from model.indexer import Indexer
from model.layout import WholeSequence, build_layout, entry_readers, positions_from_documents
from model.linear import Linear, linear
from model.loss import TokenScores, linear_cross_entropy, token_cross_entropy
from model.moe import Experts, MoE, balance_loss, expert_mlp
from model.mtp import MultiTokenPredictor
from model.norm import RMSNorm
from model.precision import FP8_KINDS, Precision
from model.quant import stored_entry

LossPart = tuple[Tensor, Tensor]  # sum, count


def _call(block: Callable[..., Any], *inputs: Any) -> Any:
    return block(*inputs)


@dataclass(frozen=True)
class ModelOutput:
    """`losses`: part -> (sum, count), so that uneven ranks and micro-batches add up exactly.

    lm and mtp are sums of nats over labels, balance a sum over layers and real tokens, indexer one of nats
    over CSA layers and the real queries that see an entry, with their number over layers.
    `expert_indices`: [B, S, K] for every MoE, layers first, then MTP blocks (as `ForCausalLM.moes`).
    `scores`: [B, S] where asked for, of the next token, then of every MTP block's.
    """

    losses: dict[str, LossPart] = field(default_factory=dict)
    expert_indices: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None  # [B, S, V]
    scores: list[TokenScores] = field(default_factory=list)


class ForCausalLM(nn.Module):
    """The whole model. Parameters are empty until `model.init.initialize` or a checkpoint fills them."""

    around: Callable[..., Any] = staticmethod(_call)  # runs layers and MTP blocks: (block, *inputs)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.context = WholeSequence()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_type, mlp_type)
            for layer_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True)
        )
        self.hc_head = stream_head(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MultiTokenPredictor(config) for _ in range(config.num_nextn_predict_layers))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        next_ids: Tensor | None = None,
        *,
        mode: AttentionMode = "sparse",
        replay: Sequence[Tensor | None] | None = None,
        indexer_loss: bool = False,
        return_logits: bool | None = None,
        return_scores: bool = False,
        return_losses: bool = True,
    ) -> ModelOutput:
        """input_ids [B, S] -> losses where `labels` [B, S] are given, else logits.

        `labels` are the next tokens, already shifted, -100 ignored. Packed documents: `document_ids`
        [B, S], contiguous, negative on padding; `position_ids` [B, S] restart in each (derived from the
        documents if absent). `next_ids` [B, S, P]: token t + 2 + k of the same document or -100
        (derived from labels if absent). `replay`: expert indices [B, S, K] to use, one per MoE.
        `return_scores`: losses token by token as well, which then have no gradients. Without `return_losses`
        the labels are read by MTP blocks alone: for who is routed where.
        `indexer_loss`: also what the indexers of CSA layers learn from, the only loss that moves them.

        Under context parallelism all arguments but `replay` are whole rows; what is computed and returned is
        the part of `self.context`.
        """
        if position_ids is None:
            position_ids = positions_from_documents(
                torch.zeros_like(input_ids) if document_ids is None else document_ids
            )
        layout = build_layout(self.config, position_ids, document_ids, self.context)
        input_ids = self.context.part(input_ids)
        choices = list(replay) if replay is not None else [None] * len(self.moes())
        routings, divergences = [], []
        streams = (
            self.embed_tokens(input_ids).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        )  # [B, S, N, D]
        for layer, choice in zip(self.layers, choices, strict=False):
            streams, routing, divergence = self.around(
                layer, streams, layout, input_ids, mode, _flat(choice), indexer_loss and labels is not None
            )
            routings.append(routing)
            divergences += [] if divergence is None else [divergence]
        hidden = self.norm(self.hc_head(streams))  # [B, S, D]

        losses: dict[str, LossPart] = {}
        cross_entropy = self._cross_entropy if return_losses else _no_loss
        scores: list[TokenScores] | None = [] if return_scores else None
        if labels is not None:
            losses["lm"] = cross_entropy(hidden, self.context.part(labels), scores)
            if self.mtp:
                further = further_ids(labels, len(self.mtp)) if next_ids is None else next_ids
                targets = [self.context.part(ids) for ids in (labels, *further.unbind(-1))]
                parts = []
                for depth, (mtp, choice) in enumerate(
                    zip(self.mtp, choices[len(self.layers) :], strict=True)
                ):
                    ids = targets[depth].clamp(min=0)
                    streams, predicted, routing = self.around(
                        mtp, streams, self.embed_tokens(ids), layout, ids, _flat(choice)
                    )
                    routings.append(routing)
                    parts.append(cross_entropy(predicted, targets[depth + 1], scores))
                losses["mtp"] = _add(parts)
            learned = [r for r, moe in zip(routings, self.moes(), strict=True) if not moe.gate.is_hash]
            balance = [balance_loss(routing, layout) for routing in learned if return_losses]
            losses["balance"] = (
                sum(balance, input_ids.new_zeros((), dtype=torch.float32)),
                layout.real.sum(),
            )
            if divergences:
                count = entry_readers(self.config, layout.positions, layout.real)
                losses["indexer"] = torch.stack(divergences).sum(), count
        wanted = labels is None if return_logits is None else return_logits
        return ModelOutput(
            losses=losses if return_losses else {},
            expert_indices=[r.indices.view(*input_ids.shape, -1) for r in routings],
            logits=F.linear(hidden, self.lm_head.weight.to(hidden.dtype)) if wanted else None,
            scores=scores or [],
        )

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, scores: list[TokenScores] | None) -> LossPart:
        """Of the output head; with `scores` without gradients, and token by token added to them."""
        if scores is None:
            return linear_cross_entropy(hidden, self.lm_head.weight, labels)
        part, tokens = token_cross_entropy(hidden, self.lm_head.weight, labels)
        scores.append(tokens)
        return part

    def moes(self) -> list[MoE]:
        """Every MoE in the order of `ModelOutput.expert_indices`."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def use(self, precision: Precision) -> ForCausalLM:
        """Have all products computed in what `precision` says, from now on."""
        rotated = self.config.qk_rope_head_dim
        for module in self.modules():
            if isinstance(module, Linear):
                eight = precision.fp8 and module.kind in FP8_KINDS
                module.product = fp8_linear if eight else linear
            elif isinstance(module, Experts):
                module.mlp = fp8_expert_mlp if precision.fp8 else expert_mlp
            elif isinstance(module, Attention):
                module.stored = partial(stored_entry, rotated=rotated) if precision.fp8_kv else as_it_is
            elif isinstance(module, Indexer):
                module.fp4 = precision.fp4_indexer
        return self

    def cast(self, dtype: torch.dtype) -> ForCausalLM:
        """Cast the weights of large products to `dtype`, in place; what recipes keep in fp32 stays.

        fp32 stay: routers, hyper-connections, norms, sinks, position biases (V4 report, on mixed precision).
        """
        for name, parameter in self.named_parameters():
            if not stays_fp32(name):
                parameter.data = parameter.data.to(dtype)
        return self


def stays_fp32(name: str) -> bool:
    """Whether the parameter of this full name is computed with in fp32 whatever the compute dtype."""
    parts = name.split(".")
    is_norm = parts[-2].endswith("norm") if len(parts) > 1 else False
    in_fp32_module = any(part in ("gate", "attn_hc", "ffn_hc", "hc_head") for part in parts)
    return is_norm or in_fp32_module or parts[-1] in ("sinks", "position_bias")


def further_ids(labels: Tensor, depth: int) -> Tensor:
    """Targets of the MTP blocks from labels [B, S] alone -> [B, S, depth]; -100 beyond a document's end."""
    further, current = [], labels
    for _ in range(depth):
        following = F.pad(current[:, 1:], (0, 1), value=-100)
        current = torch.where(labels == -100, -100, following)
        further.append(current)
    return torch.stack(further, dim=-1)


def _no_loss(hidden: Tensor, labels: Tensor, scores: list[TokenScores] | None) -> LossPart:
    return hidden.new_zeros(()), labels.new_zeros(())


def _add(parts: list[LossPart]) -> LossPart:
    sums, counts = zip(*parts, strict=True)
    return torch.stack(sums).sum(), torch.stack(counts).sum()


def _flat(choice: Tensor | None) -> Tensor | None:
    return None if choice is None else choice.flatten(0, 1)
