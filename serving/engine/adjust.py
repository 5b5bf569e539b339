"""Adjust logits before a token is chosen: allowed and banned tokens, biases, penalties.

Only sequences that ask for adjustments have an `Adjuster`. All of a step are applied together. A row's changes are a
few (token, value) pairs, so the work grows with the tokens concerned and not with the vocabulary.
"""

from array import array
from collections.abc import Iterable, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from serving.engine.request import SamplingParams

_NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, frequency, presence


class TokenCounts:
    """The distinct tokens of a sequence, and how often each occurs in its output: 0 times, if only in the prompt."""

    def __init__(self, prompt_tokens: Iterable[int]):
        self.tokens = array("q", dict.fromkeys(prompt_tokens))
        self.counts = array("q", bytes(8 * len(self.tokens)))
        self._index = {token: index for index, token in enumerate(self.tokens)}

    def add(self, token: int) -> None:
        """Count a token of the output."""
        index = self._index.setdefault(token, len(self.tokens))
        if index == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[index] += 1


class Adjuster:
    """The adjustments that one sequence asks for, and the token counts that its penalties need.

    `penalties` are repetition, frequency and presence.
    """

    def __init__(self, sampling: SamplingParams, prompt_tokens: Sequence[int], end_ids: Set[int]):
        self.allowed = sampling.allowed_token_ids
        self.bias = sampling.logit_bias
        self.penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self.counts = TokenCounts(prompt_tokens) if self.penalties != _NO_PENALTIES else None
        self._num_prompt = self._num_counted = len(prompt_tokens)
        self._min_tokens = self._num_prompt + sampling.min_tokens
        self._end_ids = end_ids
        self._bad_words = sampling.bad_words

    def count(self, tokens: Sequence[int]) -> None:
        """Count the tokens that are new since the last call. `tokens` are all of the sequence, prompt first."""
        if self.counts is not None:
            for position in range(self._num_counted, len(tokens)):
                self.counts.add(tokens[position])
        self._num_counted = len(tokens)

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that may not come next: ends that come too early, and last tokens of bad words."""
        banned = list(self._end_ids) if len(tokens) < self._min_tokens else []
        for word in self._bad_words:
            first = len(tokens) - len(word) + 1
            if first >= self._num_prompt and tuple(tokens[first:]) == word[:-1]:
                banned.append(word[-1])
        return banned


def new_adjuster(sampling: SamplingParams, prompt_tokens: Sequence[int], end_ids: Set[int]) -> Adjuster | None:
    """Return the adjuster of a request, or None if its logits stay as they are."""
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    others = (sampling.logit_bias, sampling.bad_words, sampling.min_tokens, sampling.allowed_token_ids)
    return Adjuster(sampling, prompt_tokens, end_ids) if penalties != _NO_PENALTIES or any(others) else None


def adjust(logits_RV: Tensor, adjusters: Sequence[Adjuster], tokens: Sequence[Sequence[int]]) -> None:
    """Adjust the logits of R rows in place. Row i has `adjusters[i]`, and its sequence has `tokens[i]` so far.

    The order is vLLM's: allowed tokens, banned tokens, biases, penalties.
    """
    for row, adjuster in enumerate(adjusters):
        adjuster.count(tokens[row])
        if adjuster.allowed:
            _keep_only(logits_RV[row], adjuster.allowed)
    _ban(logits_RV, [adjuster.banned(tokens[row]) for row, adjuster in enumerate(adjusters)])
    _add_biases(logits_RV, [adjuster.bias for adjuster in adjusters])
    _penalise(logits_RV, [(row, one) for row, one in enumerate(adjusters) if one.counts is not None])


def _keep_only(logits_V: Tensor, allowed: Sequence[int]) -> None:
    kept = torch.tensor(allowed, device=logits_V.device)
    values = logits_V[kept]
    logits_V.fill_(-torch.inf)
    logits_V[kept] = values


def _ban(logits_RV: Tensor, banned: Sequence[Sequence[int]]) -> None:
    rows, tokens = _flat(banned, logits_RV)
    logits_RV[rows, tokens] = -torch.inf


def _add_biases(logits_RV: Tensor, biases: Sequence[Sequence[tuple[int, float]]]) -> None:
    rows, tokens = _flat([[token for token, _ in bias] for bias in biases], logits_RV)
    values = torch.tensor([value for bias in biases for _, value in bias], dtype=torch.float64).to(logits_RV)
    logits_RV[rows, tokens] += values


def _penalise(logits_RV: Tensor, penalised: Sequence[tuple[int, Adjuster]]) -> None:
    """Apply repetition penalties to prompt and output (CTRL, arXiv 1909.05858), the others to the output (OpenAI)."""
    counts = [one.counts for _, one in penalised if one.counts is not None]
    if not counts:
        return
    lengths = [len(one.tokens) for one in counts]
    rows = np.repeat([row for row, _ in penalised], lengths)
    tokens = np.concatenate([np.array(one.tokens) for one in counts])
    num_output = np.concatenate([np.array(one.counts) for one in counts])
    repetition, frequency, presence = np.repeat([one.penalties for _, one in penalised], lengths, axis=0).T
    at = torch.from_numpy(rows).to(logits_RV.device), torch.from_numpy(tokens).to(logits_RV.device)
    values, factors = logits_RV[at], torch.from_numpy(repetition).to(logits_RV)
    values = torch.where(values > 0, values / factors, values * factors)
    logits_RV[at] = values - torch.from_numpy(frequency * num_output + presence * (num_output > 0)).to(logits_RV)


def _flat(tokens: Sequence[Sequence[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the tokens of a ragged list, as indices."""
    rows = torch.tensor([row for row, some in enumerate(tokens) for _ in some], dtype=torch.long)
    return rows.to(like.device), torch.tensor([one for some in tokens for one in some], dtype=torch.long).to(
        like.device
    )
