"""From logits to the next tokens: one batched call over rows whose parameters differ.

Shape letters: O rows of the batch, S rows that sample (the others are greedy), V vocabulary.

A row's token depends on its own logits, parameters, seed and position only: every row takes the path that its own
parameters ask for, and its one random number comes from a counter-based generator, not from a shared stream.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.request import TokenLogprob

FloatArray = NDArray[np.float64]
UintArray = NDArray[np.uint64]

# Below this, dividing by the temperature overflows, and the distribution is one token anyway.
_GREEDY_TEMPERATURE = 1e-5
_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 48  # few enough that uniform * total < total in float64


class SampleRow(NamedTuple):
    """How one row's token is chosen; the fields mean what they mean in `SamplingParams`.

    `position` is the position in the sequence of the token to be chosen. A request without a seed brings one drawn
    when it was submitted, so that preemption does not change its tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def is_filtered(self) -> bool:
        """Whether only a part of the vocabulary may be drawn."""
        return self.top_k > 0 or self.top_p < 1.0


class Samples(NamedTuple):
    """All rows' tokens. Where `is_valid` is False the logits were NaN or infinite, and the token means nothing.

    `logprobs` has the valid rows that asked for any, by row.
    """

    tokens: list[int]
    is_valid: list[bool]
    logprobs: dict[int, TokenLogprob]


def sample(logits_OV: Tensor, rows: Sequence[SampleRow | None]) -> Samples:
    """Choose the next token of every row, in order; None asks for the likeliest token and nothing else.

    logits_OV: float32. Log-probabilities are of the model's own distribution, before temperature and filters.
    """
    assert logits_OV.shape[0] == len(rows), f"{logits_OV.shape[0]} rows of logits, {len(rows)} of parameters"
    if not rows:
        return Samples([], [], {})
    largest_O, tokens_O = _largest(logits_OV)
    is_valid_O = largest_O.isfinite()  # the maximum hands on NaN, and -inf where nothing may be chosen
    if not is_valid_O.all():  # a copy of all logits takes longer than all the rest
        logits_OV = logits_OV.masked_fill(~is_valid_O[:, None], 0.0)
    demanding = [(i, row) for i, row in enumerate(rows) if row is not None]
    for is_filtered, draw in ((False, _draw), (True, _draw_filtered)):
        chosen = [(i, row) for i, row in demanding if not row.is_greedy and row.is_filtered == is_filtered]
        if chosen:
            indices = [i for i, _ in chosen]
            tokens_O[indices] = draw(logits_OV[indices], [row for _, row in chosen])
    is_valid = is_valid_O.tolist()
    asking = [(i, row.num_logprobs) for i, row in demanding if row.num_logprobs is not None and is_valid[i]]
    return Samples(tokens_O.tolist(), is_valid, _logprobs(logits_OV, tokens_O, asking) if asking else {})


def _largest(logits_OV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and where it is. On a CPU NumPy looks for it five times as fast as torch."""
    if logits_OV.device.type != "cpu":
        return torch.max(logits_OV, -1)
    tokens_O = torch.from_numpy(logits_OV.numpy().argmax(-1))
    return logits_OV.gather(1, tokens_O[:, None])[:, 0], tokens_O


def _draw(logits_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return _invert(_tempered(logits_SV, rows).softmax(-1), rows)


def _draw_filtered(logits_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    sorted_SV, order_SV = _filtered(_tempered(logits_SV, rows), rows)
    ranks_S = _invert(sorted_SV.softmax(-1), rows)
    return order_SV.gather(1, ranks_S[:, None])[:, 0]


def _tempered(logits_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return logits_SV / _column([row.temperature for row in rows], logits_SV)


def _filtered(logits_SV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Logits in ascending order with -inf for what may not be drawn, and the tokens they belong to.

    First top-k (ties with the k-th stay), then top-p on what is left: the smallest set of likeliest tokens whose
    probabilities add up to top_p or more, never empty. The order and the borders are those of transformers' warpers.
    """
    num_tokens = logits_SV.shape[1]
    sorted_SV, order_SV = logits_SV.sort(dim=-1, stable=True)
    kth_S = torch.tensor(
        [num_tokens - min(row.top_k or num_tokens, num_tokens) for row in rows], device=logits_SV.device
    )
    sorted_SV = sorted_SV.masked_fill(sorted_SV < sorted_SV.gather(1, kth_S[:, None]), -math.inf)
    tail_S1 = _column([1 - row.top_p for row in rows], logits_SV)
    is_tail_SV = (sorted_SV.softmax(-1).cumsum(-1) <= tail_S1) & (tail_S1 > 0)
    is_tail_SV[:, -1] = False
    return sorted_SV.masked_fill(is_tail_SV, -math.inf), order_SV


def _invert(probs_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The first index at which the cumulative probability exceeds the row's random number (inverse CDF)."""
    cumulative_SV = probs_SV.double().cumsum(-1)
    uniform_S1 = torch.from_numpy(_uniform(rows)).to(cumulative_SV.device)[:, None]
    return torch.searchsorted(cumulative_SV, uniform_S1 * cumulative_SV[:, -1:], right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _uniform(rows: Sequence[SampleRow]) -> FloatArray:
    """Numbers in [0, 1) that depend on nothing but each row's seed and position."""
    # Any integer is a seed: the second of several answers has the request's plus one, which may be past 64 bits.
    seeds_S = np.array([row.seed & _MASK_64 for row in rows], dtype=np.uint64)
    positions_S = np.array([row.position for row in rows], dtype=np.uint64)
    return (_mix(_mix(seeds_S) + positions_S) >> np.uint64(64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)


def _mix(value: UintArray) -> UintArray:
    """SplitMix64's step from a counter to a random number (Steele, Lea, Flood, OOPSLA 2014, figure 17)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _logprobs(logits_OV: Tensor, tokens_O: Tensor, wanted: Sequence[tuple[int, int]]) -> dict[int, TokenLogprob]:
    """Log-probabilities by row, of rows and how many alternatives each wants."""
    indices = [i for i, _ in wanted]
    logprobs_WV = logits_OV[indices].log_softmax(-1)
    tokens_W = tokens_O[indices]
    chosen = logprobs_WV.gather(1, tokens_W[:, None])[:, 0].tolist()
    top = logprobs_WV.topk(min(max(count for _, count in wanted), logits_OV.shape[1]), sorted=True)
    values, ids, tokens = top.values.tolist(), top.indices.tolist(), tokens_W.tolist()
    return {
        i: TokenLogprob(tokens[w], chosen[w], tuple(zip(ids[w][:count], values[w][:count], strict=True)))
        for w, (i, count) in enumerate(wanted)
    }
