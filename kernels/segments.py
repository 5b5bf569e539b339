"""What the LoRA operations read: which tokens use which adapter, and where its rows are in the arena.

The arena is one tensor of equal pages that KV cache and adapter weights share (S-LoRA, arXiv 2311.03285, section 5.1;
we count in elements instead of hidden-size cells, to support grouped-query attention). A row of `lora_a` (D elements)
or of `lora_b` transposed (F elements) never crosses a page border, so a single element offset locates it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraSegments:
    """The adapters of one target module over one batch.

    Tokens are sorted by adapter: segment s is rows `token_starts[s]:token_starts[s + 1]` of x. Tokens from
    `token_starts[S]` on have no adapter. If a segment's adapter does not change this module, its rank is 0.

    token_starts: int32 [S + 1]
    ranks:        int32 [S]
    scalings:     float32 [S]
    table_starts: int64 [S]; row i of segment s is entry `table_starts[s] + i` of both row tables
    a_rows:       int64 [I]; where rows of lora_a (D elements) start in the arena, in elements
    b_rows:       int64 [I]; where rows of lora_b transposed (F elements) start
    max_rank:     the largest rank, known on the host for the launch
    max_tokens:   the number of tokens of the longest segment, known on the host for the launch
    gain_rows:    int64 [S]; where a DoRA's gains (F elements) start, -1 for other adapters; None if there is no DoRA
    """

    token_starts: Tensor
    ranks: Tensor
    scalings: Tensor
    table_starts: Tensor
    a_rows: Tensor
    b_rows: Tensor
    max_rank: int
    max_tokens: int
    gain_rows: Tensor | None = None

    @cached_property
    def gains_by_token(self) -> tuple[Tensor, Tensor]:
        """The tokens whose adapter is a DoRA, and where each one's gains start; both int64."""
        assert self.gain_rows is not None
        rows_U = self.gain_rows[torch.repeat_interleave(self.token_starts.diff())]
        tokens = (rows_U >= 0).nonzero()[:, 0]
        return tokens, rows_U[tokens]


@dataclass(frozen=True)
class LoraGroup:
    """Modules that read the same input, or pieces of one module's output, computed together.

    Module i owns `widths[i]` columns of the output, side by side, and `max_rank` columns of h from `columns[i]` on. All
    modules have the same token_starts. A module that no adapter changes has max_rank 0; at least one has more.
    """

    modules: tuple[LoraSegments, ...]
    widths: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[LoraSegments], widths: Sequence[int]) -> "LoraGroup":
        """Return a group in which each module has its own columns of h."""
        columns = accumulate((module.max_rank for module in modules[:-1]), initial=0)
        return cls(tuple(modules), tuple(widths), tuple(columns))

    @cached_property
    def num_columns(self) -> int:
        """The number of columns of h: R in the operations."""
        return max(first + module.max_rank for first, module in zip(self.columns, self.modules, strict=True))

    @cached_property
    def num_segments(self) -> int:
        """The number of segments, S."""
        return self.modules[0].ranks.shape[0]

    @cached_property
    def has_gains(self) -> bool:
        """Whether any adapter of any module is a DoRA."""
        return any(module.gain_rows is not None for module in self.modules)

    @cached_property
    def addresses(self) -> "GroupAddresses":
        """The addresses of the tables, for compiled code on a CPU."""
        return GroupAddresses.of(self)

    # The rest is cached for all layers, because computing it takes longer than the products of a decode step.

    @cached_property
    def token_segments(self) -> Tensor:
        """The segment of each token that has one: int64 [U]."""
        return torch.repeat_interleave(self.modules[0].token_starts.diff())

    @cached_property
    def token_places(self) -> Tensor:
        """The index of (token, its own segment) among all pairs of a token and a segment: int64 [U]."""
        first_U = torch.arange(len(self.token_segments), device=self.token_segments.device) * self.num_segments
        return first_U + self.token_segments

    @cached_property
    def inputs_by_segment(self) -> "InputRows":
        """The rows of lora_a by segment: [S, R]."""
        return InputRows(slice(None), *_padded_a(self.modules))

    @cached_property
    def token_scales(self) -> Tensor:
        """The scalings by token and column of h, 0 beyond the rank: [U, R]."""
        return self.inputs_by_segment.scales[self.token_segments]

    @cached_property
    def is_adapted_by_token(self) -> Tensor:
        """Whether each token's adapter changes any of the modules: bool [U]."""
        return torch.stack([module.ranks for module in self.modules]).any(0)[self.token_segments]

    @cached_property
    def unadapted_tokens(self) -> Tensor:
        """Tokens whose adapter changes none of the modules, int64. `inputs_by_segment` has foreign rows for them."""
        return (~self.is_adapted_by_token).nonzero()[:, 0]

    @cached_property
    def inputs_by_token(self) -> "InputRows":
        """The rows of lora_a by token, for the tokens whose adapter changes any of the modules."""
        tokens = self.is_adapted_by_token.nonzero()[:, 0]
        _, rows_SR, scales_SR = self.inputs_by_segment
        segment_U = self.token_segments[tokens]
        return InputRows(_as_slice(tokens), rows_SR[segment_U], scales_SR[segment_U])

    @cached_property
    def b_rows_by_segment(self) -> tuple[Tensor, ...]:
        """The rows of lora_b by segment, for each module: int64 [S, max_rank]."""
        return tuple(_padded_rows(module, module.b_rows) for module in self.modules)

    @cached_property
    def b_rows_by_token(self) -> "tuple[OutputRows, ...]":
        """The rows of lora_b by token, for each module and the tokens whose adapter changes it."""
        tokens = [module.ranks[self.token_segments].nonzero()[:, 0] for module in self.modules]
        pairs = zip(tokens, self.b_rows_by_segment, strict=True)
        return tuple(OutputRows(_as_slice(own), rows_SR[self.token_segments[own]]) for own, rows_SR in pairs)


class GroupAddresses(NamedTuple):
    """A group for `cpu_ops.cpp`: the address of its C++ struct, and the arrays that own the structs' memory."""

    group: int
    arrays: tuple["array[int]", "array[int]"]

    @classmethod
    def of(cls, group: LoraGroup) -> "GroupAddresses":
        """Write the C++ structs Group and Module. They point into the group's tensors, which must outlive them."""
        out_columns = accumulate(group.widths[:-1], initial=0)
        modules = array("q")
        for module, h_column, out_column, width in zip(
            group.modules, group.columns, out_columns, group.widths, strict=True
        ):
            assert module.a_rows.is_contiguous()
            assert module.b_rows.is_contiguous()
            for column in (module.ranks, module.scalings, module.table_starts):
                modules.extend((column.data_ptr(), column.stride(0)))
            modules.extend((module.a_rows.data_ptr(), module.b_rows.data_ptr(), h_column, out_column, width))
        starts = group.modules[0].token_starts
        whole = array("q", [starts.data_ptr(), group.num_segments, modules.buffer_info()[0], len(group.modules)])
        return cls(whole.buffer_info()[0], (whole, modules))


class InputRows(NamedTuple):
    """Where the rows of lora_a start, one for each column of h (all modules side by side), by segment or by token.

    Beyond a rank, the start of a row of the same adapter is repeated and `scales`, the scalings, are 0: another
    adapter's infinity times zero would be NaN. A segment without any row has another segment's rows, so its results
    must be dropped (see `unadapted_tokens`). `where` selects the tokens; it is a slice if they are adjacent.
    """

    where: "Tensor | slice"
    rows: Tensor
    scales: Tensor


class OutputRows(NamedTuple):
    """Where one module's rows of lora_b start, by token. `where` selects the tokens; a slice if they are adjacent."""

    where: "Tensor | slice"
    rows: Tensor


def _as_slice(tokens: Tensor) -> "Tensor | slice":
    """Return the tokens as a slice if they are adjacent: indexing with a slice is far cheaper."""
    if len(tokens) and int(tokens[-1] - tokens[0]) == len(tokens) - 1:
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens


def _padded_rows(module: LoraSegments, table: Tensor) -> Tensor:
    """Return the table's rows by segment, [S, max_rank]. A rank's last row repeats; rank 0 gets another segment's."""
    others = module.table_starts[module.ranks.argmax()]
    starts_S1 = torch.where(module.ranks > 0, module.table_starts, others)[:, None]
    last_S1 = (module.ranks[:, None] - 1).clamp(min=0)
    row_R = torch.arange(module.max_rank, device=table.device)
    return table[starts_S1 + torch.minimum(row_R, last_S1)]


def _padded_a(modules: Sequence[LoraSegments]) -> tuple[Tensor, Tensor]:
    """Return the rows of lora_a by segment and column of h, and the scalings, 0 beyond the rank; [S, R] each."""
    rows, scales = [], []
    for module in modules:
        row_R = torch.arange(module.max_rank, device=module.ranks.device)
        scales.append(torch.where(row_R < module.ranks[:, None], module.scalings[:, None], 0.0))
        rows.append(_padded_rows(module, module.a_rows))
    return _own_rows_only(modules, rows), torch.cat(scales, 1)


def _own_rows_only(modules: Sequence[LoraSegments], rows: Sequence[Tensor]) -> Tensor:
    """Join the modules' rows. Where a segment has no rank in a module, repeat one of its rows from another module."""
    pairs = [pair for pair in zip(modules, rows, strict=True) if pair[0].max_rank]
    own_S1 = pairs[0][1][:, :1]
    for module, rows_SR in pairs:
        own_S1 = torch.where(module.ranks[:, None] > 0, rows_SR[:, :1], own_S1)
    return torch.cat([torch.where(module.ranks[:, None] > 0, rows_SR, own_S1) for module, rows_SR in pairs], 1)
