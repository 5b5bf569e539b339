"""Choose the next tokens from logits: one batched call for rows with different parameters.

A row's token depends only on its own logits, parameters, seed and position. Each row takes the path that its own
parameters ask for. Its one random number comes from a counter-based generator, not from a shared stream.

The order is vLLM's: log-probabilities are taken of the raw logits; then come the adjustments (`serving.engine.adjust`),
temperature, min_p, top_k, top_p, and the draw. Greedy rows stop after the adjustments.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.request import TokenLogprob

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
UintArray = NDArray[np.uint64]
SampleArray = NDArray[Any]  # of SAMPLE_ROW

# Division by a lower temperature overflows. The distribution is a single token there anyway.
_GREEDY_TEMPERATURE = 1e-5
_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 48  # few enough that uniform * total < total holds in float64

SAMPLE_ROW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("position", np.int64),
        ("num_logprobs", np.int64),
        ("min_p", np.float64),
        ("is_adjusted", np.bool_),
        ("is_constrained", np.bool_),
    ],
    align=True,  # so that each column can be a tensor
)


class SampleRow(NamedTuple):
    """How to choose one row's token. The fields are those of `SamplingParams`, and of SAMPLE_ROW.

    `position` is the new token's position in the sequence. A request without a seed gets one when it is submitted, so
    that preemption does not change its tokens. `is_adjusted` says that the row's logits are adjusted first,
    `is_constrained` that a grammar's mask applies to them.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    num_logprobs: int | None = None
    min_p: float = 0.0
    is_adjusted: bool = False
    is_constrained: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the row just takes its likeliest token."""
        is_drawn = self.temperature >= _GREEDY_TEMPERATURE
        return not (is_drawn or self.is_adjusted or self.is_constrained or self.num_logprobs is not None)

    def record(self) -> tuple[Any, ...]:
        """Return the row as an element of a SampleArray, where `num_logprobs` -1 means None."""
        # Any integer is a seed. The second of several answers has the request's seed plus one: maybe over 64 bits.
        num_logprobs = -1 if self.num_logprobs is None else self.num_logprobs
        return self._replace(seed=self.seed & _MASK_64, num_logprobs=num_logprobs)


PLAIN_ROW = SampleRow(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0)


def sample_array(rows: Sequence[SampleRow]) -> SampleArray:
    """Return the rows as an array of SAMPLE_ROW."""
    return np.array([row.record() for row in rows], SAMPLE_ROW)


class Samples(NamedTuple):
    """The tokens of all rows. If `is_valid` is False, the logits were NaN or infinite and the token is meaningless.

    `logprobs` maps each valid row that asked for log-probabilities to them. `blocked` rows are not valid either: their
    adjustments allow no token.
    """

    tokens: list[int]
    is_valid: list[bool]
    logprobs: dict[int, TokenLogprob]
    blocked: frozenset[int] = frozenset()


# Changes the logits [R, V] of some rows, given by index, in place.
Adjust = Callable[[Tensor, Sequence[int]], None]


def sample(
    logits_OV: Tensor, rows_O: SampleArray, adjust: Adjust | None = None, mask: Callable[[Tensor], None] | None = None
) -> Samples:
    """Choose the next token of every row, in order. `adjust` is called for the adjusted rows, if there are any.

    `mask` sets the logits of tokens that a grammar does not allow to -inf, in place, in the constrained rows.

    logits_OV is float32; adjusted and constrained rows are overwritten. Log-probabilities are of the model's own
    distribution, before masks, adjustments, temperature and filters.
    """
    assert logits_OV.shape[0] == len(rows_O), f"{logits_OV.shape[0]} rows of logits, {len(rows_O)} of parameters"
    if not len(rows_O):
        return Samples([], [], {})
    largest_O, tokens_O = _largest(logits_OV)
    is_valid_O = largest_O.isfinite()  # the maximum is NaN if any logit is, and -inf if all are
    is_drawn_O = rows_O["temperature"] >= _GREEDY_TEMPERATURE
    is_changed_O = rows_O["is_adjusted"] | rows_O["is_constrained"]
    if not (is_drawn_O | is_changed_O | (rows_O["num_logprobs"] >= 0)).any():
        return Samples(tokens_O.tolist(), is_valid_O.tolist(), {})
    return _sample_special(logits_OV, rows_O, is_drawn_O, tokens_O, is_valid_O, adjust, mask)


def _sample_special(
    logits_OV: Tensor,
    rows_O: SampleArray,
    is_drawn_O: NDArray[np.bool_],
    tokens_O: Tensor,
    is_valid_O: Tensor,
    adjust: Adjust | None,
    mask: Callable[[Tensor], None] | None,
) -> Samples:
    """Choose again for the rows that want more than their likeliest token, which `tokens_O` has."""
    if not is_valid_O.all():  # copying all logits takes longer than all other work here
        logits_OV = logits_OV.masked_fill(~is_valid_O[:, None], 0.0)
    is_valid = is_valid_O.tolist()
    asking = np.flatnonzero((rows_O["num_logprobs"] >= 0) & np.array(is_valid))
    raw_logprobs_O2V = logits_OV[asking].log_softmax(-1)
    if mask is not None:
        mask(logits_OV)
    _adjust(logits_OV, np.flatnonzero(rows_O["is_adjusted"]), adjust)
    blocked = _choose_again(logits_OV, np.flatnonzero(rows_O["is_adjusted"] | rows_O["is_constrained"]), tokens_O)
    is_filtered_O = (rows_O["top_k"] > 0) | (rows_O["top_p"] < 1.0)
    for is_chosen_O, draw in ((is_drawn_O & ~is_filtered_O, _draw), (is_drawn_O & is_filtered_O, _draw_filtered)):
        indices = np.flatnonzero(is_chosen_O)
        if len(indices):
            tokens_O[indices] = draw(_tempered(logits_OV[indices], rows_O[indices]), rows_O[indices])
    logprobs = token_logprobs(raw_logprobs_O2V, tokens_O[asking], rows_O["num_logprobs"][asking].tolist())
    return Samples(
        tokens_O.tolist(),
        [is_sound and row not in blocked for row, is_sound in enumerate(is_valid)],
        {row: one for row, one in zip(asking.tolist(), logprobs, strict=True) if row not in blocked},
        blocked,
    )


def _adjust(logits_OV: Tensor, indices: IntArray, adjust: Adjust | None) -> None:
    """Adjust some rows' logits."""
    if len(indices):
        assert adjust is not None, "rows are adjusted, but nothing adjusts them"
        logits_RV = logits_OV[indices]
        adjust(logits_RV, indices.tolist())
        logits_OV[indices] = logits_RV


def _choose_again(logits_OV: Tensor, indices: IntArray, tokens_O: Tensor) -> frozenset[int]:
    """Set the likeliest tokens of rows whose logits have changed. Return the rows that have no allowed token left."""
    if not len(indices):
        return frozenset()
    logits_RV = logits_OV if len(indices) == len(logits_OV) else logits_OV[indices]
    largest_R, tokens_O[indices] = _largest(logits_RV)
    is_blocked_R = largest_R == -math.inf
    if is_blocked_R.any():
        logits_OV[indices] = logits_RV.masked_fill(is_blocked_R[:, None], 0.0)
    return frozenset(indices[is_blocked_R.numpy(force=True)].tolist())


def _largest(logits_OV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and its index. On a CPU NumPy finds it five times as fast as torch."""
    if logits_OV.device.type != "cpu":
        return torch.max(logits_OV, -1)
    tokens_O = torch.from_numpy(logits_OV.numpy().argmax(-1))
    return logits_OV.gather(1, tokens_O[:, None])[:, 0], tokens_O


def _draw(logits_OV: Tensor, rows_O: SampleArray) -> Tensor:
    return _invert(logits_OV.softmax(-1), rows_O)


def _draw_filtered(logits_OV: Tensor, rows_O: SampleArray) -> Tensor:
    sorted_OV, order_OV = _filtered(logits_OV, rows_O)
    ranks_O = _invert(sorted_OV.softmax(-1), rows_O)
    return order_OV.gather(1, ranks_O[:, None])[:, 0]


def _tempered(logits_OV: Tensor, rows_O: SampleArray) -> Tensor:
    """Return the logits after temperature and min_p: a token stays if it has min_p of the likeliest's probability."""
    logits_OV = logits_OV / _column(rows_O["temperature"], logits_OV)
    if not rows_O["min_p"].any():
        return logits_OV
    floor_O1 = logits_OV.amax(-1, keepdim=True) + _column(rows_O["min_p"], logits_OV).log()
    return logits_OV.masked_fill(logits_OV < floor_O1, -math.inf)


def _filtered(logits_OV: Tensor, rows_O: SampleArray) -> tuple[Tensor, Tensor]:
    """Return the logits in ascending order, with -inf for tokens that may not be drawn, and their tokens.

    First comes top-k; ties with the k-th token stay. Then comes top-p on the rest: the smallest set of likeliest tokens
    whose probabilities add up to at least top_p, never empty. Order and thresholds are those of transformers' warpers.
    """
    num_tokens, top_k_O = logits_OV.shape[1], rows_O["top_k"]
    sorted_OV, order_OV = logits_OV.sort(dim=-1, stable=True)
    num_kept_O = np.where(top_k_O > 0, np.minimum(top_k_O, num_tokens), num_tokens)
    kth_O = torch.from_numpy(num_tokens - num_kept_O).to(logits_OV.device)
    sorted_OV = sorted_OV.masked_fill(sorted_OV < sorted_OV.gather(1, kth_O[:, None]), -math.inf)
    tail_O1 = _column(1 - rows_O["top_p"], logits_OV)
    is_tail_OV = (sorted_OV.softmax(-1).cumsum(-1) <= tail_O1) & (tail_O1 > 0)
    is_tail_OV[:, -1] = False
    return sorted_OV.masked_fill(is_tail_OV, -math.inf), order_OV


def _invert(probs_OV: Tensor, rows_O: SampleArray) -> Tensor:
    """Return the first index at which the cumulative probability exceeds the row's random number (inverse CDF)."""
    cumulative_OV = probs_OV.double().cumsum(-1)
    uniform_O1 = torch.from_numpy(_uniform(rows_O)).to(cumulative_OV.device)[:, None]
    return torch.searchsorted(cumulative_OV, uniform_O1 * cumulative_OV[:, -1:], right=True)[:, 0]


def _column(values_O: FloatArray, like: Tensor) -> Tensor:
    return torch.from_numpy(values_O).to(like)[:, None]


def _uniform(rows_O: SampleArray) -> FloatArray:
    """Return numbers in [0, 1) that depend only on each row's seed and position."""
    positions_O = rows_O["position"].astype(np.uint64)
    return (_mix(_mix(rows_O["seed"]) + positions_O) >> np.uint64(64 - _UNIFORM_BITS)) / (1 << _UNIFORM_BITS)


def _mix(value: UintArray) -> UintArray:
    """Turn a counter into a random number: a step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 17)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def token_logprobs(logprobs_OV: Tensor, tokens_O: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability and the rank of each row's token, and the row's `num_top` likeliest tokens."""
    if not num_top:
        return []
    chosen_O1 = logprobs_OV.gather(1, tokens_O[:, None])
    ranks = ((logprobs_OV > chosen_O1).sum(-1) + 1).tolist()
    top = logprobs_OV.topk(min(max(num_top), logprobs_OV.shape[1]), sorted=True)
    values, ids = top.values.tolist(), top.indices.tolist()
    return [
        TokenLogprob(token, chosen, tuple(zip(ids[n][:count], values[n][:count], strict=True)), ranks[n])
        for n, (token, chosen, count) in enumerate(
            zip(tokens_O.tolist(), chosen_O1[:, 0].tolist(), num_top, strict=True)
        )
    ]
