"""What the attention operations read: which tokens belong to which sequence, and where its keys and values are."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of one batch. It is built once per step, and every layer reads it.

    query_starts:    int32 [B + 1]; the new tokens of sequence b are rows `query_starts[b]:query_starts[b + 1]` of q
    context_lens:    int32 [B]; the number of tokens of sequence b, including its new ones
    block_tables_BW: int32; the KV pages of each sequence in order, padded with any page
    max_query_tokens, max_context_tokens: the largest number of either, known on the host for the launch
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables_BW: Tensor
    max_query_tokens: int
    max_context_tokens: int
