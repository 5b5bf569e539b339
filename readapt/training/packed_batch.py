"""Sequences of many lengths laid end to end in the rows of a batch; none of them sees another.

A batch padded to its longest row wastes a third of its cells on real tasks. Positions restart at 0 with each sequence,
which tells the model's mask where one ends. The results are those of the padded batch, up to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from readapt.training.data import Encoded

ROW_TOKENS = 96  # wide enough to fill well, narrow enough that attention, whose cost grows with the width, stays cheap


@dataclass(frozen=True)
class PackedBatch:
    """One batch for the adapters of several cohorts. Each adapter of a cohort has equally many consecutive rows.

    `predictors_Y` are the cells (row * T + column) whose logits predict `labels_Y`. `owners_Y` are the adapters that
    the labels belong to, numbered through all cohorts. `cohort_rows` are the rows of each cohort. All tensors are int64
    and on the CPU.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    predictors_Y: Tensor
    labels_Y: Tensor
    owners_Y: Tensor
    cohort_rows: tuple[slice, ...]


def pack_batch(cohorts: Sequence[Sequence[Sequence[Encoded]]]) -> PackedBatch:
    """Return the batch of `cohorts[c][a]`, the sequences of adapter a of cohort c. No two adapters share a row."""
    longest = max(len(sequence.input_ids) for cohort in cohorts for sequences in cohort for sequence in sequences)
    width = max(longest, ROW_TOKENS)
    rows: list[list[Encoded]] = []
    owners: list[int] = []
    cohort_rows: list[slice] = []
    num_adapters = 0
    for cohort in cohorts:
        num_rows = max(math.ceil(sum(len(s.input_ids) for s in sequences) / width) for sequences in cohort)
        cohort_rows.append(slice(len(rows), len(rows) + num_rows * len(cohort)))
        rows += [row for sequences in cohort for row in _balanced(sequences, num_rows)]
        owners += [num_adapters + index for index in range(len(cohort)) for _ in range(num_rows)]
        num_adapters += len(cohort)
    return _tensors(rows, owners, tuple(cohort_rows))


def _balanced(sequences: Sequence[Encoded], num_rows: int) -> list[list[Encoded]]:
    """Return the sequences in `num_rows` rows: longest first, each into the row that is the shortest so far."""
    rows: list[list[Encoded]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for sequence in sorted(sequences, key=lambda s: -len(s.input_ids)):
        shortest = filled.index(min(filled))
        rows[shortest].append(sequence)
        filled[shortest] += len(sequence.input_ids)
    return rows


def _tensors(rows: list[list[Encoded]], owners: list[int], cohort_rows: tuple[slice, ...]) -> PackedBatch:
    width = max(sum(len(sequence.input_ids) for sequence in row) for row in rows)
    tokens = [[0] * width for _ in rows]
    positions = [[0] * width for _ in rows]  # 0 in padding: each of its cells is a sequence of one token
    predictors: list[int] = []
    labels: list[int] = []
    label_owners: list[int] = []
    for index, row in enumerate(rows):
        start = 0
        for sequence in row:
            end = start + len(sequence.input_ids)
            tokens[index][start:end] = sequence.input_ids
            positions[index][start:end] = range(end - start)
            first = index * width + start + sequence.num_prompt_tokens
            labels += sequence.input_ids[sequence.num_prompt_tokens :]
            predictors += range(first - 1, index * width + end - 1)
            start = end
        label_owners += [owners[index]] * (len(labels) - len(label_owners))
    return PackedBatch(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(predictors),
        torch.tensor(labels),
        torch.tensor(label_owners),
        cohort_rows,
    )
