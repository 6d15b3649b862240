"""Predicted memory: the tracker by hand, states and activations against engines that were really built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import model.kernels.attention
import model.kernels.indexer
import train.memory
from configs.compose import compose
from configs.errors import ConfigError
from model.hyper_connection import HyperConnection
from model.init import initialize
from model.model import ForCausalLM
from model.precision import NAMED
from tests.distributed.ranks import spawn
from tests.tiny import packed_batch, tiny_config
from train import recompute
from train.config import RunConfig
from train.engine import Engine, TorchEngine
from train.loop import loss_weights
from train.memory import WORKSPACES, Memory, MemTracker, micro_batch_peak, predict, refuse_if_too_large, table
from train.parallel.mesh import Mesh, build_mesh
from train.ranks import Ranks
from train.sections import ParallelConfig, PrecisionConfig

QUICK: dict[str, Any] = {"num_nextn_predict_layers": 0, "hc_sinkhorn_iters": 1}
LENGTH = 160  # ids of two rows fill blocks of 512 bytes
EVERY_KIND = "schf"


@cache
def base() -> RunConfig:
    return replace(compose(["optim.warmup_steps=1"]), parallel=ParallelConfig(engine="torch"))


def run_config(
    layers: str = EVERY_KIND,
    dtype: str = "float32",
    rows: int = 2,
    steps: int = 2,
    precision: str = "bf16",
    **changes: Any,
) -> RunConfig:
    """A run of tiny layers, `rows` in each of `steps` micro-batches; `changes` are the model's."""
    few = {"num_nextn_predict_layers": 1, "hc_sinkhorn_iters": 3}
    tiny = tiny_config(layers, 2, **{**few, **changes})
    train = replace(base().train, seq_len=LENGTH, micro_batch=rows, batch_tokens=steps * rows * LENGTH)
    data = replace(
        base().data, tokenizer=replace(base().data.tokenizer, kind="file", path="x", vocab_size=90)
    )
    return replace(
        base(),
        model=tiny,
        train=train,
        data=data,
        precision=PrecisionConfig("x", dtype, **vars(NAMED[precision])),
    )


def engine_for(config: RunConfig) -> Engine:
    dtype = getattr(torch, config.precision.compute_dtype)
    model = recompute.apply(initialize(ForCausalLM(config.model), 0), config.train.recompute)
    engine = TorchEngine(model, config.optim, dtype, fp4_experts=config.fp4_experts)
    engine.use(config.precision.at(0))
    return engine


def one_micro_batch(engine: Engine, config: RunConfig, last: bool = True) -> None:
    rows = [[100, 30], [5, 60, 41, 2]]
    batch = packed_batch(
        rows[: config.train.micro_batch], LENGTH, depth=config.model.num_nextn_predict_layers
    )
    engine.activate(config.trained_sets)
    losses = engine(batch, mode=config.attention_mode, indexer_loss=config.indexer_loss).losses
    trained = [loss for part, (loss, _) in losses.items() if part in loss_weights(config, 0)]
    engine.backward(torch.stack(trained).sum(), last)


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def test_tracker_by_hand() -> None:
    tracker = MemTracker("meta")
    with tracker:
        a = torch.empty(1000, device="meta")  # 4000 bytes: 8 blocks of 512
        view = a.view(10, 100)[2:]
        torch.zeros(10_000)  # another device
        a += 1
        assert tracker.live == tracker.peak == 4096
        parts = torch._foreach_mul([a, view], 2)  # 4000 and 3200 bytes
        assert tracker.live == 4096 + 4096 + 3584
        del a, parts
        assert tracker.live == 4096  # the view holds all of it
        b = view + 1
        assert (tracker.live, tracker.peak) == (4096 + 3584, 4096 + 4096 + 3584)
        assert tracker.restart() == tracker.peak == 4096 + 3584
        del view
        assert tracker.live == 3584
    del b
    assert tracker.live == 0


def test_tracker_sees_what_backward_holds() -> None:
    x = torch.ones(128, requires_grad=True)
    with MemTracker("cpu") as tracker:
        y = x.exp().sin()  # 512 bytes each; exp keeps its result, sin its input, which is the same
        assert tracker.live == 1024
        y.backward(torch.ones(128))
        # The gradients of y and exp(x) and the one that stays, but cos, too, for a moment.
        assert tracker.peak == 5 * 512
        del y
        assert tracker.live == 512


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("dtype", "train"),
    [
        ("float32", {}),
        ("bfloat16", {"indexer_loss_weight": 0.0}),
        ("bfloat16", {"attention_mode": "warmup"}),
    ],
)
def test_states_are_those_of_an_engine(dtype: str, train: dict[str, Any], optimizer: str) -> None:
    config = run_config(dtype=dtype)
    config = replace(config, train=replace(config.train, **train))
    config = replace(config, optim=replace(config.optim, name=optimizer))
    memory = predict(config)
    with MemTracker("cpu") as tracker:
        engine = engine_for(config)
    assert isinstance(engine, TorchEngine)
    assert memory.build + memory.masters == pytest.approx(tracker.peak, rel=0.1)
    one_micro_batch(engine, config)
    assert memory.weights == nbytes(engine.model.parameters()) + nbytes(engine.model.buffers())
    weights = {id(parameter) for parameter in engine.model.parameters()}
    assert memory.masters == nbytes(m for m in engine.masters.values() if id(m) not in weights)
    assert memory.gradients == nbytes(master.grad for master in engine.masters.values())
    engine.step(0.01)
    kept = [x for state in engine.optimizer.state.values() for key, x in state.items() if key != "step"]
    assert memory.moments == nbytes(kept)
    assert memory.states == memory.weights + memory.masters + memory.gradients + memory.moments
    assert (memory.masters == 0) == (dtype == "float32")


DTYPES = ["float32", "bfloat16"]
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [  # of the model, of `train`, in which dtypes
    ({}, {}, DTYPES),
    ({}, {"attention_mode": "warmup"}, DTYPES[:1]),
    ({"index_n_heads": 100}, {"attention_mode": "dense"}, DTYPES[1:]),  # the indexer needs most of all
    # It would, but rests.
    ({"index_n_heads": 4096}, {"attention_mode": "dense", "indexer_loss_weight": 0.0}, DTYPES[:1]),
    ({"residual": "plain", "hc_mult": 1}, {}, DTYPES[1:]),
    (
        {"num_nextn_predict_layers": 2, "n_shared_experts": 2, "n_routed_experts": 12},
        {"indexer_loss_weight": 0.0},
        DTYPES[1:],
    ),
]


def recomputing(config: RunConfig, how: str) -> RunConfig:
    return replace(config, train=replace(config.train, recompute=how))


@pytest.mark.parametrize("how", recompute.HOW)
@pytest.mark.parametrize(
    ("changes", "train", "dtype"),
    [(changes, train, dtype) for changes, train, dtypes in CASES for dtype in dtypes],
)
def test_activations_are_those_of_real_tensors(
    changes: dict[str, Any], train: dict[str, Any], dtype: str, how: str
) -> None:
    """The second micro-batch of a real engine, packed documents and all, under the same tracker."""
    config = recomputing(run_config(dtype=dtype, **changes), how)
    config = replace(config, train=replace(config.train, **train))
    with MemTracker("cpu") as tracker:
        engine = engine_for(config)
        one_micro_batch(engine, config)
        before = tracker.restart()
        one_micro_batch(engine, config)
    batch = (4 + config.model.num_nextn_predict_layers) * 8 * config.train.micro_batch * LENGTH
    assert tracker.peak - before == predict(config).activations + batch


@pytest.mark.parametrize("how", recompute.HOW)
def test_recomputed_attention(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(model.kernels.attention, "LOGIT_BUDGET", 30_000)  # three blocks of queries at once
    monkeypatch.setattr(model.kernels.indexer, "SCORE_BUDGET", 30_000)
    test_activations_are_those_of_real_tensors({}, {}, "bfloat16", how)


@pytest.mark.parametrize(("precision", "how"), [("fp8", "none"), ("fp4_qat", "selective")])
def test_rounded_numbers(precision: str, how: str) -> None:
    """References of FP8 and FP4 on a CPU."""
    config = recomputing(run_config("ch", "bfloat16", precision=precision), how)
    with MemTracker("cpu") as tracker:
        engine = engine_for(config)
        one_micro_batch(engine, config)
        before = tracker.restart()
        one_micro_batch(engine, config)
    batch = 5 * 8 * config.train.micro_batch * LENGTH
    assert tracker.peak - before == predict(config).activations + batch


def test_recomputing_needs_less_and_less() -> None:
    needs = [predict(recomputing(run_config("schc"), how)).activations for how in recompute.HOW]
    assert needs == sorted(needs, reverse=True) and needs[2] < needs[1] < 0.8 * needs[0]


@pytest.mark.parametrize("how", recompute.HOW)
def test_depth_is_extrapolated_exactly(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    config = recomputing(run_config("sschchcchhchc", **QUICK), how)
    kinds = list(zip(config.model.layer_types, config.model.mlp_layer_types, strict=True))
    whole = micro_batch_peak(config, kinds)
    depths = []

    def recorded(config: RunConfig, kinds: Sequence[tuple[str, str]], *options: Any) -> int:
        depths.append(len(kinds))
        return micro_batch_peak(config, kinds, *options)

    monkeypatch.setattr(train.memory, "micro_batch_peak", recorded)
    assert predict(config).activations == whole
    assert depths == [4, 5, 5]  # the first, and the last of each kind; then one more of c and of h


def test_compiled_streams_keep_what_is_predicted() -> None:
    """What backward keeps of `enter` partitioned for a compiler, and of its stand-in with one iteration."""
    kept = []
    for iterations, compiled in ((20, True), (1, False), (20, False)):
        streams = HyperConnection(4, 512, iterations, 1e-6, 1e-6)
        for parameter in streams.parameters():
            torch.nn.init.normal_(parameter)
        enter = torch.compile(streams.enter, backend="aot_eager_decomp_partition")
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            x = torch.randn(1, 256, 4, 512, dtype=torch.bfloat16, requires_grad=True)
            result = enter(x) if compiled else streams.enter(x)
        kept.append(sum(saved.values()))
        del result
    assert kept[1] == pytest.approx(kept[0], rel=0.02)
    assert kept[2] > 1.2 * kept[0]  # otherwise there is nothing to stand in for


def test_compiling_is_predicted() -> None:
    eager = run_config()
    compiled = replace(eager, train=replace(eager.train, compile=True))
    one = run_config(hc_sinkhorn_iters=1)
    assert predict(compiled).activations == predict(one).activations < predict(eager).activations


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_scratch_is_that_of_an_optimizer(optimizer: str) -> None:
    """Of a large model, all of whose matrices are there; so most of Muon's come in several chunks."""
    config = run_config(
        "cccc",
        "bfloat16",
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_routed_experts=20,
        vocab_size=30_000,
    )
    config = replace(config, optim=replace(config.optim, name=optimizer))
    with MemTracker() as tracker:
        with torch.device("meta"):
            engine = TorchEngine(ForCausalLM(config.model), config.optim, torch.bfloat16)
        engine.activate(config.trained_sets)
        for master in engine.masters.values():
            master.grad = torch.zeros_like(master)
        engine.optimizer.measure = True
        engine.optimizer.step()  # makes the moments
        before = tracker.restart()
        engine.optimizer.step()
    assert predict(config).scratch == pytest.approx(tracker.peak - before, rel=0.002)


def test_ranks_share_all_but_weights_and_activations() -> None:
    config = replace(run_config(dtype="bfloat16", steps=8, n_routed_experts=64), parallel=ParallelConfig())
    one, four = predict(config), predict(config, zero_over(4))
    assert four.activations == one.activations
    for shared, whole in ((four.weights, one.weights), (4 * four.masters, one.masters)):
        assert whole <= shared < 1.1 * whole  # filler
    assert one.moments <= 4 * four.moments < 1.1 * one.moments
    assert four.gradients < one.gradients / 3.6 and four.accumulates
    assert not predict(config, zero_over(8)).accumulates
    assert predict(config, zero_over(4), buckets=1000).total == four.total + 1000


def zero_over(world: int) -> Mesh:
    return Mesh(0, world, zero_size=world)


def zero_peak(ranks: Ranks, ep: str = "1", how: str = "none", dense: str = "") -> None:
    """Prints this rank's peak of two steps and that of start-up, in bytes, and once what was predicted."""
    from train.zero import ZeroEngine

    shared = ParallelConfig(ep=int(ep), shard_dense=bool(dense))
    config = recomputing(run_config(dtype="bfloat16", n_routed_experts=200), how)
    config = replace(config, parallel=shared)
    mesh = build_mesh(ranks.rank, ranks.world, shared.ep)
    with MemTracker("cpu") as tracker:
        with torch.device("meta"):
            model = recompute.apply(ForCausalLM(config.model), config.recompute)
        engine = ZeroEngine(
            model,
            config.optim,
            torch.bfloat16,
            stage=config.zero_stage(ranks.world),
            mesh=mesh,
            shard_dense=shared.shard_dense,
            device=torch.device("cpu"),
        )
        started = tracker.restart()
        for _ in range(2):  # moments are made in the first step
            one_micro_batch(engine, config, last=False)
            one_micro_batch(engine, config)
            engine.step(0.01)
    every = sum(parameter.numel() for parameter in engine.deepspeed.module.parameters())
    print("FOUND", tracker.peak, started)
    if ranks.first:
        memory = predict(config, mesh, buckets=4 * every)
        print("PREDICTED", memory.total - WORKSPACES, memory.weights + memory.masters)


@pytest.mark.parametrize(
    ("world", "options"),
    [(1, ()), (2, ()), (2, ("2",)), (2, ("2", "selective")), (2, ("1", "full", "dense"))],
)
def test_zero_keeps_to_the_prediction(world: int, options: tuple[str, ...], tmp_path: Path) -> None:
    """Stage 1 on one rank, stage 2 on two: what DeepSpeed allocates is known from here only.

    With recomputation stage 2 errs on the safe side: its gradients of a micro-batch come after the peak.
    """
    outputs = spawn(world, "tests.unit.train.test_memory", "zero_peak", *options, folder=tmp_path)
    lines = [line.split() for text in outputs for line in text.splitlines()]
    ((_, *predicted),) = (line for line in lines if line[:1] == ["PREDICTED"])
    found = [line[1:] for line in lines if line[:1] == ["FOUND"]]
    assert len(found) == world
    for measured in found:
        peak, start = (int(ours) / int(theirs) for ours, theirs in zip(predicted, measured, strict=True))
        assert 0.99 < peak < (1.25 if len(options) > 1 else 1.05) and 0.98 < start < 1.01


def test_total_is_the_largest_of_three_moments() -> None:
    memory = Memory(
        weights=2,
        masters=4,
        gradients=8,
        moments=16,
        activations=100,
        scratch=50,
        buffers=1,
        build=0,
        mesh=Mesh(),
        accumulates=True,
    )
    assert (memory.states, memory.total) == (30, 131)
    assert replace(memory, accumulates=False).total == 123
    assert replace(memory, scratch=150).total == 181
    assert replace(memory, scratch=150, accumulates=False).total == 181
    assert replace(memory, build=126).total == 131 and replace(memory, build=128).total == 132


def sized(config: RunConfig, **changes: Any) -> int:
    """The predicted total after a change of `train`."""
    return predict(replace(config, train=replace(config.train, **changes))).total


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of a configuration are predicted once."""
    found: dict[str, int] = {}
    predicted = train.memory._activations

    def remembered(config: RunConfig, mesh: Mesh) -> int:
        key = repr((config, mesh))
        if key not in found:
            found[key] = predicted(config, mesh)
        return found[key]

    monkeypatch.setattr(train.memory, "_activations", remembered)


def refusal(config: RunConfig, available: int, **options: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_if_too_large(predict(config), available, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("known")
def test_refusal_names_the_least_change_that_helps() -> None:
    config = run_config("ss", rows=4, steps=1, **QUICK)
    by_rows = [sized(config, micro_batch=rows) for rows in (1, 2, 4)]
    by_length = [sized(config, seq_len=length) for length in (32, 40, 80, 160)]
    assert by_rows == sorted(set(by_rows)) and by_length == sorted(set(by_length))  # monotone
    refuse_if_too_large(predict(config), by_rows[2], config)
    assert "train.micro_batch=2 or train.seq_len=80 or" in refusal(config, by_rows[2] - 1)
    assert "train.micro_batch=1 or " in refusal(config, by_rows[1] - 1)
    assert "train.seq_len=40 or " in refusal(config, by_length[2] - 1)
    states = predict(config).states
    assert refusal(config, states).endswith("use a smaller model")


@pytest.mark.usefixtures("known")
def test_refusal_offers_recomputing() -> None:
    """The mildest that helps, before what changes batches."""
    config = run_config("sc", rows=4, steps=1, **QUICK)
    none, selective, full = (sized(config, recompute=how) for how in recompute.HOW)
    assert full < selective < none
    assert "; use train.recompute=selective or train.micro_batch=2 or" in refusal(config, none - 1)
    assert "; use train.recompute=full or train.micro_batch=" in refusal(config, selective - 1)
    assert "recompute" not in refusal(config, full - 1)
    assert "recompute" not in refusal(recomputing(config, "full"), full - 1)
    assert "train.recompute=full" in refusal(recomputing(config, "selective"), selective - 1)


@pytest.mark.usefixtures("known")
def test_refusal_counts_ranks() -> None:
    base = run_config("ss", "bfloat16", rows=1, steps=12, moe_intermediate_size=4000, **QUICK)
    config = replace(base, parallel=ParallelConfig())
    needs = {world: predict(config, zero_over(world)).total for world in (1, 2, 3)}
    assert needs[3] < needs[2] < needs[1]
    assert "2 ranks" in refusal(config, needs[2])
    assert "3 ranks" in refusal(config, needs[2] - 1)
    assert "ranks" not in refusal(base, needs[2]).partition(";")[2]  # the bare engine has one


def test_a_cpu_refuses_states_only() -> None:
    """More ranks would share the same memory."""
    config = run_config("ss", "bfloat16", n_routed_experts=2000, moe_intermediate_size=480, **QUICK)
    config = replace(config, parallel=ParallelConfig(), optim=replace(config.optim, name="adamw"))
    memory = predict(config)
    assert memory.states < memory.total and predict(config, zero_over(2)).total < memory.states
    refuse_if_too_large(memory, memory.states, config, states_only=True)
    assert refusal(config, memory.states - 1, states_only=True).endswith("; use a smaller model")


def test_table_shows_every_category() -> None:
    memory = predict(run_config("ss", moe_intermediate_size=20, **QUICK))  # possible in fp32 only
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(memory, 79 * 2**30))
    text = captured.get()
    for name in ("weights", "masters", "gradients", "moments", "activations", "scratch", "buffers", "build"):
        assert name in text
    assert f"{memory.total / 2**30:.2f}" in text and "79.00" in text
