"""One step's work as flat tensors: all that the model and the kernels ever see.

Shape letters: T tokens in the batch, N sequences, B blocks (pages of KV) of the longest sequence, S adapter segments,
M target modules of the whole model, O rows whose logits are wanted.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kernels.segments import LoraSegments


@dataclass(frozen=True)
class LoraBatch:
    """The adapters of a batch, for every target module at once.

    Module m is `layer * len(MODULE_KINDS) + kind`; column m of the [S, M] tables gives that module's segments. The
    token ranges and the row table are the same for all modules. See `kernels.segments.LoraSegments` for the meaning.
    """

    token_starts: Tensor  # int32 [S + 1]
    ranks_SM: Tensor  # int32
    scalings_SM: Tensor  # float32
    table_starts_SM: Tensor  # int64
    a_rows: Tensor  # int64
    b_rows: Tensor  # int64
    max_ranks: tuple[int, ...]  # per module, on the host; 0 means that no adapter of the batch touches the module
    max_tokens: int

    @cached_property
    def modules(self) -> tuple[LoraSegments | None, ...]:
        """Segments of each target module, None where no adapter of the batch touches it."""
        return tuple(self._module(index) if rank > 0 else None for index, rank in enumerate(self.max_ranks))

    def _module(self, index: int) -> LoraSegments:
        return LoraSegments(
            token_starts=self.token_starts,
            ranks=self.ranks_SM[:, index],
            scalings=self.scalings_SM[:, index],
            table_starts=self.table_starts_SM[:, index],
            a_rows=self.a_rows,
            b_rows=self.b_rows,
            max_rank=self.max_ranks[index],
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True)
class Batch:
    """One forward pass: sequences ordered by adapter (base-only last), each one's tokens adjacent.

    tokens_T, positions_T: int64
    slots_T:       int64; where each token's KV goes: page * page_tokens + offset in the page
    query_starts:  int32 [N + 1]; tokens of sequence n are `query_starts[n]:query_starts[n + 1]`
    context_lens:  int32 [N]; tokens of KV that sequence n has once this step's are stored
    block_tables_NB: int32; pages of each sequence's KV in order, padded with 0
    logit_rows_O:  int64; rows of T whose logits are wanted: the last token of each sequence that samples, in order of n
    max_query_tokens, max_context_tokens: largest of each, known on the host
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables_NB: Tensor
    logit_rows_O: Tensor
    max_query_tokens: int
    max_context_tokens: int
    lora: LoraBatch | None = None
