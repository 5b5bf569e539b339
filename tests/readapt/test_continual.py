"""Learning classes stage by stage: methods, losses, and adapters that an engine can serve."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from cluster.adapters.files import Adapter
from cluster.errors import TrainingError
from readapt.continual.directions import (
    Decoupled,
    DirectionSettings,
    DirectionWeights,
    decouple,
    fold,
    norm_of,
)
from readapt.continual.learn import Method, learn_stage, released_code
from readapt.continual.moments import contrasting, input_moments, with_moments
from readapt.continual.writer import LabelWriter, encode_labels, exact_points, labels_in
from readapt.training.chats import Chat
from readapt.training.data import Encoder, Row, encoder_for
from readapt.training.lora import attach, blank, linear_shapes, load_base
from tests.worlds.readapt import logits, random_factors
from tests.worlds.serving import make_checkpoint
from tests.worlds.two_linears import SHAPES, Two, a_state, deltas


@pytest.fixture
def model() -> Two:
    torch.manual_seed(0)
    return Two()


def test_later_stages_can_have_lower_ranks():
    method = Method(ranks=((0, 10), (4, 8), (8, 6)))  # the paper's rank reduction
    assert [method.rank_of(stage) for stage in range(10)] == [10] * 4 + [8] * 4 + [6] * 2


def test_contrasting_rows_respond_to_new_inputs_and_not_to_old_ones(model: Two):
    """Old inputs span three of five dimensions, new ones all five. Two rows of A take the other two."""
    basis_DD = torch.linalg.qr(torch.randn(5, 5))[0]
    old = [basis_DD[:, :3] @ torch.randn(3) for _ in range(40)]
    new = [basis_DD @ torch.randn(5) for _ in range(40)]
    learner = Squares(model)
    sketches = with_moments({}, input_moments(model, ["one"], learner.loss, old))
    moments = input_moments(model, ["one"], learner.loss, new)
    torch.testing.assert_close(sketches["one"].T @ sketches["one"], sum(torch.outer(x, x) for x in old))
    fresh = contrasting(blank(SHAPES, 2, 2.0), moments, sketches)
    responses = {
        name: (torch.stack(rows) @ fresh.factors["one"].a_RD.T).norm() for name, rows in (("old", old), ("new", new))
    }
    assert responses["old"] < 0.02 * responses["new"]
    assert torch.equal(fresh.factors["two"].a_RD, blank(SHAPES, 2, 2.0).factors["two"].a_RD), (
        "there is no sketch of this module's old inputs"
    )


def test_a_contrasting_method_keeps_sketches_and_freezes_the_rows(model: Two):
    rows, other = list(torch.randn(16, 5)), list(torch.randn(16, 5))
    method = Method(steps=4, ranks=((0, 2),), learning_rate=1e-2, contrasts=True)
    first = learn_stage(model, Decoupled(), Squares(model), rows, method, shapes=SHAPES, stage=0)
    torch.testing.assert_close(
        first.inputs["one"].T @ first.inputs["one"], sum(torch.outer(x, x) for x in rows), rtol=1e-4, atol=1e-4
    )
    second = learn_stage(model, first, Squares(model), other, method, shapes=SHAPES, stage=1)
    expected = contrasting(
        blank(SHAPES, 2, 2.0), {"one": sum(torch.outer(x, x) for x in other)}, {"one": first.inputs["one"]}
    )
    learned, frozen = second.directions[1].factors["one"].a_RD, expected.factors["one"].a_RD
    torch.testing.assert_close(normalize(learned, dim=1), frozen, rtol=1e-3, atol=1e-3)
    assert len(second.directions) == 2
    plain = replace(method, contrasts=False)
    assert not learn_stage(model, first, Squares(model), other, plain, shapes=SHAPES, stage=1).inputs, (
        "sketches of only some stages are dropped"
    )


def test_a_direction_that_inherits_starts_without_a_jump_and_can_be_distilled(model: Two):
    rows = list(torch.randn(16, 5))
    first = learn_stage(model, Decoupled(), Squares(model), rows, Method(steps=9), shapes=SHAPES, stage=0)
    idle = Method(steps=1, learning_rate=1e-9, inherits=True)
    second = learn_stage(model, first, Squares(model), rows, idle, shapes=SHAPES, stage=1)
    assert len(second.directions) == 2
    for name, delta in deltas(fold(second)).items():
        torch.testing.assert_close(delta, deltas(fold(first))[name], rtol=1e-2, atol=1e-2)
    dropped = learn_stage(model, first, Squares(model), rows, replace(idle, max_residual=9e-4), shapes=SHAPES, stage=1)
    assert len(dropped.directions) == 1
    assert dropped.magnitudes == pytest.approx(first.magnitudes, rel=1e-2)


def test_older_magnitudes_can_be_frozen(model: Two):
    settings = DirectionSettings(learns_old_magnitudes=False)
    method = Method(steps=4, learning_rate=1e-2, direction_settings=settings)
    state = learn_stage(model, a_state(), Squares(model), list(torch.randn(16, 5)), method, shapes=SHAPES, stage=1)
    assert state.magnitudes[:3] == a_state().magnitudes
    assert state.magnitudes[3] != 1.0


class Squares:
    """A learner for `Two` that makes outputs small."""

    def __init__(self, model: Two, extra: float = 1.0):
        self._model, self._extra = model, extra

    def loss(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return self._extra * self._model(torch.stack(rows)).square().mean()

    def parameters(self) -> list[nn.Parameter]:
        return []


def test_stages_follow_one_another_and_reduce_their_losses(model: Two):
    rows = list(torch.randn(64, 5))
    learner, state = Squares(model), Decoupled()
    losses = [learner.loss(rows).item()]
    method = Method(steps=25, ranks=((0, 3), (1, 1)), learning_rate=5e-2)
    for stage in range(2):
        state = learn_stage(model, state, learner, rows, method, shapes=SHAPES, stage=stage)
        assert learner.loss(rows).item() == losses[0], "the model is bare again"
        weights = DirectionWeights(model, state)
        losses.append(learner.loss(rows).item())
        weights.detach()
    assert losses[0] > losses[1] > losses[2]
    assert [direction.max_rank for direction in state.directions] == [3, 1]


def test_the_released_code_resets_magnitudes_and_normalises_by_factors(model: Two):
    rows = list(torch.randn(8, 5))
    method = released_code(Method(steps=1, learning_rate=1e-9))
    state = learn_stage(model, a_state(), Squares(model), rows, method, shapes=SHAPES, stage=0)
    assert state.magnitudes[:3] == pytest.approx((0.8, 0.8, 0.8), abs=1e-4)
    for direction in state.directions[:3]:
        assert [float(norm_of(f, "factors")) for f in direction.factors.values()] == pytest.approx(
            [1.0] * len(direction.factors), rel=1e-4
        )


def test_a_loss_that_is_not_finite_ends_the_stage_and_leaves_the_model_bare(model: Two):
    rows = list(torch.randn(8, 5))
    bare = model(rows[0])
    with pytest.raises(TrainingError, match="nan"):
        learn_stage(model, a_state(), Squares(model, float("nan")), rows, Method(), shapes=SHAPES, stage=0)
    assert torch.equal(model(rows[0]), bare)


# A causal LM that writes labels


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "v1", std=0.08)


def test_labels_in_chats_have_what_the_template_writes_before_an_answer(base: Path):
    model, shared = load_base(base), encoder_for(base, 64)
    encoder = Encoder(copy.deepcopy(shared.tokenizer), shared.eos_id, 64)
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    chats = [Chat(json.dumps({"messages": [{"role": "user", "content": text}]})) for text in ("1b", "2c")]
    rows = encoder.encode_all([Row(chats[0], "green"), Row(chats[1], "grey")])
    assert set(encode_labels(encoder, ["green", "grey"], chats[1])) == set(labels_in(rows))
    assert set(encode_labels(encoder, ["green", "grey"], "")).isdisjoint(labels_in(rows)), "the template adds a space"
    assert LabelWriter(model, encode_labels(encoder, ["gold"], chats[0]), labels_in(rows)).loss(rows) > 0


@pytest.mark.parametrize(("hides_old", "hidden"), [(False, {}), (True, {"": "z", "g": "o"})])
def test_the_loss_of_a_stage_hides_tokens_of_older_labels(base: Path, hides_old: bool, hidden: dict[str, str]):
    """Compares with a reference that goes through the positions one by one and leaves out the `hidden` characters."""
    model, encoder = load_base(base), encoder_for(base, 64)
    rows = encoder.encode_all([Row("1b=", "green"), Row("2c=", "grey")])
    writer = LabelWriter(model, encode_labels(encoder, ["zinc", "gold"], ""), labels_in(rows), hides_old=hides_old)
    loss = writer.loss(rows)
    losses = []
    for row, label in zip(rows, ("green", "grey"), strict=True):
        logits_TV = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        for position, target in enumerate(row.input_ids[row.num_prompt_tokens :]):
            prefix, x_V = label[:position], logits_TV[row.num_prompt_tokens + position - 1]
            keep_V = torch.ones_like(x_V, dtype=torch.bool)
            for character in hidden.get(prefix, ""):
                keep_V[encoder.tokenizer(character)["input_ids"][0]] = False
            losses.append(x_V[keep_V].logsumexp(0) - x_V[target])
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_exact_points_count_free_and_restricted_answers(base: Path):
    model, encoder = load_base(base), encoder_for(base, 64)
    rows = encoder.encode_all([Row("1b=", "green"), Row("2c=", "blue")])
    assert exact_points(model, rows) == 0.0
    assert exact_points(model, rows, labels_in(rows[:1]) + labels_in(rows[1:])) in (0.0, 50.0, 100.0)
    assert exact_points(model, rows[:1], labels_in(rows[:1])) == 100.0, "the only choice is right"


def test_attach_takes_a_folded_state(base: Path):
    model = load_base(base)
    shapes = linear_shapes(model)
    state = decouple(
        Adapter({n: random_factors(*shape, 2, 0.1, seed=i) for i, (n, shape) in enumerate(shapes.items())})
    )
    bare = logits(model)
    weights = DirectionWeights(model, state)
    expected = logits(model)
    weights.detach()
    lora = attach(model, fold(state))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    lora.detach()
    torch.testing.assert_close(logits(model), bare)
