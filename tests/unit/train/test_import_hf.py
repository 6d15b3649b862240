"""Released weights as checkpoints, against an encoder and a decoder written here and against transformers'.

The table of names, shapes and dtypes is that of the published index of DeepSeek-V4-Flash.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import model.hf as hf
from configs.compose import compose
from configs.errors import ConfigError
from model.config import ModelConfig
from model.flops import parameter_shapes
from model.hf import save_pretrained
from model.model import ForCausalLM
from model.tensorfile import TensorFile
from optim.partition import pieces
from tests.tiny import tiny_config, tiny_model
from tests.unit.train.test_export import PeakBytes, call, tokenizer_json
from train import checkpoint, import_hf, sample

# FP8 needs several blocks: 256 columns are two, 160 rows two of which the second is not full.
CONFIG = tiny_config(
    "sch",
    vocab_size=320,
    hidden_size=256,
    q_lora_rank=160,
    moe_intermediate_size=64,
    num_nextn_predict_layers=1,
)

# ---- the released layout, written down independently of model/hf.py ----

TOP = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
MTP = {
    name: name for name in ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight")
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.indexer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}
for part in ("fn", "base", "scale"):
    LAYER |= {f"attn_hc.{part}": f"hc_attn_{part}", f"ffn_hc.{part}": f"hc_ffn_{part}"}
for ours, theirs in (
    ("self_attn.compressor", "attn.compressor"),
    ("self_attn.indexer.compressor", "attn.indexer.compressor"),
):
    LAYER |= {
        f"{ours}.kv_proj.weight": f"{theirs}.wkv.weight",
        f"{ours}.gate_proj.weight": f"{theirs}.wgate.weight",
        f"{ours}.kv_norm.weight": f"{theirs}.norm.weight",
        f"{ours}.position_bias": f"{theirs}.ape",
    }
IN_FP8 = re.compile(r".*(attn\.w(q_a|q_b|kv|o_a|o_b)|indexer\.wq_b|shared_experts\.w\d|[eh]_proj)\.weight")
IN_FP4 = re.compile(r".*ffn\.experts\.\d+\.w\d\.weight")
IN_FP32 = re.compile(r".*(hc_\w+|ape|attn_sink|gate\.bias)")


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the released names, experts one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        at = re.findall(r"^(?:layers|mtp)\.\d+\.|^", name)[0]
        rest = name.removeprefix(at).removeprefix("block.")
        if rest == "mlp.experts.gate_up_proj":
            for expert, matrix in enumerate(tensor):
                found[f"{at}ffn.experts.{expert}.w1.weight"], found[f"{at}ffn.experts.{expert}.w3.weight"] = (
                    matrix.chunk(2)
                )
        elif rest == "mlp.experts.down_proj":
            found |= {f"{at}ffn.experts.{expert}.w2.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[at + {**TOP, **MTP, **LAYER}[rest]] = tensor
    return found


def powers_of_two(blocks: Tensor, largest: float) -> Tensor:
    """The least powers of two that bring every block's largest number below `largest`; at least 2**-100."""
    return torch.exp2((blocks / largest).clamp(min=2.0**-100).log2().ceil())


def encode_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-n // 128) for n in matrix.shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = powers_of_two(matrix[block].abs().max(), 448.0)
            codes[block] = (matrix[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def fp4_value(code: int) -> float:
    """E2M1: one bit of sign, two of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def encode_fp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    blocks = matrix.unflatten(1, (-1, 32))
    scale = powers_of_two(blocks.abs().amax(-1), 6.0)
    values = torch.tensor([fp4_value(code) for code in range(16)])
    codes = (blocks / scale[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1).flatten(1).to(torch.uint8)
    return (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """From the bits, number by number."""
    bits = codes.view(torch.uint8).numpy().astype(np.int64)
    if codes.dtype == torch.float8_e4m3fn:
        exponent, mantissa = bits >> 3 & 15, bits & 7
        numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        numbers, block = np.where(bits & 128, -numbers, numbers), (128, 128)
    else:
        halves = np.stack((bits & 15, bits >> 4), axis=-1).reshape(len(bits), -1)
        numbers, block = np.array([fp4_value(code) for code in range(16)])[halves], (1, 32)
    if scale.dtype == torch.float8_e8m0fnu:
        scales = 2.0 ** (scale.view(torch.uint8).numpy().astype(np.float64) - 127)
    else:
        scales = scale.numpy().astype(np.float64)
    rows, columns = np.indices(numbers.shape)
    return torch.tensor(numbers * scales[rows // block[0], columns // block[1]], dtype=torch.float32)


def encode(
    tensors: dict[str, Tensor], suffix: str, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a release stores of tensors under its names, and the numbers that this means."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if IN_FP8.fullmatch(key) or IN_FP4.fullmatch(key):
            codes, scale = (encode_fp8 if IN_FP8.fullmatch(key) else encode_fp4)(tensor)
            stored |= {key: codes, key.removesuffix(".weight") + suffix: scale.to(scale_dtype)}
            meant[key] = decode(codes, scale.to(scale_dtype))
        else:
            same = IN_FP32.fullmatch(key) or not tensor.is_floating_point()
            stored[key] = tensor.clone() if same else tensor.to(torch.bfloat16)
            meant[key] = stored[key].to(tensor.dtype)
    return stored, meant


FLASH: dict[str, Any] = {  # config.json of DeepSeek-V4-Flash
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "head_dim": 512, "hidden_act": "silu", "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64,
    "index_topk": 512, "initializer_range": 0.02, "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4", "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 6,
    "num_hidden_layers": 43, "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1,
    "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128,
    "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 129280, "compress_rope_theta": 160000,
    "compress_ratios": [0, 0] + 20 * [4, 128] + [4, 0],
}  # fmt: skip


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """config.json of a small model in the released form."""
    sizes = {key: getattr(config, key) for key in FLASH if hasattr(config, key)}
    ratios = [0, 4, 128] + [0] * config.num_nextn_predict_layers
    scaling = FLASH["rope_scaling"] | {"original_max_position_embeddings": 64}
    return FLASH | sizes | {"compress_ratios": ratios, "num_hash_layers": 1, "rope_scaling": scaling}


def write_folder(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], shards: int = 3) -> Path:
    folder.mkdir()
    where = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
    for file in set(where.values()):
        save_file({key: tensors[key].contiguous() for key in where if where[key] == file}, folder / file)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """A folder as released, only to be read."""
    stored, _ = encode(released(tiny_model(CONFIG).state_dict()), ".scale", torch.float8_e8m0fnu)
    return write_folder(tmp_path_factory.mktemp("released") / "source", stored, settings_of(CONFIG))


def load(run: Path) -> ForCausalLM:
    return sample.load(run / "checkpoints" / "step-00000000", torch.device("cpu"))[0]


def logits(model: Any) -> Tensor:
    ids = torch.randint(CONFIG.vocab_size, (1, 264), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids, **({} if isinstance(model, ForCausalLM) else {"use_cache": False})).logits


# ---- what arrives ----


@pytest.mark.parametrize(
    ("suffix", "scale_dtype"), [(".scale", torch.float8_e8m0fnu), (".weight_scale_inv", torch.float32)]
)
def test_every_number_of_a_release_arrives(suffix, scale_dtype, tmp_path):
    stored, meant = encode(released(tiny_model(CONFIG).state_dict()), suffix, scale_dtype)
    dtypes = {torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32, torch.int64, scale_dtype}
    assert {tensor.dtype for tensor in stored.values()} == dtypes
    source = write_folder(tmp_path / "source", stored, settings_of(CONFIG))
    assert call(import_hf, f"source={source}", f"out={tmp_path / 'run'}") == 0
    model = load(tmp_path / "run")
    arrived = released(model.state_dict())
    assert model.config == CONFIG and arrived.keys() == meant.keys()
    for key, tensor in arrived.items():
        assert tensor.dtype == meant[key].dtype and torch.equal(tensor, meant[key]), key
    with torch.no_grad():
        expected = tiny_model(CONFIG)
        for key, tensor in released(expected.state_dict()).items():
            tensor.copy_(meant[key])
    assert torch.equal(logits(model), logits(expected)) and logits(model).std() > 0.1


def test_the_checkpoint_is_a_run_that_has_not_begun(quantised, tmp_path, capsys):
    source, run = quantised, tmp_path / "runs" / "first"
    assert call(import_hf, f"source={source}", f"out={run}", "optim.lr=1e-4", "train.steps=77") == 0
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert said[:6] == ["python", "-m", "train", f"run.dir={run.parent}", "run.name=first", "resume=auto"]
    assert compose([*said[3:5], *said[6:]], CONFIG) == sample.run_config(
        run / "checkpoints" / "step-00000000"
    )
    step = checkpoint.newest_good(run / "checkpoints", pytest.fail)
    manifest = checkpoint.read_manifest(step)
    config = sample.run_config(step)
    assert manifest["step"] == 0 and manifest["data"] == {} and manifest["tracking"] == {}
    assert (config.model, config.optim.lr, config.train.steps) == (CONFIG, 1e-4, 77)
    tokenizer = sample.Tokenizer(source / "tokenizer.json")
    assert Path(config.data.tokenizer.path) == source / "tokenizer.json"
    assert (
        config.data.tokenizer.vocab_size == CONFIG.vocab_size
        and manifest["tokenizer"] == tokenizer.fingerprint
    )
    assert (step / "tokenizer.json").read_text() == tokenizer.to_json()
    with checkpoint.open_tensors(step) as tensors:
        expected = {f"weight.{p.key}" for n, s in parameter_shapes(CONFIG).items() for p in pieces(n, s)}
        assert {key for key in tensors if not key.startswith("buffer.")} == expected
        assert {tensors.dtype(key) for key in expected} == {torch.float32}


def test_transformers_computes_the_same_from_the_released_names(tmp_path):
    state = released(tiny_model(CONFIG).state_dict())
    settings = settings_of(CONFIG) | {"quantization_config": None, "torch_dtype": "float32"}
    source = write_folder(tmp_path / "source", state, settings)
    assert call(import_hf, f"source={source}", f"out={tmp_path / 'run'}") == 0
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(source, output_loading_info=True)
    oracle, info = loaded
    assert not any(info.values()), info
    mine, theirs = logits(load(tmp_path / "run")), logits(oracle.eval())
    assert theirs.std() > 0.1 and (mine - theirs).norm() / theirs.norm() < 1e-5


def test_transformers_decodes_the_same_numbers():
    matrix = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for (codes, scale), block in ((encode_fp8(matrix), (128, 128)), (encode_fp4(matrix), (1, 32))):
        scale = scale.to(torch.float8_e8m0fnu)
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
        assert torch.equal(import_hf.numbers(codes, scale.float(), block), theirs)
        assert torch.equal(decode(codes, scale), theirs)
        assert 0 < (theirs - matrix).norm() / matrix.norm() < 0.15


def test_every_code_of_fp8_and_fp4():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    one = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    wide = import_hf.numbers(codes.view(torch.float8_e4m3fn), one.float(), (128, 128))
    finite = wide.isfinite()
    assert finite.sum() == 254 and torch.equal(
        wide[finite], decode(codes.view(torch.float8_e4m3fn), one)[finite]
    )
    scale = torch.arange(1, 17).view(2, 8).to(torch.uint8).add(120).view(torch.float8_e8m0fnu)
    packed = import_hf.numbers(codes, scale.float(), (1, 32))
    assert torch.equal(packed, decode(codes.view(torch.int8), scale)) and packed.unique().numel() == 75


@pytest.mark.parametrize("depth", [0, 1])
def test_the_folder_of_transformers_own_names(depth, tmp_path):
    """Whole stacks of experts, in fp32; without MTP weights, the run has no MTP whatever config.json says."""
    model = tiny_model(replace(CONFIG, num_nextn_predict_layers=depth))
    save_pretrained(model, tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    tokenizer = ["data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path / 'tokenizer.json'}"]
    assert call(import_hf, f"source={tmp_path / 'source'}", f"out={tmp_path / 'run'}", *tokenizer) == 0
    arrived = load(tmp_path / "run")
    assert arrived.config == model.config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in arrived.state_dict().items())


def test_a_stack_quantised_as_transformers_holds_it(tmp_path):
    config = replace(CONFIG, num_nextn_predict_layers=0)
    save_pretrained(tiny_model(config), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    key = "model.layers.1.mlp.experts.gate_up_proj"
    codes, scales = zip(*(encode_fp8(matrix) for matrix in tensors[key]))
    tensors |= {key: torch.stack(codes), f"{key}_scale_inv": torch.stack(scales)}
    source = write_folder(tmp_path / "source", tensors, config.to_hf())
    assert call(import_hf, f"source={source}", f"out={tmp_path / 'run'}") == 0
    meant = torch.stack([decode(*pair) for pair in zip(codes, scales)])
    assert torch.equal(load(tmp_path / "run").layers[1].mlp.experts.gate_up_proj, meant)


def test_memory_is_that_of_one_matrix(quantised, tmp_path):
    with PeakBytes() as memory:
        assert call(import_hf, f"source={quantised}", f"out={tmp_path / 'run'}") == 0
    sizes = [tensor.numel() for tensor in released(tiny_model(CONFIG).state_dict()).values()]
    assert 4 * max(sizes) <= memory.peak <= 4 * 4 * max(sizes)  # decoding holds codes, numbers and scales
    assert 4 * 4 * max(sizes) < 4 * sum(sizes) / 5


# ---- the published model ----

PUBLISHED = """
embed.weight 129280,4096 BF16
hc_head_base 4 F32
hc_head_fn 4,16384 F32
hc_head_scale 1 F32
head.weight 129280,4096 BF16
norm.weight 4096 BF16
layers.0-2.ffn.gate.tid2eid 129280,6 I64
layers.3-42.ffn.gate.bias E F32
layers.even.attn.compressor.ape 4,1024 F32
layers.even.attn.compressor.wgate.weight 1024,4096 BF16
layers.even.attn.compressor.wkv.weight 1024,4096 BF16
layers.even.attn.indexer.compressor.ape 4,256 F32
layers.even.attn.indexer.compressor.norm.weight 128 BF16
layers.even.attn.indexer.compressor.wgate.weight 256,4096 BF16
layers.even.attn.indexer.compressor.wkv.weight 256,4096 BF16
layers.even.attn.indexer.weights_proj.weight 64,4096 BF16
layers.even.attn.indexer.wq_b.scale 64,8 F8_E8M0
layers.even.attn.indexer.wq_b.weight 8192,1024 F8_E4M3
layers.2-42.attn.compressor.norm.weight 512 BF16
layers.odd.attn.compressor.ape 128,512 F32
layers.odd.attn.compressor.wgate.weight 512,4096 BF16
layers.odd.attn.compressor.wkv.weight 512,4096 BF16
mtp.0.e_proj.scale 32,32 F8_E8M0
mtp.0.e_proj.weight 4096,4096 F8_E4M3
mtp.0.enorm.weight 4096 BF16
mtp.0.ffn.gate.bias E F32
mtp.0.h_proj.scale 32,32 F8_E8M0
mtp.0.h_proj.weight 4096,4096 F8_E4M3
mtp.0.hc_head_base 4 F32
mtp.0.hc_head_fn 4,16384 F32
mtp.0.hc_head_scale 1 F32
mtp.0.hnorm.weight 4096 BF16
mtp.0.norm.weight 4096 BF16
all.attn.attn_sink 64 F32
all.attn.kv_norm.weight 512 BF16
all.attn.q_norm.weight 1024 BF16
all.attn.wkv.scale 4,32 F8_E8M0
all.attn.wkv.weight 512,4096 F8_E4M3
all.attn.wo_a.scale 64,32 F8_E8M0
all.attn.wo_a.weight 8192,4096 F8_E4M3
all.attn.wo_b.scale 32,64 F8_E8M0
all.attn.wo_b.weight 4096,8192 F8_E4M3
all.attn.wq_a.scale 8,32 F8_E8M0
all.attn.wq_a.weight 1024,4096 F8_E4M3
all.attn.wq_b.scale 256,8 F8_E8M0
all.attn.wq_b.weight 32768,1024 F8_E4M3
all.attn_norm.weight 4096 BF16
all.ffn.experts.each.w1.scale 2048,128 F8_E8M0
all.ffn.experts.each.w1.weight 2048,2048 I8
all.ffn.experts.each.w2.scale 4096,64 F8_E8M0
all.ffn.experts.each.w2.weight 4096,1024 I8
all.ffn.experts.each.w3.scale 2048,128 F8_E8M0
all.ffn.experts.each.w3.weight 2048,2048 I8
all.ffn.gate.weight E,4096 BF16
all.ffn.shared_experts.w1.scale 16,32 F8_E8M0
all.ffn.shared_experts.w1.weight 2048,4096 F8_E4M3
all.ffn.shared_experts.w2.scale 32,16 F8_E8M0
all.ffn.shared_experts.w2.weight 4096,2048 F8_E4M3
all.ffn.shared_experts.w3.scale 16,32 F8_E8M0
all.ffn.shared_experts.w3.weight 2048,4096 F8_E4M3
all.ffn_norm.weight 4096 BF16
all.hc_attn_base 24 F32
all.hc_attn_fn 24,16384 F32
all.hc_attn_scale 3 F32
all.hc_ffn_base 24 F32
all.hc_ffn_fn 24,16384 F32
all.hc_ffn_scale 3 F32
"""
LAYERS = {"layers.even": range(2, 43, 2), "layers.odd": range(3, 43, 2), "layers.0-2": range(3)}
LAYERS |= {"layers.2-42": range(2, 43), "layers.3-42": range(3, 43), "all": range(43)}
SMALL = FLASH | {"num_hidden_layers": 4, "n_routed_experts": 8, "compress_ratios": [0, 0, 4, 128, 0]}


class Header(dict[str, tuple[torch.dtype, tuple[int, ...]]]):
    """Dtypes and shapes without any tensor, in place of checkpoint.Tensors."""

    def dtype(self, key: str) -> torch.dtype:
        return self[key][0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self[key][1]


def published(settings: dict[str, Any]) -> Header:
    """The index of the published model, or of one with fewer layers and experts."""
    found, experts = Header(), settings["n_routed_experts"]
    for line in PUBLISHED.split("\n")[1:-1]:
        pattern, shape, dtype = line.replace(" E", f" {experts}").split()
        spec = checkpoint._DTYPE_OF[dtype], tuple(map(int, shape.split(",")))
        group = next((group for group in LAYERS if pattern.startswith(f"{group}.")), "")
        layers = [i for i in LAYERS.get(group, ()) if i < settings["num_hidden_layers"]]
        places = [f"layers.{i}" for i in layers] + ["mtp.0"] * (group == "all") if group else [""]
        for place in places:
            for expert in range(experts) if ".each." in pattern else [0]:
                found[pattern.replace(group, place, 1).replace(".each.", f".{expert}.")] = spec
    return found


def test_the_published_index_is_read_whole():
    header, config = published(FLASH), ModelConfig.from_hf(FLASH)
    assert len(header) == 69187
    plan = import_hf.plan_import(header, config, (128, 128))
    assert sorted(key for stored in plan for key in stored[:2] if key) == sorted(header)
    made = {piece.key for stored in plan for piece in stored.pieces if piece.key.startswith("weight.")}
    assert made == {f"weight.{p.key}" for n, s in parameter_shapes(config).items() for p in pieces(n, s)}


FP8, FP4, E8M0, BF16 = torch.float8_e4m3fn, torch.int8, torch.float8_e8m0fnu, torch.bfloat16


@pytest.mark.parametrize(
    ("key", "spec", "words"),
    [
        (
            "layers.3.ffn.experts.7.w2.weight",
            None,
            "missing weights layers.3.ffn.experts.7.w2.weight, unknown",
        ),
        ("layers.3.attn.wo_a.weight", None, "missing weights layers.3.self_attn.o_a_proj.weight, unknown"),
        ("layers.3.attn.wo_a.scale", None, "layers.3.attn.wo_a.weight is torch.float8_e4m3fn, but has no sc"),
        ("layers.1.ffn.gate.tid2eid", None, "missing weights layers.1.mlp.gate.tid2eid;"),
        ("mtp.0.markov_head.w1", (BF16, (1,)), "unknown weights mtp.0.markov_head.w1;"),
        (
            "layers.3.ffn.experts.8.w2.weight",
            (FP4, (1,)),
            "unknown weights layers.3.ffn.experts.8.w2.weight;",
        ),
        ("norm.weight", (BF16, (4095,)), r"norm.weight has shape \[4095\], config.json asks for \[4096\]"),
        ("layers.0.ffn.experts.4.w1.weight", (FP4, (2048, 4096)), r"has shape \[2048, 8192\], config"),
        ("layers.0.attn.wkv.scale", (E8M0, (4, 31)), r"wkv.weight needs \[4, 32\] in E8M0"),
        ("layers.0.attn.wkv.scale", (BF16, (4, 32)), "wkv.scale is torch.bfloat16"),
        ("layers.0.attn.wkv.weight", (BF16, (512, 4096)), "is torch.bfloat16, which is not read with scales"),
        ("embed.weight", (torch.int64, (129280, 4096)), "is torch.int64, which is not read; convert"),
        ("layers.0.ffn.gate.tid2eid", (torch.float32, (129280, 6)), "is torch.float32, which is not read;"),
    ],
)
def test_what_differs_from_the_published_index_is_named(key, spec, words):
    header = published(SMALL)
    header.pop(key, None)
    header |= {key: spec} if spec else {}
    with pytest.raises(ConfigError, match=words) as caught:
        import_hf.plan_import(header, ModelConfig.from_hf(SMALL), (128, 128))
    assert "\n" not in str(caught.value)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "source: has no value; set it as source=VALUE"),
        (["source={folder}", "sourc={folder}"], "sourc: there is no such key; did you mean source?"),
        (["source={folder}/no"], "config.json is missing"),
        (["source={folder}", "optim.lrr=1"], "optim.lrr: there is no such key; did you mean optim.lr?"),
        (["source={folder}", "model.hc_mult=2"], "model.hc_mult=2: the model is that of source"),
        (["source={folder}", "train.seq_len=2048", "train.batch_tokens=16384"], "train.seq_len is 2048"),
        (["source={folder}", "out={folder}"], "exists already"),
        (["source={folder}", "data.tokenizer.kind=bpe"], "has no tokenizer.json"),
        (["source={folder}", "data.tokenizer.kind=deepseek_v4"], "model.vocab_size is 320; it must be"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(arguments, words, quantised, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert call(import_hf, *(text.format(folder=quantised) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply `edit` to the tensors of the folder's first file."""
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_a_wrong_tensor_is_found_before_anything_is_written(quantised, tmp_path, capsys):
    source = shutil.copytree(quantised, tmp_path / "source")
    change(source, lambda tensors: tensors.update({"stranger.weight": torch.ones(1)}))
    assert call(import_hf, f"source={source}", f"out={tmp_path / 'run'}") == 2
    assert f"{source}: unknown weights stranger.weight;" in capsys.readouterr().err
    (source / "model-00002-of-00003.safetensors").write_bytes(b"damaged")
    assert call(import_hf, f"source={source}", f"out={tmp_path / 'run'}") == 2
    assert "model-00002-of-00003.safetensors cannot be opened" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_failure_while_writing_leaves_no_checkpoint(quantised, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "_put", full)
    assert call(import_hf, f"source={quantised}", f"out={tmp_path / 'run'}") == 2
    assert "No space left" in capsys.readouterr().err and not any(tmp_path.iterdir())
