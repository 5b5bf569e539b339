"""Rows of many lengths in few cells: sequences laid end to end in the rows of a batch, each blind to the others.

A batch padded to its longest row wastes a third of its cells on real tasks. The positions, which begin anew with each
sequence, tell the model's mask where one ends; the results are those of the padded batch, to rounding. Shape letters:
B rows of the batch, T tokens in one, L label positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from readapt.training.data import Encoded

ROW_TOKENS = 96  # wide enough to fill well, narrow enough that attention, which pays for the width, stays cheap


@dataclass(frozen=True)
class PackedBatch:
    """One batch for several adapters: consecutive rows, equally many for each adapter of a group.

    `predictors_L` are the cells (row * T + column) whose logits predict `labels_L`, `owners_L` the adapters, counted
    through all groups, whose labels they are. `group_rows` are the rows of each group. All tensors int64, on the CPU.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    predictors_L: Tensor
    labels_L: Tensor
    owners_L: Tensor
    group_rows: tuple[slice, ...]


def pack(groups: Sequence[Sequence[Sequence[Encoded]]]) -> PackedBatch:
    """Lays out `groups[g][k]`, the sequences of adapter k of group g; each adapter's go into rows of their own."""
    longest = max(len(sequence.input_ids) for group in groups for sequences in group for sequence in sequences)
    width = max(longest, ROW_TOKENS)
    rows: list[list[Encoded]] = []
    owners: list[int] = []
    group_rows: list[slice] = []
    num_adapters = 0
    for group in groups:
        num_rows = max(math.ceil(sum(len(s.input_ids) for s in sequences) / width) for sequences in group)
        group_rows.append(slice(len(rows), len(rows) + num_rows * len(group)))
        rows += [row for sequences in group for row in _balanced(sequences, num_rows)]
        owners += [num_adapters + k for k in range(len(group)) for _ in range(num_rows)]
        num_adapters += len(group)
    return _tensors(rows, owners, tuple(group_rows))


def _balanced(sequences: Sequence[Encoded], num_rows: int) -> list[list[Encoded]]:
    """Longest first, each into the row that is the shortest so far."""
    rows: list[list[Encoded]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for sequence in sorted(sequences, key=lambda s: -len(s.input_ids)):
        shortest = filled.index(min(filled))
        rows[shortest].append(sequence)
        filled[shortest] += len(sequence.input_ids)
    return rows


def _tensors(rows: list[list[Encoded]], owners: list[int], group_rows: tuple[slice, ...]) -> PackedBatch:
    width = max(sum(len(sequence.input_ids) for sequence in row) for row in rows)
    tokens, positions = ([[0] * width for _ in rows] for _ in range(2))  # each cell of padding is a sequence of its own
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
        group_rows,
    )
