"""Greedy decoding of many prompts on a Hugging Face model.

Shape letters: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

from readapt.data import Encoder


def greedy(
    model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int, batch_rows: int
) -> list[str]:
    """Texts that follow each prompt, up to a stop token or `max_tokens`; at most `batch_rows` side by side."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_rows):
        indices = order[start : start + batch_rows]
        answers = _greedy_batch(model, encoder, [prompts[i] for i in indices], max_tokens)
        for index, answer in zip(indices, answers, strict=True):
            texts[index] = answer
    return texts


@torch.no_grad()
def _greedy_batch(model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    input_ids_BT = torch.tensor([[encoder.eos_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    is_token_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stops = _stop_ids(model, encoder)
    tokens_BT = model.generate(
        input_ids_BT,
        attention_mask=is_token_BT,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=stops,
        pad_token_id=encoder.eos_id,
    )[:, width:]
    return [encoder.decode(_until_stop(tokens, stops)) for tokens in tokens_BT.tolist()]


def _stop_ids(model: Any, encoder: Encoder) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({encoder.eos_id, *(i for i in ids if i is not None)})


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])
