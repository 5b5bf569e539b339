"""The layout of packed batches, and their losses."""

import random
from typing import Any

import pytest
import torch

from readapt.training.data import Encoded, collate
from readapt.training.evaluate import label_logits
from readapt.training.lora import load_base
from readapt.training.packed_batch import pack_batch
from readapt.training.training_group import mean_losses
from tests.worlds.precision import FORWARD, assert_near
from tests.worlds.readapt import TaskWorld, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("packing"))


@pytest.fixture
def model(world: TaskWorld) -> Any:
    return load_base(world.base)


def random_rows(num_rows: int, seed: int, longest: int = 60) -> list[Encoded]:
    rng = random.Random(seed)
    lengths = [rng.randint(2, longest) for _ in range(num_rows)]
    return [Encoded(tuple(rng.choices(range(256), k=n)), rng.randint(1, n - 1)) for n in lengths]


def test_packed_and_padded_batches_have_the_same_losses(model: Any) -> None:
    cohorts = [[random_rows(7, 0), random_rows(7, 1)], [random_rows(1, 2, longest=5)], [random_rows(5, 3, longest=200)]]
    batch = pack_batch(cohorts)
    runs = [rows for cohort in cohorts for rows in cohort]
    with torch.no_grad():
        packed = mean_losses(model, batch, num_adapters=4)
        for loss, rows in zip(packed, runs, strict=True):
            logits_YV, labels_Y, _ = label_logits(model, collate(rows))
            assert_near(loss, torch.nn.functional.cross_entropy(logits_YV, labels_Y), FORWARD)


@pytest.mark.parametrize("seed", range(5))
def test_each_sequence_is_packed_once_in_a_row_of_its_adapter(seed: int) -> None:
    cohorts = [[random_rows(9, 10 * seed + k) for k in range(3)], [random_rows(2, 99 + seed)]]
    batch = pack_batch(cohorts)
    assert [rows.start for rows in batch.cohort_rows] == [0, batch.cohort_rows[0].stop]
    assert batch.cohort_rows[-1].stop == len(batch.input_ids_BT)
    num_tokens = sum(len(s.input_ids) for cohort in cohorts for rows in cohort for s in rows)
    is_start_BT = torch.nn.functional.pad(batch.position_ids_BT, (1, 0), value=-1).diff(dim=1) != 1
    assert num_tokens <= batch.input_ids_BT.numel()
    assert int(is_start_BT.sum()) >= 29 - len(
        batch.input_ids_BT
    )  # the first sequence of a row continues the -1 before it
    for owner, rows in enumerate(rows for cohort in cohorts for rows in cohort):
        labels = sorted(t for s in rows for t in s.input_ids[s.num_prompt_tokens :])
        assert sorted(batch.labels_Y[batch.owners_Y == owner].tolist()) == labels


def test_few_cells_of_a_batch_are_padding() -> None:
    rows = random_rows(16, 4)
    batch = pack_batch([[rows]])
    assert batch.input_ids_BT.numel() <= 1.15 * sum(len(row.input_ids) for row in rows)
