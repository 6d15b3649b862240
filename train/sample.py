"""Text from a model, by recomputation of the whole context for every token."""

from __future__ import annotations

import torch

from data.tokenizer import Tokenizer
from model.attention import AttentionMode
from model.model import ForCausalLM


@torch.no_grad()
def generate(
    model: ForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    context: int,
    seed: int = 0,
    temperature: float = 0.7,
    top_p: float = 0.9,
    mode: AttentionMode = "sparse",
) -> str:
    """`prompt` continued by up to `tokens` tokens, `context` of them visible; stops at a document's end.

    Nucleus sampling from softmax(logits / temperature); temperature 0 takes the likeliest token.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    ids = [tokenizer.bos_id] if not prompt else tokenizer.encode_batch([prompt])[0].tolist()
    start = len(ids)
    while len(ids) < start + tokens:
        window = torch.tensor([ids[-context:]], device=device)
        logits = model(window, mode=mode).logits[0, -1].float().cpu()
        ids.append(_draw(logits, temperature, top_p, generator))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
