"""Choose the next tokens from logits: one batched call for rows with different parameters.

A row's token depends only on its own logits, parameters, seed and position. Each row takes the path that its own
parameters ask for. Its one random number comes from a counter-based generator, not from a shared stream.
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

# Division by a lower temperature overflows. The distribution is a single token there anyway.
_GREEDY_TEMPERATURE = 1e-5
_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 48  # few enough that uniform * total < total holds in float64


class SampleRow(NamedTuple):
    """How to choose one row's token. The fields are those of `SamplingParams`.

    `position` is the new token's position in the sequence. A request without a seed gets one when it is submitted, so
    that preemption does not change its tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken without drawing."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def is_filtered(self) -> bool:
        """Whether only part of the vocabulary may be drawn."""
        return self.top_k > 0 or self.top_p < 1.0


class Samples(NamedTuple):
    """The tokens of all rows. If `is_valid` is False, the logits were NaN or infinite and the token is meaningless.

    `logprobs` maps each valid row that asked for log-probabilities to them.
    """

    tokens: list[int]
    is_valid: list[bool]
    logprobs: dict[int, TokenLogprob]


def sample(logits_OV: Tensor, rows: Sequence[SampleRow | None]) -> Samples:
    """Choose the next token of every row, in order. A row of None asks for the likeliest token and nothing else.

    logits_OV is float32. Log-probabilities are of the model's own distribution, before temperature and filters.
    """
    assert logits_OV.shape[0] == len(rows), f"{logits_OV.shape[0]} rows of logits, {len(rows)} of parameters"
    if not rows:
        return Samples([], [], {})
    largest_O, tokens_O = _largest(logits_OV)
    is_valid_O = largest_O.isfinite()  # the maximum is NaN if any logit is, and -inf if all are
    if not is_valid_O.all():  # copying all logits takes longer than all other work here
        logits_OV = logits_OV.masked_fill(~is_valid_O[:, None], 0.0)
    given = [(i, row) for i, row in enumerate(rows) if row is not None]
    for is_filtered, draw in ((False, _draw), (True, _draw_filtered)):
        chosen = [(i, row) for i, row in given if not row.is_greedy and row.is_filtered == is_filtered]
        if chosen:
            indices = [i for i, _ in chosen]
            tokens_O[indices] = draw(logits_OV[indices], [row for _, row in chosen])
    is_valid = is_valid_O.tolist()
    asking = [(i, row.num_logprobs) for i, row in given if row.num_logprobs is not None and is_valid[i]]
    return Samples(tokens_O.tolist(), is_valid, _logprobs(logits_OV, tokens_O, asking) if asking else {})


def _largest(logits_OV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and its index. On a CPU NumPy finds it five times as fast as torch."""
    if logits_OV.device.type != "cpu":
        return torch.max(logits_OV, -1)
    tokens_O = torch.from_numpy(logits_OV.numpy().argmax(-1))
    return logits_OV.gather(1, tokens_O[:, None])[:, 0], tokens_O


def _draw(logits_OV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return _invert(_tempered(logits_OV, rows).softmax(-1), rows)


def _draw_filtered(logits_OV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    sorted_OV, order_OV = _filtered(_tempered(logits_OV, rows), rows)
    ranks_O = _invert(sorted_OV.softmax(-1), rows)
    return order_OV.gather(1, ranks_O[:, None])[:, 0]


def _tempered(logits_OV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return logits_OV / _column([row.temperature for row in rows], logits_OV)


def _filtered(logits_OV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Return the logits in ascending order, with -inf for tokens that may not be drawn, and their tokens.

    First comes top-k; ties with the k-th token stay. Then comes top-p on the rest: the smallest set of likeliest tokens
    whose probabilities add up to at least top_p, never empty. Order and thresholds are those of transformers' warpers.
    """
    num_tokens = logits_OV.shape[1]
    sorted_OV, order_OV = logits_OV.sort(dim=-1, stable=True)
    kth_O = torch.tensor(
        [num_tokens - min(row.top_k or num_tokens, num_tokens) for row in rows], device=logits_OV.device
    )
    sorted_OV = sorted_OV.masked_fill(sorted_OV < sorted_OV.gather(1, kth_O[:, None]), -math.inf)
    tail_O1 = _column([1 - row.top_p for row in rows], logits_OV)
    is_tail_OV = (sorted_OV.softmax(-1).cumsum(-1) <= tail_O1) & (tail_O1 > 0)
    is_tail_OV[:, -1] = False
    return sorted_OV.masked_fill(is_tail_OV, -math.inf), order_OV


def _invert(probs_OV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return the first index at which the cumulative probability exceeds the row's random number (inverse CDF)."""
    cumulative_OV = probs_OV.double().cumsum(-1)
    uniform_O1 = torch.from_numpy(_uniform(rows)).to(cumulative_OV.device)[:, None]
    return torch.searchsorted(cumulative_OV, uniform_O1 * cumulative_OV[:, -1:], right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _uniform(rows: Sequence[SampleRow]) -> FloatArray:
    """Return numbers in [0, 1) that depend only on each row's seed and position."""
    # Any integer is a seed. The second of several answers has the request's seed plus one, which may exceed 64 bits.
    seeds_O = np.array([row.seed & _MASK_64 for row in rows], dtype=np.uint64)
    positions_O = np.array([row.position for row in rows], dtype=np.uint64)
    return (_mix(_mix(seeds_O) + positions_O) >> np.uint64(64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)


def _mix(value: UintArray) -> UintArray:
    """Turn a counter into a random number: a step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 17)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _logprobs(logits_OV: Tensor, tokens_O: Tensor, wanted: Sequence[tuple[int, int]]) -> dict[int, TokenLogprob]:
    """Return log-probabilities by row. `wanted` has rows, and how many alternatives each wants: O2 of them."""
    indices = [i for i, _ in wanted]
    logprobs_O2V = logits_OV[indices].log_softmax(-1)
    tokens_O2 = tokens_O[indices]
    chosen = logprobs_O2V.gather(1, tokens_O2[:, None])[:, 0].tolist()
    top = logprobs_O2V.topk(min(max(count for _, count in wanted), logits_OV.shape[1]), sorted=True)
    values, ids, tokens = top.values.tolist(), top.indices.tolist(), tokens_O2.tolist()
    return {
        i: TokenLogprob(tokens[n], chosen[n], tuple(zip(ids[n][:count], values[n][:count], strict=True)))
        for n, (i, count) in enumerate(wanted)
    }
