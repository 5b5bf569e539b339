"""Recall: the readout of a model, statistics of classes, and stages that are learned from them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.adapters.files import Adapter
from cluster.errors import InvalidCheckpointError
from readapt.continual.direction_files import load_directions, save_directions
from readapt.continual.directions import Decoupled, DirectionWeights
from readapt.continual.learn import Method, Recall, recalling
from readapt.continual.recall import Top, draws, recall_stage, with_classes
from readapt.continual.writer import LabelWriter, exact_points, labels_in
from readapt.training.data import Encoded, Row, collate, encoder_for
from readapt.training.evaluate import label_logits
from readapt.training.lora import attached, blank, linear_shapes, load_base
from tests.worlds.readapt import random_factors
from tests.worlds.serving import make_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "v1", std=0.08)


def rows_of(base: Path, letters: str) -> list[Encoded]:
    """Return rows such as "117 b:" -> "nB", where the letter decides."""
    rows = [Row(f"{number} {letter}:", f"n{letter.upper()}") for number in range(100, 130) for letter in letters]
    return encoder_for(base, 64).encode_all(rows)


def test_the_top_gives_the_logits_of_the_whole_model(base: Path):
    model, rows = load_base(base), rows_of(base, "ab")[:7]
    top = Top(model)
    shapes = linear_shapes(model).items()
    adapter = Adapter({name: random_factors(*shape, 2, 0.02, seed=3) for name, shape in shapes})
    with attached(model, adapter):
        vectors_YD, tokens_Y = top.features(rows)
        expected_YV, labels_Y, _ = label_logits(model, collate(rows))
        torch.testing.assert_close(top.logits(vectors_YD), expected_YV, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens_Y, labels_Y), "tokens come in the order of the rows"
    assert top.shapes.items() <= linear_shapes(model).items()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_of_another_layout_is_refused():
    model = nn.Linear(2, 2)
    model.base_model = nn.Linear(2, 2)
    with pytest.raises(InvalidCheckpointError, match="Llama's module layout"):
        Top(model)


def test_statistics_of_two_stages_match_those_of_their_vectors():
    torch.manual_seed(0)
    vectors_YD = torch.randn(12, 3)
    places = [(label, place) for label in ((5, 6), (7, 8)) for _ in range(3) for place in (0, 1)]
    tokens_Y = torch.tensor([label[place] for label, place in places])
    kept: dict[str, torch.Tensor] = {}
    for half in (slice(0, 6), slice(6, 12)):
        kept = with_classes(kept, vectors_YD[half], tokens_Y[half], places[half])
    assert kept["tokens"].tolist() == [5, 6, 7, 8]
    assert kept["places"].tolist() == [0, 1, 0, 1]
    assert kept["freedom"].tolist() == [4.0, 4.0, 0.0]
    torch.testing.assert_close(kept["means"][2], vectors_YD[6::2].mean(0))
    covariance_DD = sum(part.T.cov(correction=0) * 3 for part in (vectors_YD[:6:2], vectors_YD[6::2]))
    torch.testing.assert_close(kept["scatter"][0], covariance_DD)


@pytest.mark.parametrize(("num_rows", "stretch"), [(2, 1.0), (40, 300.0), (400, 3000.0)])
def test_draws_have_the_spread_of_their_class_even_for_few_rows_on_a_line(num_rows: int, stretch: float):
    """A scatter that is summed in float32 has eigenvalues so far below zero that a ridge does not help."""
    torch.manual_seed(0)
    width = 192
    along_D = nn.functional.normalize(torch.randn(width), dim=0)
    vectors_YD = torch.randn(num_rows, width) + stretch * torch.randn(num_rows, 1) * along_D
    places = [((1, 2), index % 2) for index in range(num_rows)]
    tokens_Y = torch.tensor([1 + place for _, place in places])
    classes = with_classes({}, vectors_YD, tokens_Y, places)
    drawn_YD, written_Y = next(draws(classes, 4000, seed=1))
    own_YD, drawn_YD = vectors_YD[::2], drawn_YD[written_Y == 1]
    torch.testing.assert_close(drawn_YD.mean(0), own_YD.mean(0), rtol=0.1, atol=0.1 * stretch)
    spread = own_YD.double().var(0, correction=1).sum() if num_rows > 2 else torch.zeros(())
    torch.testing.assert_close(drawn_YD.double().var(0).sum(), spread, rtol=0.15, atol=1e-6, check_dtype=False)


def test_stages_are_learned_from_statistics_and_the_first_is_not_lost(base: Path, tmp_path: Path):
    model = load_base(base)
    method = recalling(Method(60, ranks=((0, 4),), learning_rate=1e-2), Recall(200, learning_rate=1e-2))
    stages = [rows_of(base, letters) for letters in ("ab", "cd", "ef")]
    state, old = Decoupled(), []
    for stage, rows in enumerate(stages):
        learner = LabelWriter(model, old, labels_in(rows))
        state = recall_stage(model, state, learner, rows, method, shapes=linear_shapes(model), stage=stage)
        old += labels_in(rows)
        save_directions(state, tmp_path)
        state = load_directions(tmp_path)
    assert len(state.directions) == 2, "the features and one readout"
    assert state.directions[1].factors.keys() == Top(model).shapes.keys()
    weights = DirectionWeights(model, state)
    points = [exact_points(model, rows) for rows in stages]
    weights.detach()
    assert min(points) >= 90, points


def test_features_stay_frozen_and_each_stage_trains_a_new_readout(base: Path):
    """Statistics of features are valid only while the features do not change."""
    model, method = load_base(base), recalling(Method(2, ranks=((0, 2),)), Recall(2))
    shapes = linear_shapes(model)
    states = [Decoupled()]
    for stage, letters in enumerate(("ab", "cd", "ef")):
        rows = rows_of(base, letters)[:8]
        learner = LabelWriter(model, [], labels_in(rows))
        states.append(recall_stage(model, states[-1], learner, rows, method, shapes=shapes, stage=stage))
    _, first, both, last = states
    assert [len(state.directions) for state in (first, both, last)] == [1, 2, 2]
    for state in (both, last):
        assert state.directions[0].factors.keys() == first.directions[0].factors.keys()
        assert state.directions[1].factors.keys() == Top(model).shapes.keys()
    name = next(iter(blank(shapes, 1, 1.0).factors))
    assert torch.equal(first.directions[0].factors[name].a_RD, both.directions[0].factors[name].a_RD)
    assert both.magnitudes[0] == pytest.approx(first.magnitudes[0], rel=1e-6)
    assert torch.equal(both.classes["means"][: len(first.classes["means"])], first.classes["means"])
