"""Text from checkpoints and exported models: greedy text is that of transformers, draws follow the seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from data.tokenizer import Tokenizer
from model.fp8 import fp8_linear
from model.quant import round_fp4
from tests.tiny import tiny_model
from tests.unit.train.test_export import CONFIG, TEXTS, Saved, call, config_of_run, save, tokenizer_json
from train import export, sample
from train.sections import PrecisionConfig

PROMPT = "".join(TEXTS) * 10  # beyond the sliding window (16) and two windows of HCA (128)


@pytest.fixture
def saved(tmp_path) -> Saved:
    model, run = tiny_model(CONFIG), tmp_path / "run"
    return Saved(model, run, save(model, run, config_of_run(tmp_path / "data")))


def sampled(capsys, *arguments: object) -> str:
    assert call(sample, *arguments) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_greedy_text_is_that_of_transformers(saved, tmp_path, capsys):
    assert call(export, f"checkpoint={saved.run}", f"out={tmp_path / 'out'}", "format=fp32") == 0
    capsys.readouterr()
    greedy = [f"prompt={PROMPT}", "tokens=40", "temperature=0"]
    text = sampled(capsys, f"checkpoint={saved.step}", *greedy)
    assert sampled(capsys, f"checkpoint={saved.run}", *greedy) == text
    assert sampled(capsys, f"checkpoint={tmp_path / 'out'}", *greedy) == text

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 2 * 128
    continued = oracle.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=CONFIG.eos_token_id)
    assert len(set(continued[0, ids.shape[1] :].tolist())) > 5  # no text of one token
    assert text == tokenizer.decode(continued[0], clean_up_tokenization_spaces=False)


def test_the_seed_decides_the_draws(saved, capsys):
    draw = [f"checkpoint={saved.step}", "prompt=import", "tokens=20", "temperature=1.5", "top_p=1"]
    first = sampled(capsys, *draw, "seed=1")
    assert first.startswith("import") and first == sampled(capsys, *draw, "seed=1")
    assert first != sampled(capsys, *draw, "seed=2")


def test_a_narrow_nucleus_is_greedy(saved, capsys):
    draw = [f"checkpoint={saved.step}", "prompt=import", "tokens=20"]
    assert sampled(capsys, *draw, "top_p=1e-9") == sampled(capsys, *draw, "temperature=0")


def test_a_run_in_bf16_is_sampled_in_bf16(saved, tmp_path):
    config = replace(config_of_run(tmp_path / "data"), precision=PrecisionConfig("bf16", "bfloat16"))
    step = save(saved.model, tmp_path / "narrow", config)
    model, _, mode = sample.load(step, torch.device("cpu"))
    expected = tiny_model(CONFIG).cast(torch.bfloat16).state_dict()
    assert mode == config.train.attention_mode
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("step", "four"), [(3, False), (4, True)])
def test_a_run_in_fp4_is_sampled_as_it_last_computed(saved, tmp_path, step, four):
    """The checkpoint after step 3 is of a run that goes over with its fourth."""
    precision = PrecisionConfig("qat", "float32", fp8=True, fp4_experts=True, fp4_indexer=True, qat_start=3)
    config = replace(config_of_run(tmp_path / "data"), precision=precision)
    model, _, _ = sample.load(save(saved.model, tmp_path / "qat", config, step), torch.device("cpu"))
    assert model.layers[1].self_attn.indexer.fp4 == four
    assert model.layers[0].self_attn.q_a_proj.product is fp8_linear
    for name, exact in tiny_model(CONFIG).named_parameters():
        expected = round_fp4(exact) if four and ".experts." in name else exact
        assert torch.equal(model.get_parameter(name), expected), name


def test_the_context_is_that_of_the_model(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    seen = []
    model = tiny_model(replace(CONFIG, max_position_embeddings=32))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    sample.generate(model, tokenizer, PROMPT, 3)
    sample.generate(model, tokenizer, PROMPT, 1, context=8)
    assert seen == [32, 32, 32, 8]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("tokens=0", "tokens is 0; it must be 1 or more"),
        ("tokens=many", "tokens is 'many'; it must be a whole number"),
        ("temperature=hot", "temperature is 'hot'; it must be a number"),
        ("temperature=-1", "temperature is -1.0; it must be 0 or more"),
        ("top_p=0", "top_p is 0.0; it must be above 0 and at most 1"),
        ("seed=-1", "seed is -1; it must be between 0 and 2**63 - 1"),
        ("device=tpu", "device is 'tpu'; it must be auto, cpu or cuda"),
        ("temprature=1", "temprature: there is no such key; did you mean temperature?"),
    ],
)
def test_a_mistake_is_one_line(argument, words, capsys):
    assert call(sample, "checkpoint=nowhere", "prompt=a", argument) == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def test_a_model_without_tokenizer_is_refused(saved, tmp_path, capsys):
    assert call(export, f"checkpoint={saved.run}", f"out={tmp_path / 'out'}") == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert call(sample, f"checkpoint={tmp_path / 'out'}", "prompt=a") == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
