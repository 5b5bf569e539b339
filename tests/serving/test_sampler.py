"""The sampler has transformers' distributions, and a row's token does not depend on the other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serving.engine.sampler import Adjust, SampleRow, Samples, _uniform, sample_array
from serving.engine.sampler import sample as sample_rows

VOCAB = 50
GREEDY = SampleRow(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0)


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, rows: list[SampleRow], adjust: Adjust | None = None) -> Samples:
    return sample_rows(logits, sample_array(rows), adjust)


def tokens_of(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return sample(logits, rows).tokens


def reference_probs(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the distribution that transformers' `generate` draws from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits_V[None])[0].softmax(-1)


SETTINGS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.5, 7, 1.0),
    (0.9, 0, 0.8),
    (1.2, 12, 0.7),
    (1.0, 1, 0.5),
    (2.0, 500, 0.999),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_filtered_distribution_of_transformers(temperature: float, top_k: int, top_p: float):
    count = 20_000
    logits_V = random_logits(1, seed=3)[0]
    rows = [SampleRow(temperature, top_p, top_k, seed=11, position=i) for i in range(count)]
    drawn = torch.bincount(torch.tensor(tokens_of(logits_V.expand(count, -1), rows)), minlength=VOCAB)
    expected = reference_probs(logits_V, temperature, top_k, top_p)
    assert drawn[expected == 0].sum() == 0
    assert drawn[expected > 5 / count].min() > 0  # every token that may be drawn is drawn at some point (fixed seeds)
    deviation = (drawn / count - expected).abs() / (expected * (1 - expected) / count).sqrt().clamp(min=1 / count)
    assert deviation.max() < 4.5


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1.0),
)
def test_only_tokens_that_transformers_keeps_are_drawn(seed: int, temperature: float, top_k: int, top_p: float):
    logits = random_logits(1, seed=seed)
    expected = reference_probs(logits[0], temperature, top_k, top_p)
    rows = [SampleRow(temperature, top_p, top_k, seed, position) for position in range(200)]
    drawn = set(tokens_of(logits.expand(200, -1), rows))
    assert drawn <= set(expected.nonzero()[:, 0].tolist())
    if (expected > 0).sum() == 1:
        assert drawn == {int(expected.argmax())}


def test_ties_with_the_kth_token_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    drawn = set(tokens_of(logits.expand(400, -1), [SampleRow(1.0, 1.0, 2, 5, i) for i in range(400)]))
    assert drawn == {0, 1, 2}


def mixed_rows(count: int) -> list[SampleRow]:
    kinds = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 5), (0.8, 0.6, 20)]
    return [SampleRow(*kinds[i % len(kinds)], seed=i * 7919, position=i) for i in range(count)]


def test_greedy_is_argmax_and_ignores_the_seed():
    logits = random_logits(9)
    rows = [SampleRow(temperature, 0.5, 3, seed, 4) for seed, temperature in enumerate([0.0] * 8 + [1e-9])]
    assert tokens_of(logits, rows) == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_in_any_batch():
    rows, logits = mixed_rows(40), random_logits(40)
    together = tokens_of(logits, rows)
    alone = [tokens_of(logits[i : i + 1], rows[i : i + 1])[0] for i in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = tokens_of(logits[order], [rows[i] for i in order])
    assert together == alone
    assert shuffled == [together[i] for i in order]


def test_only_seed_and_position_decide():
    logits = torch.zeros(1, VOCAB)
    by_seed = {seed: tokens_of(logits, [SampleRow(1.0, 1.0, 0, seed, 3)])[0] for seed in range(-20, 40)}
    by_position = {position: tokens_of(logits, [SampleRow(1.0, 1.0, 0, 3, position)])[0] for position in range(60)}
    assert len(set(by_seed.values())) > 25
    assert len(set(by_position.values())) > 25
    torch.manual_seed(123)
    assert tokens_of(logits, [SampleRow(1.0, 1.0, 0, 2**63 - 1, 3)]) == tokens_of(
        logits, [SampleRow(1.0, 1.0, 0, 2**63 - 1, 3)]
    )


def test_streams_of_neighbouring_seeds_are_unrelated():
    """The k-th draw of seed s and the (k-1)-th of seed s + 1 must not be the same number."""
    logits = torch.zeros(1, 1000).expand(300, -1)
    first, second = (
        tokens_of(logits, [SampleRow(1.0, 1.0, 0, seed, position) for position in range(300)]) for seed in (8, 9)
    )
    for shift in range(5):
        equal = sum(a == b for a, b in zip(first[shift:], second, strict=False))
        assert equal < 10


def test_logprobs_are_those_of_the_models_own_distribution():
    logits = random_logits(5)
    counts = [None, 0, 3, VOCAB + 9, 1]
    rows = [SampleRow(0.3, 0.5, 4, i, i, count) for i, count in enumerate(counts)]
    expected = logits.log_softmax(-1)
    samples = sample(logits, rows)
    for i, (token, count) in enumerate(zip(samples.tokens, counts, strict=True)):
        if count is None:
            assert i not in samples.logprobs
            continue
        logprob = samples.logprobs[i]
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(expected[i, token]))
        values, ids = expected[i].topk(min(count, VOCAB))
        assert [token for token, _ in logprob.top] == ids.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_is_invalid_and_the_others_are_not(bad: float):
    rows, logits = mixed_rows(10), random_logits(10)
    rows = [SampleRow(r.temperature, r.top_p, r.top_k, r.seed, r.position, 2) for r in rows]
    clean = sample(logits, rows)
    poisoned = logits.clone()
    for i in range(5):
        poisoned[i, 7 + i] = bad
    result = sample(poisoned, rows)
    assert result.is_valid == [False] * 5 + [True] * 5
    assert result.tokens[5:] == clean.tokens[5:]
    assert result.logprobs == {i: clean.logprobs[i] for i in range(5, 10)}
    assert all(clean.is_valid)


def test_a_row_without_any_allowed_token_is_invalid():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[1, 4] = 0.0
    result = sample(logits, [GREEDY, SampleRow(1.0, 0.9, 3, 0, 0)])
    assert result.is_valid == [False, True]
    assert result.tokens[1] == 4


def test_extreme_valid_parameters():
    logits = torch.tensor([[1e4, -1e4, 9999.0]]).repeat(4, 1)
    rows = [SampleRow(1.1e-5, 1.0, 0, 1, 1), SampleRow(100.0, 1e-9, 0, 1, 1), SampleRow(1.0, 0.0, 0, 1, 1), GREEDY]
    assert tokens_of(logits, rows) == [0, 0, 0, 0]


def test_an_empty_batch_has_no_tokens():
    assert sample(torch.empty(0, VOCAB), []) == Samples([], [], {})


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, -(2**63), 2**64 + 5, -1])
def test_any_integer_is_a_seed(seed: int):
    rows = [SampleRow(1.0, 1.0, 0, seed=one, position=4) for one in (seed, seed % 2**64, seed + 1)]
    tokens = sample(random_logits(1).repeat(3, 1), rows).tokens
    uniforms = _uniform(sample_array(rows))
    assert tokens[0] == tokens[1]
    assert uniforms[0] == uniforms[1] != uniforms[2]
    assert all(0 <= uniform < 1 for uniform in uniforms)
