"""What the LoRA operations read: which tokens use which adapter, and where in the arena its rows lie.

Shape letters: T tokens, U those of them that have an adapter, S segments, D in, F out, R rank, N rows in the
row table.

The arena is one flat tensor of equal pages shared by KV cache and adapter weights (S-LoRA, arXiv 2311.03285, section
5.1, taken to grouped-query attention by counting in elements instead of hidden-size cells). A row of `lora_a` (D
elements) or of `lora_b` transposed (F elements) never straddles a page, so one element offset says where it is.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """The segments seen from their tokens: what one product over all tokens at once gathers.

    Offsets beyond an adapter's rank repeat its last row, whose product does not count: another's infinity times zero
    would be NaN.

    tokens:       int64 [U]; the tokens that have an adapter here
    a_rows_UR:    int64; element offset in the arena of each token's rows of lora_a
    b_rows_UR:    int64; the same of lora_b transposed
    is_row_UR:    bool; whether the row is one of the adapter's
    scalings_U1:  float32
    """

    tokens: Tensor
    a_rows_UR: Tensor
    b_rows_UR: Tensor
    is_row_UR: Tensor
    scalings_U1: Tensor


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
    """

    token_starts: Tensor
    ranks: Tensor
    scalings: Tensor
    table_starts: Tensor
    a_rows: Tensor
    b_rows: Tensor
    max_rank: int
    max_tokens: int

    @cached_property
    def token_rows(self) -> TokenRows:
        """The same by token; computed once for all who ask, because it takes longer than the products of a decode."""
        segment_T = torch.repeat_interleave(self.token_starts.diff())
        tokens = self.ranks[segment_T].nonzero()[:, 0]
        segment_U = segment_T[tokens]
        ranks_U1, row_R = self.ranks[segment_U][:, None], torch.arange(self.max_rank, device=self.ranks.device)
        entries_UR = self.table_starts[segment_U][:, None] + torch.minimum(row_R, ranks_U1 - 1)
        return TokenRows(
            tokens=tokens,
            a_rows_UR=self.a_rows[entries_UR],
            b_rows_UR=self.b_rows[entries_UR],
            is_row_UR=row_R < ranks_U1,
            scalings_U1=self.scalings[segment_U][:, None],
        )
