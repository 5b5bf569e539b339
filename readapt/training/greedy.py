"""Greedy decoding of many prompts on a Hugging Face model."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder

KEPT_SHARE = 0.75  # finished rows leave the batch once at most this share of its rows is unfinished


@dataclass(frozen=True)
class Answer:
    """A generated text. `is_finished` says whether a stop token ended it, and not the limit of tokens."""

    text: str
    is_finished: bool


def greedy(
    model: CausalLM, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int, batch_rows: int
) -> list[str]:
    """Return the text that follows each prompt, up to a stop token or `max_tokens`; at most `batch_rows` at once."""
    return [answer.text for answer in greedy_answers(model, encoder, prompts, max_tokens, batch_rows)]


def greedy_answers(
    model: CausalLM, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int, batch_rows: int
) -> list[Answer]:
    """Like `greedy`, but also say whether each answer is finished."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_rows):
        indices = order[start : start + batch_rows]
        answers = _greedy_batch(model, encoder, [prompts[i] for i in indices], max_tokens)
        found |= dict(zip(indices, answers, strict=True))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _greedy_batch(model: CausalLM, encoder: Encoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """Decode one batch. Finished rows leave it a quarter at a time, because that copies the keys and values."""
    width = max(map(len, prompts))
    stops = encoder.end_ids
    input_ids_BT = torch.tensor([[encoder.eos_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    is_token_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions_BT = (is_token_BT.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    rows = list(range(len(prompts)))  # the prompts that are still in the batch
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        next_B = (
            model(
                input_ids=input_ids_BT,
                attention_mask=is_token_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .argmax(-1)
        )
        for row, token in zip(rows, next_B.tolist(), strict=True):
            written[row].append(token)
        going = [place for place, row in enumerate(rows) if stops.isdisjoint(written[row])]
        if not going:
            break
        input_ids_BT = next_B[:, None]
        positions_BT = positions_BT[:, -1:] + 1
        is_token_BT = torch.cat([is_token_BT, torch.ones_like(input_ids_BT)], dim=1)
        if len(going) <= KEPT_SHARE * len(rows):
            kept_B = torch.tensor(going, device=model.device)
            rows = [rows[place] for place in going]
            input_ids_BT, positions_BT, is_token_BT = (t[kept_B] for t in (input_ids_BT, positions_BT, is_token_BT))
            cache.batch_select_indices(kept_B)
    return [_answer(encoder, tokens, stops) for tokens in written]


def _answer(encoder: Encoder, tokens: Sequence[int], stops: Container[int]) -> Answer:
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return Answer(encoder.decode(tokens[:end]), end < len(tokens))
