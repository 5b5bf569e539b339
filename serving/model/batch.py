"""One step's work as flat tensors. The model and the kernels see nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.segments import LoraGroup, LoraSegments
from serving.adapters.device_copy import PendingCopy


@dataclass(frozen=True)
class LoraLayout:
    """The target modules of a model by index: the layers' modules, then the embedding, then the head.

    `widths` maps the index of the first of the modules that read the same input to the out features of all of them.
    Rows of vocabulary size are cut into `num_pieces` pieces of `piece_width` elements (the last is shorter), so that
    each piece fits a page.
    """

    widths: Mapping[int, tuple[int, ...]]
    embedding: int
    hidden_size: int
    vocab_size: int
    piece_width: int

    @property
    def head(self) -> int:
        """The module index of the head."""
        return self.embedding + 1

    @property
    def order(self) -> tuple[int, ...]:
        """All module indices, in the order in which a forward pass reads the modules."""
        return (self.embedding, *range(self.embedding), self.head)

    @property
    def num_pieces(self) -> int:
        """The number of pieces of a row of vocabulary size."""
        return -(-self.vocab_size // self.piece_width)

    @property
    def piece_widths(self) -> tuple[int, ...]:
        """The width of each piece, in elements."""
        last = self.vocab_size - (self.num_pieces - 1) * self.piece_width
        return (*(self.piece_width,) * (self.num_pieces - 1), last)


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of a batch, for all target modules.

    Column m of the [S, M] tables describes the segments of module m. All modules share the row tables and, except for
    the head, the token ranges: the head sees only the rows whose logits are wanted. `kernels.segments.LoraSegments`
    explains the fields, `serving.adapters.packing` an adapter's entries in the row tables.
    `pending_copies` are of adapters whose rows are still being copied: call `wait_for` before reading a module's rows.
    """

    layout: LoraLayout
    token_starts: Tensor  # int32 [S + 1]
    sample_starts: Tensor  # int32 [S + 1]; the same borders in rows of O
    ranks_SM: Tensor  # int32
    scalings_SM: Tensor  # float32
    table_starts_SM: Tensor  # int64
    is_dora_SM: Tensor  # bool
    a_rows: Tensor  # int64 [I]
    b_rows: Tensor  # int64 [I]
    max_ranks: tuple[int, ...]  # per module, on the host; 0 means that no adapter of the batch changes the module
    has_dora: tuple[bool, ...]  # per module, on the host
    max_tokens: int
    max_samples: int
    pending_copies: tuple[PendingCopy, ...] = ()

    def wait_for(self, module: int, num_modules: int = 1) -> None:
        """Make all work that is queued from now on wait for the rows of `num_modules` modules from `module` on."""
        for copy in self.pending_copies:
            for index in range(module, module + num_modules):
                copy.wait_for(index)

    @cached_property
    def groups(self) -> dict[int, LoraGroup]:
        """The groups of layers' modules that any adapter changes, by the index of each group's first module."""
        return {
            first: LoraGroup.of([self._module(first + i) for i in range(len(widths))], widths)
            for first, widths in self.layout.widths.items()
            if any(self.max_ranks[first : first + len(widths)])
        }

    @cached_property
    def embedding(self) -> LoraGroup | None:
        """The embedding as a group of one module, or None if no adapter changes it."""
        if not self.max_ranks[self.layout.embedding]:
            return None
        return LoraGroup.of([self._module(self.layout.embedding)], [self.layout.hidden_size])

    @cached_property
    def head(self) -> LoraGroup | None:
        """The pieces of the head, which all read the same columns of h. None if no adapter changes a wanted logit."""
        if not self.max_ranks[self.layout.head] or not self.max_samples:
            return None
        pieces = tuple(self._module(self.layout.head, piece) for piece in range(self.layout.num_pieces))
        return LoraGroup(pieces, self.layout.piece_widths, (0,) * len(pieces))

    def _module(self, index: int, piece: int = 0) -> LoraSegments:
        is_head = index == self.layout.head
        ranks, starts = self.ranks_SM[:, index], self.table_starts_SM[:, index]
        return LoraSegments(
            token_starts=self.sample_starts if is_head else self.token_starts,
            ranks=ranks,
            scalings=self.scalings_SM[:, index],
            table_starts=starts + piece * ranks if piece else starts,
            a_rows=self.a_rows,
            b_rows=self.b_rows,
            max_rank=self.max_ranks[index],
            max_tokens=self.max_samples if is_head else self.max_tokens,
            gain_rows=self._gain_rows(index, piece) if self.has_dora[index] else None,
        )

    def _gain_rows(self, index: int, piece: int) -> Tensor:
        num_pieces = self.layout.num_pieces if index == self.layout.head else 1
        entries = self.table_starts_SM[:, index] + num_pieces * self.ranks_SM[:, index] + piece
        rows = self.b_rows[entries.clamp(max=len(self.b_rows) - 1)]  # only a DoRA has this entry
        return torch.where(self.is_dora_SM[:, index], rows, -1)


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Sequences are ordered by adapter, those without one last. A sequence's tokens are adjacent.

    tokens_T, positions_T: int64
    slots_T:      int64; where each token's keys and values go: page * page_tokens + offset in the page
    logit_rows_O: int64; rows of T whose logits are wanted: the last token of each sequence that samples, in order
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    attention: AttentionMetadata
    logit_rows_O: Tensor
    lora: LoraBatch | None = None
