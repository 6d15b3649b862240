"""Meshes, the cap of ZeRO groups, and rounding: what can be seen without processes."""

from __future__ import annotations

import pytest
import torch

from configs.compose import compose
from configs.errors import ConfigError
from model.model import ForCausalLM
from optim.groups import build_groups
from tests.tiny import relative
from train.parallel.expert import round_stochastically
from train.parallel.mesh import Mesh
from train.zero import MOST_FILLER, dense_filler, zero_ranks


def test_places() -> None:
    """World 8, ep 4, cp 2, zero 2."""
    meshes = [Mesh(rank, 8, ep_size=4, cp_size=2, zero_size=2) for rank in range(8)]
    assert [mesh.ep_rank for mesh in meshes] == [0, 1, 2, 3] * 2
    assert [mesh.experts.rank for mesh in meshes] == [0] * 4 + [1] * 4
    assert [mesh.data_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(mesh.dense.rank, mesh.dense.holder) for mesh in meshes] == [(r % 2, r // 2) for r in range(8)]
    assert [mesh.first_expert(32) for mesh in meshes] == [0, 8, 16, 24] * 2
    assert {mesh.dense.holders for mesh in meshes} == {4} and {mesh.experts.holders for mesh in meshes} == {1}


@pytest.mark.parametrize(("name", "expected"), [("v4_flash", 32), ("v4_pro", 64)])
def test_zero_groups_are_capped_at_512_ranks(name: str, expected: int) -> None:
    config = compose([f"model={name}", "data=python_v4"])
    with torch.device("meta"):
        model = ForCausalLM(config.model)
    groups = build_groups(model.named_parameters(), config.model, config.optim)
    size = zero_ranks(model, config.optim, 512)
    assert size == expected
    assert dense_filler(groups, size) < MOST_FILLER <= dense_filler(groups, 2 * size)
    assert zero_ranks(model, config.optim, 24) == 24


@pytest.mark.parametrize(
    ("options", "world", "names"),
    [
        (["parallel=ep2"], 1, ["parallel.ep", "divisor of the number of ranks, 1"]),
        (["parallel.ep=3"], 3, ["parallel.ep", "model.n_routed_experts"]),
        (["parallel=cp8"], 4, ["parallel.cp", "divisor of the number of ranks, 4"]),
        (["parallel.zero_ranks=3"], 4, ["parallel.zero_ranks", "divisor"]),
        (["parallel=single"], 2, ["parallel.engine", "parallel=zero"]),
        (
            ["train.micro_batch=1"],
            16,
            ["train.batch_tokens", "fewer than the 16 ranks", "8192", "parallel.cp"],
        ),
    ],
)
def test_impossible_meshes(options: list[str], world: int, names: list[str]) -> None:
    config = compose(options)
    with pytest.raises(ConfigError) as error:
        config.check_ranks(world)
    line = str(error.value)
    assert "\n" not in line and all(name in line for name in names), line


def test_possible_meshes() -> None:
    for options, world in (
        (["parallel=ep2"], 4),
        (["parallel=ep8_cp4", "train.seq_len=1024", "train.micro_batch=4"], 8),
    ):
        compose(options).check_ranks(world)


def test_rounding_has_the_exact_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(500) * 10 ** torch.linspace(-20, 20, 500)
    rounded = torch.stack([round_stochastically(x) for _ in range(4000)])
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float().mean(0), x) < 2e-4 < relative(rounded[0], x) < 4e-3
    near = torch.stack((x.bfloat16().nextafter(torch.tensor(torch.inf).bfloat16()), x.bfloat16()))
    assert ((rounded[0] - x).abs() <= 2 * (near[0] - near[1]).abs().float()).all()
    assert torch.equal(round_stochastically(x.bfloat16().float()), x.bfloat16())  # exact ones stay
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert (
        torch.equal(round_stochastically(odd).float()[:2], odd[:2]) and round_stochastically(odd)[2].isnan()
    )
