"""Penalties, biases and bans give the logits of transformers' processors, alone and together, whatever the batch."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serving.engine.adjust import Adjuster, adjust, new_adjuster
from serving.engine.request import SamplingParams
from serving.engine.sampler import SampleRow, sample, sample_array

VOCAB = 23
PROMPT = (3, 5, 5, 7)
END = frozenset({1, 2})


def random_logits(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adjuster_of(prompt: Sequence[int] = PROMPT, **sampling: object) -> Adjuster:
    return Adjuster(SamplingParams(**sampling), prompt, END)


def adjusted(logits: Tensor, output: Sequence[int], prompt: Sequence[int] = PROMPT, **sampling: object) -> Tensor:
    """Return one row's logits after the adjustments."""
    result = logits.clone()
    adjust(result, [adjuster_of(prompt, **sampling)], [[*prompt, *output]])
    return result


def processed(processor: LogitsProcessor, tokens: Sequence[int], logits: Tensor) -> Tensor:
    return processor(torch.tensor([list(tokens)]).reshape(1, -1).long(), logits.clone())


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=60, deadline=None)
@given(output=tokens, penalty=st.floats(0.1, 5.0), seed=st.integers(0, 99))
def test_the_repetition_penalty_is_that_of_transformers(output: list[int], penalty: float, seed: int):
    logits = random_logits(1, seed)
    expected = processed(RepetitionPenaltyLogitsProcessor(penalty), [*PROMPT, *output], logits)
    torch.testing.assert_close(adjusted(logits, output, repetition_penalty=penalty), expected)


@settings(max_examples=60, deadline=None)
@given(output=tokens, frequency=st.floats(-2, 2), presence=st.floats(-2, 2), seed=st.integers(0, 99))
def test_frequency_and_presence_penalties_are_those_of_openai(
    output: list[int], frequency: float, presence: float, seed: int
):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, where c counts the output's tokens."""
    logits = random_logits(1, seed)
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB).double()
    expected = logits - frequency * counts - presence * (counts > 0).double()
    got = adjusted(logits, output, frequency_penalty=frequency, presence_penalty=presence)
    torch.testing.assert_close(got, expected)


@settings(max_examples=60, deadline=None)
@given(output=tokens, words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=5))
def test_bad_words_are_banned_as_in_transformers(output: list[int], words: list[list[int]]):
    """As in vLLM a word counts only if it lies in the output whole, so the reference sees only the output."""
    logits = random_logits(1)
    expected = logits
    if output:
        expected = processed(NoBadWordsLogitsProcessor(words, eos_token_id=VOCAB - 1), output, logits)
    else:
        expected = logits.clone()
        expected[0, [word[0] for word in words if len(word) == 1]] = -torch.inf
    assert torch.equal(adjusted(logits, output, bad_words=tuple(map(tuple, words))), expected)


@settings(max_examples=60, deadline=None)
@given(bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), min_size=1, max_size=6))
def test_biases_are_those_of_transformers(bias: dict[int, float]):
    logits = random_logits(1)
    processor = SequenceBiasLogitsProcessor({(token,): value or 1e-300 for token, value in bias.items()})
    expected = processed(processor, PROMPT, logits)
    torch.testing.assert_close(adjusted(logits, [4], logit_bias=tuple(bias.items())), expected, rtol=1e-6, atol=1e-6)


def test_only_allowed_tokens_remain():
    logits = random_logits(1)
    got = adjusted(logits, [], allowed_token_ids=(4, 9, 4))
    assert got.isfinite().nonzero()[:, 1].tolist() == [4, 9]
    assert torch.equal(got[0, [4, 9]], logits[0, [4, 9]])


@pytest.mark.parametrize("num_output", [0, 2, 3, 7])
def test_ends_are_banned_until_there_are_enough_tokens(num_output: int):
    got = adjusted(random_logits(1), [9] * num_output, min_tokens=3)
    assert (got[0] == -torch.inf).nonzero()[:, 0].tolist() == (sorted(END) if num_output < 3 else [])


def test_adjustments_apply_in_vllms_order():
    """A bias comes before the penalties, and a ban outlasts both."""
    output, params = [6, 6, 2], {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    got = adjusted(logits, output, **params, logit_bias=((6, 4.0), (8, 1.0), (3, -2.0)), bad_words=((8,),))
    assert got[0, 6] == 4.0 / 2 - 2 * 0.5 - 0.25
    assert got[0, 3] == -2.0 * 2, "a prompt token with a negative logit"
    assert got[0, 2] == -0.75
    assert got[0, 8] == -torch.inf
    assert got[0, 10] == 0


ROWS = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"logit_bias": ((2, 5.0), (4, -5.0))},
    {"bad_words": ((6,), (9, 4)), "min_tokens": 4},
    {"allowed_token_ids": (1, 2, 3, 4, 5, 6), "repetition_penalty": 0.8},
    {"presence_penalty": 2.0, "logit_bias": ((9, 1.0),), "bad_words": ((4, 4),)},
]


def test_a_row_is_adjusted_the_same_in_any_batch():
    outputs = [[9], [4, 4, 9], [], [6, 9], [1, 1], [4]]
    logits = random_logits(len(ROWS), dtype=torch.float32)
    together = logits.clone()
    sequences = [[*PROMPT, *output] for output in outputs]
    adjust(together, [adjuster_of(**params) for params in ROWS], sequences)
    for row, (output, params) in enumerate(zip(outputs, ROWS, strict=True)):
        alone = adjusted(logits[row : row + 1], output, **params)[0]
        assert torch.equal(together[row], alone), params
        assert not torch.equal(alone, logits[row]), params


def test_counts_follow_the_sequence_token_by_token():
    """Counted one by one or all at once, as after a resumption, the output is the same."""
    output = [4, 9, 4, 3, 21, 4]
    params = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1}
    adjuster, logits = adjuster_of(**params), random_logits(1)
    for length in range(len(output) + 1):
        step = logits.clone()
        adjust(step, [adjuster], [[*PROMPT, *output[:length]]])
        assert torch.equal(step, adjusted(logits, output[:length], **params))


def test_neutral_values_ask_for_no_adjuster():
    neutral = SamplingParams(temperature=0.7, top_p=0.5, top_k=4, min_p=0.3, stop_token_ids=(4,), seed=1)
    assert new_adjuster(neutral, PROMPT, END) is None
    for params in ROWS:
        assert new_adjuster(replace(neutral, **params), PROMPT, END) is not None


# In the sampler.


def row_of(**more: object) -> SampleRow:
    return SampleRow(**{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "position": 0, **more})


def ban_tokens(*banned: int):
    def apply(logits_RV: Tensor, indices: Sequence[int]) -> None:
        logits_RV[:, list(banned)] = -torch.inf

    return apply


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"min_p": 0.01}])
def test_only_the_adjusted_rows_change(temperature: float, more: dict):
    logits = random_logits(6, dtype=torch.float32)
    rows = [row_of(temperature=temperature, seed=i, is_adjusted=i % 2 == 0, **more) for i in range(6)]
    plain = sample(logits.clone(), sample_array([row._replace(is_adjusted=False) for row in rows]))
    changed = sample(logits.clone(), sample_array(rows), ban_tokens(*plain.tokens))
    assert all(changed.is_valid)
    for i in range(6):
        assert (changed.tokens[i] == plain.tokens[i]) == (i % 2 == 1)
        assert i % 2 or changed.tokens[i] not in plain.tokens


def test_logprobs_are_taken_before_the_adjustments():
    logits = random_logits(1, dtype=torch.float32)
    expected = logits.log_softmax(-1)[0]
    best = int(logits.argmax())
    samples = sample(logits.clone(), sample_array([row_of(is_adjusted=True, num_logprobs=2)]), ban_tokens(best))
    (logprob,) = samples.logprobs.values()
    assert logprob.token == samples.tokens[0] != best
    assert logprob.logprob == pytest.approx(float(expected[logprob.token]))
    assert logprob.top[0] == (best, pytest.approx(float(expected[best])))
    assert logprob.rank == 2


def test_a_row_without_an_allowed_token_is_blocked_and_the_others_are_not():
    logits = random_logits(3, dtype=torch.float32)
    rows = [row_of(num_logprobs=1), row_of(is_adjusted=True, num_logprobs=1), row_of(temperature=1.0)]
    clean = sample(logits[[0, 2]], sample_array([rows[0], rows[2]]))
    samples = sample(logits.clone(), sample_array(rows), ban_tokens(*range(VOCAB)))
    assert samples.is_valid == [True, False, True]
    assert samples.blocked == {1}
    assert set(samples.logprobs) == {0}
    assert samples.tokens[::2] == clean.tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3.0),
    min_p=st.floats(0.001, 1.0),
    top_k=st.integers(0, VOCAB),
    top_p=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_min_p_keeps_the_tokens_of_transformers(seed: int, temperature: float, min_p: float, top_k: int, top_p: float):
    """vLLM applies min_p first, then top-k and top-p. Nothing is drawn that transformers' warpers remove."""
    logits = random_logits(1, seed, torch.float32)
    expected = processed(
        MinPLogitsWarper(min_p), PROMPT, processed(TemperatureLogitsWarper(temperature), PROMPT, logits)
    )
    if top_k:
        expected = processed(TopKLogitsWarper(top_k), PROMPT, expected)
    if top_p < 1:
        expected = processed(TopPLogitsWarper(top_p), PROMPT, expected)
    rows = [
        row_of(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, position=i, min_p=min_p)
        for i in range(200)
    ]
    drawn = set(sample(logits.expand(200, -1), sample_array(rows)).tokens)
    kept = set(expected[0].isfinite().nonzero()[:, 0].tolist())
    assert drawn <= kept
    probs = expected[0].softmax(-1)
    assert {token for token in kept if probs[token] > 0.1} <= drawn
