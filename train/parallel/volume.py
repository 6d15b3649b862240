"""What all ranks together send in one optimizer step, by purpose, from shapes alone.

The unit: bytes of the tensors that ranks put into collectives, summed over all ranks. What a ring or a tree
makes of them is the library's business (an all-gather brings its input to n - 1 ranks), and what an
all-to-all leaves on its rank counts, too, so that the sums hold for any routing. Groups of one rank send
nothing. Formulas: train/README.md, "What travels".

Legend: W ranks, M micro-batches of a step, N tokens, b bytes of a number in the compute dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from model.attention import Attention
from model.compressor import Compressor
from model.layout import build_layout
from model.model import ForCausalLM
from train.config import RunConfig
from train.parallel.context import context_of
from train.parallel.dense import DenseShards, sharded_names
from train.parallel.expert import share_experts
from train.parallel.mesh import Mesh
from train.zero import SHARDED, partition


class Step:
    """One step of `config` on a mesh, whose groups may be missing. Its methods yield (purpose, bytes)."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config, self.mesh, train = config, mesh, config.train
        with torch.device("meta"):
            self.model = ForCausalLM(config.model)
        share_experts(self.model, mesh)
        self.rows = -(-train.batch_tokens // (train.seq_len * mesh.data_world))  # on a rank, padding included
        self.micro_batches = -(-self.rows // train.micro_batch)
        self.dtype = getattr(torch, config.precision.compute_dtype)
        self.repeats = config.recompute != "none"  # all that selective recomputation does not keep
        self.repeats_experts = config.recompute == "full"
        self.trains = "model" in config.trained_sets

    def experts(self) -> Iterator[tuple[str, int]]:
        """Rows go and come back, in forward and in backward; weights go; counts go in forward only."""
        model, mesh, moes = self.config.model, self.mesh, len(self.model.moes())
        if mesh.ep_size == 1:
            return
        choices = moes * mesh.data_world * self.rows * self.config.train.seq_len * model.num_experts_per_tok
        again = self.repeats_experts
        yield (
            "expert rows",
            choices * model.hidden_size * self.dtype.itemsize * (2 + 2 * self.trains + 2 * again),
        )
        yield "expert weights", choices * 4 * (1 + self.trains + again)
        counts = moes * mesh.world * self.micro_batches * model.n_routed_experts
        yield "expert counts", counts * 8 * (1 + self.repeats)

    def context(self) -> Iterator[tuple[str, int]]:
        """Halos to the next part and gradients back; gathered rows, and as many gradients for every part."""
        mesh, model, seq_len = self.mesh, self.config.model, self.config.train.seq_len
        if mesh.cp_size == 1:
            return
        parts = context_of(mesh)
        slots = build_layout(model, torch.zeros(1, seq_len, device="meta"), context=parts).slots
        rows, size = mesh.world * self.rows, self.dtype.itemsize
        reaching = rows // mesh.cp_size * (mesh.cp_size - 1)  # rows with a part after this one

        def compressed(compressor: Compressor, kind: str, trained: bool) -> Iterator[tuple[str, int]]:
            own, width = slots[kind], compressor.position_bias.shape[1]
            made, channels = own.tokens.shape[1] - own.lead, compressor.kv_norm.weight.numel()
            yield "context halos", reaching * own.halo * 2 * width * size * (1 + self.repeats + trained)
            backward = trained * mesh.cp_size
            yield "context gathers", rows * made * channels * size * (1 + self.repeats + backward)

        for layer in self.model.modules():
            if not isinstance(layer, Attention):
                continue
            kind, kv = layer.layer_type, layer.channels * size
            yield "context halos", reaching * layer.window * kv * (1 + self.trains + self.repeats)
            if kind == "full_attention":
                tokens = seq_len // mesh.cp_size
                backward = self.trains * mesh.cp_size
                yield "context gathers", rows * tokens * kv * (1 + self.repeats + backward)
            if kind in slots:
                yield from compressed(layer.compressor, kind, self.trains)
            learns = self.config.indexer_loss
            if hasattr(layer, "indexer") and (self.config.attention_mode == "sparse" or learns):
                yield from compressed(layer.indexer.compressor, kind, learns)
        learned = sum(not moe.gate.is_hash for moe in self.model.moes())
        yield "context counts", rows * learned * 2 * (1 + model.n_routed_experts) * 8

    def states(self) -> Iterator[tuple[str, int]]:
        """Gradients to the ranks that update with them, between repeats, and updated weights back."""
        mesh, parallel, stage = self.mesh, self.config.parallel, self.config.zero_stage(self.mesh.world)
        sharded = set(sharded_names(self.model)) if parallel.shard_dense else set()
        arguments = self.model, self.config.optim, self.dtype, stage, sharded, mesh
        for group, layout in zip(*partition(*arguments), strict=True):
            sharing, trained = group["sharing"], group["set"] in self.config.trained_sets
            own = mesh.world * layout.size  # numbers of one partition on every rank
            if group["name"] == SHARDED:
                continue
            if sharing.holders > 1 and trained:
                yield "repeats", own * 4
            if sharing.size > 1:
                yield "weights", own * group["dtype"].itemsize
                rounded = sharing.name == "experts" and parallel.expert_gradients == "bfloat16"
                times = self.micro_batches if stage == 2 else 1
                flat = own * sharing.size - mesh.world * layout.filler  # which has no gradients
                yield f"gradients, {sharing.name}", trained * times * flat * (2 if rounded else 4)

    def shards(self) -> Iterator[tuple[str, int]]:
        """Layers' slices, gathered twice; their gradients; between slices and owners, once a step."""
        sharing, world, size = self.mesh.dense, self.mesh.world, self.dtype.itemsize
        if not self.config.parallel.shard_dense or sharing.size == 1:
            return
        for unit in DenseShards(self.model, sharing, self.dtype, torch.device("meta")).units:
            held = sum(place.shape.numel() for place in unit.places)
            yield "layers", 2 * self.micro_batches * world * unit.length * size
            yield "layers' gradients", self.micro_batches * world * sharing.size * unit.length * size
            yield "layers' owners", sharing.holders * held * (4 + size)
            if sharing.holders > 1:
                yield "repeats", world * unit.length * 4

    def sums(self) -> Iterator[tuple[str, int]]:
        """Label counts and loss sums, experts' loads, norms, and the updates' squares (logged steps)."""
        losses = 2 + bool(self.model.mtp) + self.config.indexer_loss
        loads = len(self.model.moes()) * self.config.model.n_routed_experts
        algorithms = 1 + (self.config.optim.name == "muon")
        norms = len(self.config.trained_sets)
        yield "other", self.mesh.world * 8 * (2 * losses + loads + norms + 2 * algorithms)


def volume(config: RunConfig, mesh: Mesh) -> dict[str, int]:
    """Purpose -> bytes of one step that is logged; of a mesh only the sizes are looked at."""
    found: Counter[str] = Counter()
    step = Step(config, mesh)
    parts = (step.experts, step.context, step.states, step.shards, step.sums)
    for purpose, count in (item for part in parts if mesh.world > 1 for item in part()):
        found[purpose] += count
    return {purpose: count for purpose, count in found.items() if count}
