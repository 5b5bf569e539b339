"""A sentence encoder with a growing classifier, tested on a tiny random BERT."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel

from bench.continual.arms import run_arm
from bench.continual.encoder import GrowingClassifier, SentenceEncoder
from bench.continual.run import ARMS
from bench.continual.settings import settings_for
from bench.continual.subjects import EncoderSubject, TaskRows
from cluster.errors import InvalidCheckpointError
from readapt.continual.directions import Decoupled, DirectionWeights
from readapt.continual.learn import Method, learn_stage
from readapt.training.data import Row
from tests.worlds.serving import make_tokenizer

STAGES = [
    [Row(f"{letter * 3}{number}", letter.upper()) for number in range(12) for letter in letters]
    for letters in ("ab", "cd")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = len(make_tokenizer(folder)) + 2
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=36,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.open(folder, max_tokens=32)


def test_a_feature_is_the_mean_of_its_tokens_without_padding(encoder: SentenceEncoder):
    texts = ["ab", "a much longer sentence"]
    together = encoder.features(texts)
    for text, feature_D in zip(texts, together, strict=True):
        tokens = encoder.tokenizer(text, return_tensors="pt")
        hidden_TD = encoder.backbone(**tokens).last_hidden_state[0]
        torch.testing.assert_close(feature_D, normalize(hidden_TD.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_queries_and_values_are_adapted(encoder: SentenceEncoder):
    kinds = [name.rsplit(".", 1)[-1] for name in encoder.shapes()]
    assert sorted(kinds) == ["query", "query", "value", "value"]


def test_new_classes_start_at_the_means_and_the_loss_compares_only_them(encoder: SentenceEncoder):
    head = GrowingClassifier(encoder)
    for rows in STAGES:
        head.grow(rows)
    assert head.labels == ["A", "B", "C", "D"]
    rows = STAGES[1]
    means = [encoder.features([r.prompt for r in rows if r.completion == label]).mean(0) for label in "CD"]
    directions_C2D = normalize(torch.stack(means), dim=1)
    logits = 20.0 * encoder.features([row.prompt for row in rows]) @ directions_C2D.T
    expected = cross_entropy(logits, torch.tensor(["CD".index(row.completion) for row in rows]))
    torch.testing.assert_close(head.loss(rows), expected)
    assert [len(p) for p in head.parameters()] == [2]
    head.thaw()
    assert [len(p) for p in head.parameters()] == [4]


def test_stages_are_learned_and_the_first_is_not_lost(encoder: SentenceEncoder):
    head, state = GrowingClassifier(encoder), Decoupled()
    method = Method(steps=15, batch_rows=8, ranks=((0, 2),), learning_rate=1e-2)
    for stage, rows in enumerate(STAGES):
        weights = DirectionWeights(encoder.backbone, state)
        head.grow(rows)
        weights.detach()
        state = learn_stage(encoder.backbone, state, head, rows, method, shapes=encoder.shapes(), stage=stage)
    weights = DirectionWeights(encoder.backbone, state)
    rows = [row for stage in STAGES for row in stage]
    answers = head.predict([row.prompt for row in rows], batch_rows=5)
    among = head.predict([row.prompt for row in STAGES[0]], among=["A", "B"])
    weights.detach()
    assert sum(answer == row.completion for answer, row in zip(answers, rows, strict=True)) >= 0.9 * len(rows)
    assert set(among) <= {"A", "B"}


@pytest.mark.parametrize("arm", [*ARMS["clinc150", "encoder"], "contrast"])
def test_every_arm_learns_a_stream(folder: Path, arm: str):
    stream = [TaskRows(rows[:16], rows[16:]) for rows in STAGES]
    head = "linear" if arm in ("sequential", "method_linear") else "means"
    course = run_arm(arm, EncoderSubject(folder, stream, head), 2, settings_for("encoder", steps=2), seed=0)
    scores = course.scores([8, 8])
    assert set(scores) == {"accuracy_final", "accuracy_average", "forgetting"}
    assert (course.parameters == 0) == (arm == "means")
    assert len(course.matrix[-1]) == 2


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path):
    with pytest.raises(InvalidCheckpointError, match="cannot be read as an encoder"):
        SentenceEncoder.open(tmp_path)
