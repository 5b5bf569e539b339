"""Paged attention and KV store on CUDA; `kernels.reference` defines each operation.

One kernel serves decode and chunked prefill. A row of a query tile is one pair of a token and one of the G query heads
that share a key/value head. So these heads read their keys and values once, and a decoding sequence fills G rows of a
single tile. The softmax is computed online, one tile of keys after the other (FlashAttention-2, arXiv 2307.08691,
section 3.1).
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (the arguments of a kernel have Triton's types, not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.triton_common import UPCAST, span


def store_kv(k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, layer: int, slots_T: Tensor) -> None:
    """Write the keys and values of new tokens to their pages; see `kernels.reference.store_kv`."""
    num_tokens, num_kv_heads, head_dim = k_TKH.shape
    assert kv_pages.is_contiguous()
    assert k_TKH.stride()[1:] == v_TKH.stride()[1:] == (head_dim, 1)
    store_kernel[(num_tokens, 2)](
        k_TKH,
        v_TKH,
        kv_pages[:, layer],
        slots_T,
        num_kv_heads * head_dim,
        k_TKH.stride(0),
        v_TKH.stride(0),
        kv_pages.stride(0),
        PAGE_TOKENS=kv_pages.shape[3],
        BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
    )


def paged_attention(
    q_TNH: Tensor,
    kv_pages: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend causally over paged keys and values; see `kernels.reference.paged_attention`."""
    _, num_heads, head_dim = q_TNH.shape
    num_kv_heads = kv_pages.shape[4]
    assert kv_pages.is_contiguous()
    assert q_TNH.stride(2) == metadata.block_tables_BW.stride(1) == 1
    group = num_heads // num_kv_heads
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    num_rows = metadata.max_query_tokens * group
    block_rows = 16 if num_rows <= 16 else 64
    grid = (triton.cdiv(num_rows, block_rows), num_kv_heads, metadata.context_lens.shape[0])
    attention_kernel[grid](
        q_TNH,
        kv_pages[:, layer],
        out_TNH,
        metadata.query_starts,
        metadata.context_lens,
        metadata.block_tables_BW,
        scale * 1.4426950408889634,  # log2(e): the kernel computes powers of two
        metadata.max_context_tokens if window is None else window,
        q_TNH.stride(0),
        q_TNH.stride(1),
        kv_pages.stride(0),
        metadata.block_tables_BW.stride(0),
        PAGE_TOKENS=kv_pages.shape[3],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_X=32,
        BLOCK_H=max(16, triton.next_power_of_2(head_dim)),
        UPCAST=UPCAST,
    )
    return out_TNH


@triton.jit
def store_kernel(
    k_ptr,
    v_ptr,
    pages_ptr,
    slots_ptr,
    row_size,
    k_stride,
    v_stride,
    page_stride,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy token `program_id(0)`'s keys (if `program_id(1)` is 0) or values (if 1) to their slot in one layer."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    column = tl.arange(0, BLOCK)
    is_column = column < row_size
    if tl.program_id(1) == 0:
        row = tl.load(k_ptr + token * k_stride + column, mask=is_column)
    else:
        row = tl.load(v_ptr + token * v_stride + column, mask=is_column)
    side = tl.program_id(1) * PAGE_TOKENS + slot % PAGE_TOKENS
    tl.store(pages_ptr + (slot // PAGE_TOKENS) * page_stride + side * row_size + column, row, mask=is_column)


@triton.jit
def attention_kernel(
    q_ptr,
    pages_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    scale_log2,
    window,
    q_stride_t,
    q_stride_n,
    page_stride,
    table_stride,
    PAGE_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one tile of a sequence's (token, query head) rows over all the keys that any of them sees.

    Each row of a real token sees at least its own key. Rows beyond the sequence are computed from zeros and not stored.
    """
    sequence = tl.program_id(2)
    start, end = span(query_starts_ptr)
    num_query = end - start
    first_row = tl.program_id(0) * BLOCK_ROWS
    if first_row < num_query * GROUP:
        context = tl.load(context_lens_ptr + sequence)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        query, head = row // GROUP, tl.program_id(1) * GROUP + row % GROUP
        position = context - num_query + query
        dim = tl.arange(0, BLOCK_H)
        is_dim, is_row = dim < HEAD_DIM, query < num_query
        token = (start + query).to(tl.int64)
        q_offset = token * q_stride_t + head * q_stride_n
        q = tl.load(q_ptr + q_offset[:, None] + dim, mask=is_row[:, None] & is_dim, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)

        last_position = tl.minimum(context - num_query + (first_row + BLOCK_ROWS - 1) // GROUP, context - 1)
        first_key = tl.maximum(context - num_query + first_row // GROUP - window + 1, 0) // BLOCK_X * BLOCK_X

        best = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_H), dtype=tl.float32)
        table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
        head_ptr, token_stride = pages_ptr + tl.program_id(1) * HEAD_DIM, tl.num_programs(1) * HEAD_DIM
        for first in range(first_key, last_position + 1, BLOCK_X):
            key = first + tl.arange(0, BLOCK_X)
            is_key = key <= last_position
            k_ptr = head_ptr + _offsets(table_ptr, key, is_key, page_stride, token_stride, PAGE_TOKENS)
            k = tl.load(k_ptr + dim[:, None], mask=is_key & is_dim[:, None], other=0.0)
            v = tl.load((k_ptr + PAGE_TOKENS * token_stride)[:, None] + dim, mask=is_key[:, None] & is_dim, other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            is_seen = (key <= position[:, None]) & (key > position[:, None] - window)
            scores = tl.where(is_seen, tl.dot(q, k, input_precision="ieee") * scale_log2, float("-inf"))
            best, total, acc = _accumulate(scores, v, best, total, acc)

        out_offset = token * GROUP * token_stride + head * HEAD_DIM
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_offset[:, None] + dim, out, mask=is_row[:, None] & is_dim)


@triton.jit
def _offsets(table_ptr, key, is_key, page_stride, token_stride, PAGE_TOKENS: tl.constexpr):
    """Return the offset of each key of a tile, read through the sequence's block table."""
    page = tl.load(table_ptr + key // PAGE_TOKENS, mask=is_key, other=0).to(tl.int64)
    return page * page_stride + (key % PAGE_TOKENS) * token_stride


@triton.jit
def _accumulate(scores, v, best, total, acc):
    """Add one tile of keys to the online softmax. Until a row sees a key, its `best` is -inf and its weights are 0."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights, decay = tl.exp2(scores - base[:, None]), tl.exp2(best - base)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_best, total * decay + tl.sum(weights, 1), acc
