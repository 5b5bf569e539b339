"""The operations as a CPU does them quickly: no Python loop over tokens, nor over sequences that only decode.

Same names, signatures and meaning as `kernels.reference`. Shape letters: T tokens, U those of them that have an
adapter, D in, F out, W either of them, R rank, P pages, L layers, K key/value heads, N query heads (in `q_TNH`) or
sequences, A query heads, H head dim, B blocks, C tokens of context, Q new tokens of a sequence.

Adapter rows are gathered through overlapping windows of the arena: row i of the view is the W elements from offset i,
so that one `index_select` copies whole rows wherever they lie (24 times faster at W = 192 than an index for every
element; one thread of a Xeon with AVX512, torch 2.13, 2026-11-22).
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.segments import LoraSegments

# One product over all tokens gathers rows for every token; a loop over segments gathers once for each, but calls more.
# As bench/kernels.py measures it, a segment's calls cost as much as 2**16 elements, and the product's as 8 segments'.
_ELEMENTS_PER_SEGMENT, _SEGMENTS_PER_PRODUCT = 1 << 16, 8
# Keys gathered for one fused attention: 1 MB in float32 stays in the cache; more of them cost page faults every time.
_ELEMENTS_PER_GROUP = 1 << 18


def lora_shrink(x_TD: Tensor, arena: Tensor, segments: LoraSegments) -> Tensor:
    """Project each token onto its adapter's rows of `lora_a`; see `kernels.reference.lora_shrink`."""
    h_TR = torch.zeros(x_TD.shape[0], segments.max_rank, dtype=torch.float32)
    windows = _windows(arena, x_TD.shape[1])
    if _is_batched(segments, x_TD.shape):
        rows = segments.token_rows
        a_URD = _gather(windows, rows.a_rows_UR)
        h_UR = torch.bmm(x_TD[rows.tokens].float()[:, None], a_URD.mT)[:, 0]
        h_TR[rows.tokens] = h_UR.masked_fill_(~rows.is_row_UR, 0.0)
        return h_TR
    for start, end, rank, table_start, _ in _each_segment(segments):
        a_RD = _gather(windows, segments.a_rows[table_start : table_start + rank])
        torch.mm(x_TD[start:end].float(), a_RD.T, out=h_TR[start:end, :rank])
    return h_TR


def lora_expand(h_TR: Tensor, arena: Tensor, segments: LoraSegments, out_TF: Tensor) -> None:
    """Add each adapter's contribution to `out_TF`, in place; see `kernels.reference.lora_expand`."""
    windows = _windows(arena, out_TF.shape[1])
    if _is_batched(segments, out_TF.shape):
        rows = segments.token_rows
        b_URF = _gather(windows, rows.b_rows_UR)
        delta_UF = torch.bmm((h_TR[rows.tokens] * rows.scalings_U1)[:, None], b_URF)[:, 0]
        out_TF[rows.tokens] = (out_TF[rows.tokens] + delta_UF).to(out_TF.dtype)
        return
    for start, end, rank, table_start, scaling in _each_segment(segments):
        b_RF = _gather(windows, segments.b_rows[table_start : table_start + rank])
        out_TF[start:end].add_(h_TR[start:end, :rank] @ b_RF, alpha=scaling)


def store_kv(k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, slots_T: Tensor, layer: int) -> None:
    """Write this step's keys and values to their pages, in place; see `kernels.reference.store_kv`."""
    page_tokens = kv_pages.shape[3]
    where = (slots_T // page_tokens, slots_T % page_tokens)
    kv_pages[:, layer, 0].index_put_(where, k_TKH)
    kv_pages[:, layer, 1].index_put_(where, v_TKH)


def paged_attention(
    q_TNH: Tensor,
    kv_pages: Tensor,
    layer: int,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables_NB: Tensor,
    *,
    scale: float,
    window: int | None,
    max_query_tokens: int,
    max_context_tokens: int,
) -> Tensor:
    """Causal attention over paged keys and values; see `kernels.reference.paged_attention`.

    Sequences with the same number of new tokens and about as many pages are padded to the longest of them and go
    through one fused attention: all that decode are a few calls, a prefill chunk is usually a call of its own.
    """
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    for num_query, num_context, rows_N in _each_group(query_starts, context_lens, kv_pages):
        tokens_NQ = query_starts[rows_N].long()[:, None] + torch.arange(num_query)
        is_seen_NQC = _seen(context_lens[rows_N], num_query, num_context, window)
        blocks_NB = block_tables_NB[rows_N, : num_context // kv_pages.shape[3]]
        k_NCKH, v_NCKH = _context(kv_pages, layer, blocks_NB, is_seen_NQC)
        out_TNH[tokens_NQ] = _attend(q_TNH[tokens_NQ], k_NCKH, v_NCKH, is_seen_NQC, scale)
    return out_TNH


def _windows(arena: Tensor, width: int) -> Tensor:
    return arena.as_strided((arena.numel() - width + 1, width), (1, 1))


def _gather(windows: Tensor, offsets: Tensor) -> Tensor:
    rows = windows.index_select(0, offsets.flatten())
    return rows.view(*offsets.shape, windows.shape[1]).float()


def _is_batched(segments: LoraSegments, shape_TW: tuple[int, ...]) -> bool:
    num_tokens, width = shape_TW
    spare_segments = segments.ranks.shape[0] - _SEGMENTS_PER_PRODUCT
    return num_tokens * width * segments.max_rank <= spare_segments * _ELEMENTS_PER_SEGMENT


def _each_segment(segments: LoraSegments) -> Iterator[tuple[int, int, int, int, float]]:
    starts = segments.token_starts.tolist()
    ranks, table_starts = segments.ranks.tolist(), segments.table_starts.tolist()
    for s, scaling in enumerate(segments.scalings.tolist()):
        if ranks[s] > 0 and starts[s + 1] > starts[s]:
            yield starts[s], starts[s + 1], ranks[s], table_starts[s], scaling


def _each_group(query_starts: Tensor, context_lens: Tensor, kv_pages: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Sequences to attend together: new tokens of each, context of the longest in whole pages, their numbers."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    page_tokens, num_kv_heads, head_dim = kv_pages.shape[3:]
    num_blocks = [-(-num_context // page_tokens) for num_context in context_lens.tolist()]
    for n, num_query in enumerate(query_starts.diff().tolist()):
        groups[num_query, num_blocks[n].bit_length()].append(n)
    for (num_query, _), rows in groups.items():
        num_context = max(num_blocks[n] for n in rows) * page_tokens
        size = max(1, _ELEMENTS_PER_GROUP // (num_context * num_kv_heads * head_dim))
        for first in range(0, len(rows), size):
            yield num_query, num_context, torch.tensor(rows[first : first + size])


def _seen(context_lens_N: Tensor, num_query: int, num_context: int, window: int | None) -> Tensor:
    position_NQ1 = (context_lens_N[:, None] - num_query + torch.arange(num_query))[:, :, None]
    key_C = torch.arange(num_context)
    is_seen_NQC = key_C <= position_NQ1
    return is_seen_NQC if window is None else is_seen_NQC & (key_C > position_NQ1 - window)


def _context(kv_pages: Tensor, layer: int, blocks_NB: Tensor, is_seen_NQC: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some sequences, [N, C, K, H] each, zero where no query sees them.

    What lies beyond a sequence's end is somebody's old data: even weighted by zero, a NaN there would spread.
    """
    num_sequences, _, num_context = is_seen_NQC.shape
    unseen = (~is_seen_NQC.any(1)).flatten().nonzero()[:, 0]
    sides = []
    for side in (0, 1):
        x_NCKH = kv_pages[:, layer, side].index_select(0, blocks_NB.flatten())
        x_NCKH.view(num_sequences * num_context, -1).index_fill_(0, unseen, 0.0)
        sides.append(x_NCKH.view(num_sequences, num_context, *kv_pages.shape[4:]))
    return sides[0], sides[1]


def _attend(q_NQAH: Tensor, k_NCKH: Tensor, v_NCKH: Tensor, is_seen_NQC: Tensor, scale: float) -> Tensor:
    """One fused attention; the query heads of a key/value head are laid out as further queries of it."""
    num_sequences, num_query, num_heads, head_dim = q_NQAH.shape
    num_kv_heads = k_NCKH.shape[2]
    group = num_heads // num_kv_heads
    q = q_NQAH.view(num_sequences, num_query, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        q.reshape(num_sequences, num_kv_heads, group * num_query, head_dim),
        k_NCKH.transpose(1, 2),
        v_NCKH.transpose(1, 2),
        attn_mask=is_seen_NQC.repeat(1, group, 1)[:, None],
        scale=scale,
    )
    out = out.view(num_sequences, num_kv_heads, group, num_query, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_sequences, num_query, num_heads, head_dim)
