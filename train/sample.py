"""`python -m train.sample`: text from a model, by recomputation of the whole context for every token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import ConfigError
from data.tokenizer import Tokenizer
from model.attention import AttentionMode
from model.hf import empty_model, load_pretrained
from model.kernels.cast import fp4_values
from model.model import ForCausalLM
from optim.partition import is_expert
from train import cli
from train.checkpoint import open_tensors, read_manifest
from train.export import TOKENIZER, model_parts, model_specs, require, run_config

HELP = """\
Continue a prompt: python -m train.sample checkpoint=DIR prompt=TEXT [KEY=VALUE ...]

  checkpoint=DIR    a checkpoint, a run's folder (its newest checkpoint) or an exported model
  prompt=TEXT       what to continue
  tokens=64         at most this many new ones; a document that ends earlier ends the text
  temperature=0.7   0 takes the likeliest token every time
  top_p=0.9         draw from the likeliest tokens that make up this share
  seed=0            of the draws: the same seed gives the same text
  device=auto       auto (CUDA where there is one), cpu or cuda

Every token is computed from all before it, without a cache: meant for a look at a model, not for service.

Examples:
  python -m train.sample checkpoint=runs/first prompt="import "
  python -m train.sample checkpoint=runs/first/model prompt="def " temperature=0 tokens=200
"""


@dataclass(frozen=True)
class Options:
    """The command's arguments; see HELP."""

    checkpoint: str
    prompt: str
    tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, "tokens", self.tokens, "1 or more")
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        no_gpu = self.device == "cuda" and not torch.cuda.is_available()
        _require(not no_gpu, "device", self.device, "cpu: torch sees no GPU here")


def _require(good: bool, key: str, value: object, rule: str) -> None:
    if not good:
        raise ConfigError(f"{key} is {value!r}; it must be {rule}")


def main(argv: list[str]) -> None:
    options = cli.read(Options, argv)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    model, tokenizer, mode = load(Path(options.checkpoint), device)
    print(
        generate(
            model,
            tokenizer,
            options.prompt,
            options.tokens,
            seed=options.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            mode=mode,
        )
    )


def load(path: Path, device: torch.device) -> tuple[ForCausalLM, Tokenizer, AttentionMode]:
    """A checkpoint's model in its run's precision, or an exported one in the dtype it is stored in.

    Raises ConfigError or OSError for what is neither, is damaged or has no tokenizer.json.
    """
    if (path / "config.json").exists():
        return load_pretrained(path).to(device), _tokenizer(path), "sparse"
    folder = cli.find_checkpoint(path)
    config, tokenizer = run_config(folder), _tokenizer(folder)
    specs = model_specs(config.model, getattr(torch, config.precision.compute_dtype))
    last = max(0, read_manifest(folder)["step"] - 1)
    precision = config.at(last).precision.at(last)
    model = empty_model(config.model).use(precision)
    with open_tensors(folder) as tensors:
        require(tensors, specs, folder)
        for name, (dtype, shape) in specs.items():
            four = precision.fp4_experts and is_expert(name)
            parts = model_parts(tensors, name, (torch.float32 if four else dtype, shape))
            whole = torch.cat([(fp4_values(part, dtype) if four else part).flatten() for part in parts])
            model.load_state_dict({name: whole.view(shape).to(device)}, strict=False, assign=True)
    return model, tokenizer, config.at(last).attention_mode


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / TOKENIZER).exists():
        raise ConfigError(f"{folder} has no {TOKENIZER}; copy there the one that the model was trained with")
    return Tokenizer(folder / TOKENIZER)


@torch.no_grad()
def generate(
    model: ForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    context: int | None = None,
    seed: int = 0,
    temperature: float = 0.7,
    top_p: float = 0.9,
    mode: AttentionMode = "sparse",
    agree: Callable[[int], int] = lambda token: token,
) -> str:
    """`prompt` continued by up to `tokens` tokens; stops at a document's end.

    Where several ranks hold the model together all call this, and `agree` gives them one rank's choice.
    Visible are the last `context` tokens, by default as many as the model has positions. Nucleus sampling
    from softmax(logits / temperature); temperature 0 takes the likeliest token.
    """
    device = model.lm_head.weight.device
    context = context or model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    ids = [tokenizer.bos_id] if not prompt else tokenizer.encode_batch([prompt])[0].tolist()
    start = len(ids)
    while len(ids) < start + tokens:
        window = torch.tensor([ids[-context:]], device=device)
        logits = model(window, mode=mode).logits[0, -1].float().cpu()
        ids.append(agree(_draw(logits, temperature, top_p, generator)))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1:], HELP, main))
