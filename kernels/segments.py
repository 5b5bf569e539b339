"""What the LoRA operations read: which tokens use which adapter, and where in the arena its rows lie.

Shape letters: T tokens, S segments, D in, F out, R rank, N rows in the row table.

The arena is one flat tensor of equal pages shared by KV cache and adapter weights (S-LoRA, arXiv 2311.03285, section
5.1, taken to grouped-query attention by counting in elements instead of hidden-size cells). A row of `lora_a` (D elements)
or of `lora_b` transposed (F elements) never straddles a page, so one element offset says where it is.
"""

from dataclasses import dataclass

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
    """

    token_starts: Tensor
    ranks: Tensor
    scalings: Tensor
    table_starts: Tensor
    a_rows: Tensor
    b_rows: Tensor
    max_rank: int
    max_tokens: int
