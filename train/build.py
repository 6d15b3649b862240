"""What a configuration asks for: the mesh of so many ranks, and the engine on one of them."""

from __future__ import annotations

import torch

from model.init import initialize
from model.model import ForCausalLM
from train import recompute
from train.config import RunConfig
from train.engine import Engine, TorchEngine
from train.parallel.context import context_of
from train.parallel.mesh import Mesh, build_mesh
from train.ranks import Ranks
from train.zero import ZeroEngine, zero_ranks


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
