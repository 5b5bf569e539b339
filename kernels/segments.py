"""What the LoRA operations read: which tokens use which adapter, and where in the arena its rows lie.

Shape letters: T tokens, U those of them that have an adapter, S segments, D in, F out, R rank (of a group: the sum of
its modules' largest ranks), N rows in the row table.

The arena is one flat tensor of equal pages shared by KV cache and adapter weights (S-LoRA, arXiv 2311.03285, section
5.1, taken to grouped-query attention by counting in elements instead of hidden-size cells). A row of `lora_a` (D
elements) or of `lora_b` transposed (F elements) never straddles a page, so one element offset says where it is.
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

    Tokens are sorted so that those of one adapter are adjacent: segment s is rows `token_starts[s]:token_starts[s + 1]`
    of x (half-open). Tokens at or after `token_starts[S]` have no adapter. A segment whose adapter leaves this module
    alone has rank 0.

    token_starts: int32 [S + 1]
    ranks:        int32 [S]
    scalings:     float32 [S]
    table_starts: int64 [S]; row i of segment s is entry `table_starts[s] + i` of both tables
    a_rows:       int64 [N]; element offset in the arena of row i of lora_a (D elements)
    b_rows:       int64 [N]; element offset in the arena of row i of lora_b transposed (F elements)
    max_rank, max_tokens: the largest rank and segment, known on the host for the launch
    gain_rows:    int64 [S]; element offset of a DoRA's gains (F elements), -1 where a segment has none; None where no
                  segment has any
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
        """The tokens whose adapter is a DoRA, and the element offset of each one's gains; both int64."""
        assert self.gain_rows is not None
        rows_U = self.gain_rows[torch.repeat_interleave(self.token_starts.diff())]
        tokens = (rows_U >= 0).nonzero()[:, 0]
        return tokens, rows_U[tokens]


@dataclass(frozen=True)
class LoraGroup:
    """Modules that read the same input, or pieces of one module's output: one product with all their `lora_a`.

    `modules[i]` owns `widths[i]` columns of the output, side by side, and the columns of h from `columns[i]` on. All
    have the same token_starts. Those that no segment adapts have max_rank 0; not all have.
    """

    modules: tuple[LoraSegments, ...]
    widths: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[LoraSegments], widths: Sequence[int]) -> "LoraGroup":
        """Each module with columns of h of its own."""
        columns = accumulate((module.max_rank for module in modules[:-1]), initial=0)
        return cls(tuple(modules), tuple(widths), tuple(columns))

    @cached_property
    def num_columns(self) -> int:
        """Columns of h, the R of the operations."""
        return max(first + module.max_rank for first, module in zip(self.columns, self.modules, strict=True))

    @cached_property
    def num_segments(self) -> int:
        """S."""
        return self.modules[0].ranks.shape[0]

    @cached_property
    def has_gains(self) -> bool:
        """Whether any adapter of any module is a DoRA."""
        return any(module.gain_rows is not None for module in self.modules)

    @cached_property
    def addresses(self) -> "GroupAddresses":
        """Where the tables lie, for compiled code on a CPU."""
        return GroupAddresses.of(self)

    # What follows is worked out once for all who ask: it takes longer than the products of a decode.

    @cached_property
    def token_segments(self) -> Tensor:
        """The segment of each token that has one, int64."""
        return torch.repeat_interleave(self.modules[0].token_starts.diff())

    @cached_property
    def token_places(self) -> Tensor:
        """Where each token's own segment is among all pairs (token, segment), int64."""
        first_T = torch.arange(len(self.token_segments), device=self.token_segments.device) * self.num_segments
        return first_T + self.token_segments

    @cached_property
    def inputs_by_segment(self) -> "InputRows":
        """The rows of lora_a of each segment."""
        return InputRows(slice(None), *_padded_a(self.modules))

    @cached_property
    def token_scales(self) -> Tensor:
        """The scalings by token and column of h, 0 beyond the rank."""
        return self.inputs_by_segment.scales[self.token_segments]

    @cached_property
    def is_adapted_by_token(self) -> Tensor:
        """Whether the adapter of each token that has one changes any of the modules."""
        return torch.stack([module.ranks for module in self.modules]).any(0)[self.token_segments]

    @cached_property
    def spared_tokens(self) -> Tensor:
        """The tokens whose adapter leaves all of the modules alone, int64: their rows of lora_a are another's."""
        return (~self.is_adapted_by_token).nonzero()[:, 0]

    @cached_property
    def inputs_by_token(self) -> "InputRows":
        """The rows of lora_a of each token whose adapter has any."""
        tokens = self.is_adapted_by_token.nonzero()[:, 0]
        _, rows_SR, scales_SR = self.inputs_by_segment
        segment_U = self.token_segments[tokens]
        return InputRows(_as_slice(tokens), rows_SR[segment_U], scales_SR[segment_U])

    @cached_property
    def b_rows_by_segment(self) -> tuple[Tensor, ...]:
        """The rows of lora_b of each segment, by module: int64 [S, its max_rank]."""
        return tuple(_padded_rows(module, module.b_rows) for module in self.modules)

    @cached_property
    def b_rows_by_token(self) -> "tuple[OutputRows, ...]":
        """The same of each token that has a rank there, by module."""
        tokens = [module.ranks[self.token_segments].nonzero()[:, 0] for module in self.modules]
        pairs = zip(tokens, self.b_rows_by_segment, strict=True)
        return tuple(OutputRows(_as_slice(own), rows_SR[self.token_segments[own]]) for own, rows_SR in pairs)


class GroupAddresses(NamedTuple):
    """A group as `cpu_ops.cpp` reads it: the address of its struct, and the arrays that it and its modules lie in."""

    group: int
    arrays: tuple["array[int]", "array[int]"]

    @classmethod
    def of(cls, group: LoraGroup) -> "GroupAddresses":
        """Write the structs Group and Module; they point into the group's tensors, which have to live as long."""
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
    """Rows of lora_a, all modules' side by side: an offset for each column of h, by segment or by token.

    Offsets beyond a rank repeat a row of the same adapter, since another's infinity times zero would be NaN; `scales`,
    the scalings, are 0 there. A segment without any row has another's: what comes of it is not to be used (see
    `spared_tokens`). `where` are the tokens, as a slice if adjacent.
    """

    where: "Tensor | slice"
    rows: Tensor
    scales: Tensor


class OutputRows(NamedTuple):
    """One module's rows of lora_b by token, and which tokens: a slice if adjacent."""

    where: "Tensor | slice"
    rows: Tensor


def _as_slice(tokens: Tensor) -> "Tensor | slice":
    """The same tokens, as a slice where they are adjacent: far cheaper to index with."""
    if len(tokens) and int(tokens[-1] - tokens[0]) == len(tokens) - 1:
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens


def _padded_rows(module: LoraSegments, table: Tensor) -> Tensor:
    """The table's rows of each segment, S x max_rank: the last one again beyond a rank, another's where it is 0."""
    others = module.table_starts[module.ranks.argmax()]
    starts_S1 = torch.where(module.ranks > 0, module.table_starts, others)[:, None]
    last_S1 = (module.ranks[:, None] - 1).clamp(min=0)
    row_R = torch.arange(module.max_rank, device=table.device)
    return table[starts_S1 + torch.minimum(row_R, last_S1)]


def _padded_a(modules: Sequence[LoraSegments]) -> tuple[Tensor, Tensor]:
    """Rows of lora_a by segment and column of h, and the scalings, 0 where a column is beyond the rank."""
    rows, scales = [], []
    for module in modules:
        row_R = torch.arange(module.max_rank, device=module.ranks.device)
        scales.append(torch.where(row_R < module.ranks[:, None], module.scalings[:, None], 0.0))
        rows.append(_padded_rows(module, module.a_rows))
    return _own_rows_only(modules, rows), torch.cat(scales, 1)


def _own_rows_only(modules: Sequence[LoraSegments], rows: Sequence[Tensor]) -> Tensor:
    """The modules' rows side by side; those of a module that a segment leaves alone are its row of another module."""
    pairs = [pair for pair in zip(modules, rows, strict=True) if pair[0].max_rank]
    own_S1 = pairs[0][1][:, :1]
    for module, rows_SR in pairs:
        own_S1 = torch.where(module.ranks[:, None] > 0, rows_SR[:, :1], own_S1)
    return torch.cat([torch.where(module.ranks[:, None] > 0, rows_SR, own_S1) for module, rows_SR in pairs], 1)
