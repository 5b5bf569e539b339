"""Greedy decoding of many prompts on a Hugging Face model.

Shape letters: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from readapt.data import Encoder


@dataclass(frozen=True)
class Answer:
    """What was written; `is_finished` where a stop token was, rather than the last token allowed."""

    text: str
    is_finished: bool


def greedy(
    model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int, batch_rows: int
) -> list[str]:
    """Texts that follow each prompt, up to a stop token or `max_tokens`; at most `batch_rows` side by side."""
    return [answer.text for answer in greedy_answers(model, encoder, prompts, max_tokens, batch_rows)]


def greedy_answers(
    model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int, batch_rows: int
) -> list[Answer]:
    """The same, with whether each came to an end."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_rows):
        indices = order[start : start + batch_rows]
        answers = _greedy_batch(model, encoder, [prompts[i] for i in indices], max_tokens)
        found |= dict(zip(indices, answers, strict=True))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _greedy_batch(model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
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
    return [_answer(encoder, tokens, stops) for tokens in tokens_BT.tolist()]


def _stop_ids(model: Any, encoder: Encoder) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({encoder.eos_id, *(i for i in ids if i is not None)})


def _answer(encoder: Encoder, tokens: Sequence[int], stops: Sequence[int]) -> Answer:
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return Answer(encoder.decode(tokens[:end]), end < len(tokens))
