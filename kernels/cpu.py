"""The operations on a CPU in batched torch; `kernels.reference` defines each one.

There is no Python loop over tokens, nor over sequences that decode.

Adapter rows are gathered through overlapping windows of the arena: row i of the view is the `width` elements from
offset i. One `index_select` then copies whole rows from anywhere. At width 192 this is 24 times faster than an index
for every element (one thread of a Xeon with AVX512, torch 2.13, 2026-11-22).
"""

from collections import defaultdict
from collections.abc import Iterator
from enum import Enum, auto
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import AttentionMetadata
from kernels.pointwise import mask_logits, rms_norm, rotate, silu_mul
from kernels.segments import LoraGroup, LoraSegments

__all__ = [
    "dora_scale",
    "lora_expand",
    "lora_lookup",
    "lora_shrink",
    "mask_logits",
    "paged_attention",
    "rms_norm",
    "rotate",
    "silu_mul",
    "store_kv",
]


class _Way(Enum):
    """How to multiply tokens with their adapters' matrices. Each is the fastest for some batches.

    LOOP: one product per segment. ALL: one product of every token with every segment's rows, of which only its own
    segment's results are used; few calls, and rows are read once. TOKENS: one product per token, with a copy of its
    rows.
    """

    LOOP = auto()
    ALL = auto()
    TOKENS = auto()


# Costs in ns (one thread of an AMD EPYC with AVX2, torch 2.13, 2026-11-22). Per element: reading a row, a
# multiplication, a token's copy. Per call of each way: for LOOP, per segment and module.
_READ, _MULTIPLY, _COPY = 0.13, 0.023, 0.14
_LOOP_CALLS, _ALL_CALLS, _TOKENS_CALLS = 10_000.0, 14_000.0, 13_000.0
_MAX_COPIED = 1 << 22  # elements; larger copies cause page faults in every call, 2 ns per element
# Keys gathered for one fused attention: 1 MB in float32 stays in the cache, more causes page faults in every call.
_ELEMENTS_PER_GROUP = 1 << 18


def lora_shrink(x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
    """Multiply each token with its adapter's `lora_a`; see `kernels.reference.lora_shrink`."""
    windows = _windows(arena, x_TD.shape[1])
    num_adapted = len(group.token_segments)
    way = _cheapest_way(group, num_adapted, x_TD.shape[1] * group.num_columns, len(group.modules))
    h_TR = torch.zeros(x_TD.shape[0], group.num_columns, dtype=torch.float32)
    if group.num_columns == 0:
        return h_TR
    if way is _Way.TOKENS:
        where, rows_UR, scales_UR = group.inputs_by_token
        h_UR = torch.bmm(x_TD[where].float()[:, None], _gather(windows, rows_UR).mT)[:, 0]
        h_TR[where] = h_UR.mul_(scales_UR)
    elif way is _Way.ALL:
        rows = _gather(windows, group.inputs_by_segment.rows.flatten())
        own_UR = (x_TD[:num_adapted].float() @ rows.T).view(-1, group.num_columns)
        if group.num_segments > 1:
            own_UR = own_UR.index_select(0, group.token_places)
        torch.mul(own_UR, group.token_scales, out=h_TR[:num_adapted])
        if len(group.unadapted_tokens):
            h_TR[group.unadapted_tokens] = 0.0  # a foreign row's infinity times scale 0 would be NaN
    else:
        for module, column in zip(group.modules, group.columns, strict=True):
            for start, end, rank, table_start, scaling in _each_segment(module):
                a_RD = _gather(windows, module.a_rows[table_start : table_start + rank])
                h_TR[start:end, column : column + rank] = (x_TD[start:end].float() @ a_RD.T).mul_(scaling)
    return h_TR


def lora_lookup(ids_T: Tensor, arena: Tensor, module: LoraSegments, width: int) -> Tensor:
    """Read the columns of `lora_a` that the ids name; see `kernels.reference.lora_lookup`."""
    h_TR = torch.zeros(ids_T.shape[0], module.max_rank, dtype=torch.float32)
    segment_U = torch.repeat_interleave(module.token_starts.diff())
    tokens = module.ranks[segment_U].nonzero()[:, 0]
    segment_U, ids_U1 = segment_U[tokens], ids_T[tokens][:, None]
    ranks_U1, row_R = module.ranks[segment_U][:, None], torch.arange(module.max_rank)
    firsts_U1 = module.table_starts[segment_U][:, None] + ids_U1 // width * ranks_U1
    rows_UR = module.a_rows[firsts_U1 + torch.minimum(row_R, ranks_U1 - 1)]
    values_UR = arena[rows_UR + ids_U1 % width].float() * module.scalings[segment_U][:, None]
    h_TR[tokens] = values_UR.masked_fill_(row_R >= ranks_U1, 0.0)
    return h_TR


def lora_expand(h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
    """Add `h @ lora_b^T` of each token's adapter to `out_TF`; see `kernels.reference.lora_expand`."""
    num_adapted = len(group.token_segments)
    parts = zip(group.modules, group.columns, out_TF.split(group.widths, 1), strict=True)
    for index, (module, column, part_TF) in enumerate(parts):
        if module.max_rank == 0:
            continue
        own_TR = h_TR[:, column : column + module.max_rank]
        windows = _windows(arena, part_TF.shape[1])
        way = _cheapest_way(group, num_adapted, part_TF.shape[1] * module.max_rank, 1)
        if way is _Way.TOKENS:
            where, rows_UR = group.b_rows_by_token[index]
            _add(part_TF, where, torch.bmm(own_TR[where][:, None], _gather(windows, rows_UR))[:, 0])
        elif way is _Way.ALL:
            rows = _gather(windows, group.b_rows_by_segment[index].flatten())
            part_TF[:num_adapted].add_(_spread(own_TR[:num_adapted], group) @ rows)
        else:
            for start, end, rank, table_start, _ in _each_segment(module):
                b_RF = _gather(windows, module.b_rows[table_start : table_start + rank])
                part_TF[start:end].add_(own_TR[start:end, :rank] @ b_RF)


def dora_scale(arena: Tensor, group: LoraGroup, out_TF: Tensor, bias_F: Tensor | None) -> None:
    """Scale the base model's outputs as DoRA adapters do; see `kernels.reference.dora_scale`."""
    biases = (None,) * len(group.modules) if bias_F is None else bias_F.split(group.widths)
    for module, bias, part_TF in zip(group.modules, biases, out_TF.split(group.widths, 1), strict=True):
        if module.gain_rows is not None:
            tokens, rows_U = module.gains_by_token
            base_UF = part_TF[tokens].float()
            gains_UF = _gather(_windows(arena, part_TF.shape[1]), rows_U)
            scaled_UF = torch.addcmul(base_UF, gains_UF, base_UF if bias is None else base_UF - bias.float())
            part_TF[tokens] = scaled_UF.to(out_TF.dtype)


def store_kv(k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, layer: int, slots_T: Tensor) -> None:
    """Write the keys and values of new tokens to their pages; see `kernels.reference.store_kv`."""
    page_tokens = kv_pages.shape[3]
    where = (slots_T // page_tokens, slots_T % page_tokens)
    kv_pages[:, layer, 0].index_put_(where, k_TKH)
    kv_pages[:, layer, 1].index_put_(where, v_TKH)


def paged_attention(
    q_TNH: Tensor,
    kv_pages: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend causally over paged keys and values; see `kernels.reference.paged_attention`.

    Sequences with equally many new tokens and about equally many pages share one fused attention, padded to the longest
    of them. So all decoding sequences need only a few calls; a prefill chunk usually has its own call.
    """
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    for num_query, num_context, rows_B in _each_group(metadata, kv_pages):
        tokens_BQ = metadata.query_starts[rows_B].long()[:, None] + torch.arange(num_query)
        is_seen_BQX = _seen(metadata.context_lens[rows_B], num_query, num_context, window)
        blocks_BW = metadata.block_tables_BW[rows_B, : num_context // kv_pages.shape[3]]
        k_BXKH, v_BXKH = _context(kv_pages, layer, blocks_BW, is_seen_BQX)
        out_TNH[tokens_BQ] = _attend(q_TNH[tokens_BQ], k_BXKH, v_BXKH, is_seen_BQX, scale)
    return out_TNH


def _windows(arena: Tensor, width: int) -> Tensor:
    return arena.as_strided((arena.numel() - width + 1, width), (1, 1))


def _gather(windows: Tensor, offsets: Tensor) -> Tensor:
    rows = windows.index_select(0, offsets.flatten())
    return rows.view(*offsets.shape, windows.shape[1]).float()


def _cheapest_way(group: LoraGroup, num_tokens: int, matrix: int, num_modules: int) -> _Way:
    """Return the cheapest way for `num_tokens` tokens and matrices of `matrix` elements per segment, in all modules."""
    num_segments = group.num_segments
    copied = num_tokens * matrix
    read, multiply = _READ * num_segments * matrix, _MULTIPLY * copied
    costs = [
        (read + multiply + num_segments * num_modules * _LOOP_CALLS, _Way.LOOP),
        (read + multiply * num_segments + _ALL_CALLS, _Way.ALL),
    ]
    if copied <= _MAX_COPIED:
        costs.append((_COPY * copied + _TOKENS_CALLS, _Way.TOKENS))
    return min(costs, key=itemgetter(0))[1]


def _spread(own_UR: Tensor, group: LoraGroup) -> Tensor:
    """Return [U, S * R]: each token's h in the columns of its own segment, zero in all others."""
    if group.num_segments == 1:
        return own_UR
    spread = torch.zeros(len(own_UR) * group.num_segments, own_UR.shape[1])
    return spread.index_copy_(0, group.token_places, own_UR).view(len(own_UR), -1)


def _add(part_TF: Tensor, where: Tensor | slice, delta_UF: Tensor) -> None:
    if isinstance(where, slice):
        part_TF[where].add_(delta_UF)
    else:
        part_TF[where] = (part_TF[where] + delta_UF).to(part_TF.dtype)


def _each_segment(segments: LoraSegments) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield the first token, end, rank, start in the row table and scaling of each segment that has a rank."""
    starts = segments.token_starts.tolist()
    ranks, table_starts = segments.ranks.tolist(), segments.table_starts.tolist()
    for s, scaling in enumerate(segments.scalings.tolist()):
        if ranks[s] > 0 and starts[s + 1] > starts[s]:
            yield starts[s], starts[s + 1], ranks[s], table_starts[s], scaling


def _each_group(metadata: AttentionMetadata, kv_pages: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield sequences to attend together: new tokens of each, context of the longest in whole pages, their indices."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    page_tokens, num_kv_heads, head_dim = kv_pages.shape[3:]
    num_blocks = [-(-num_context // page_tokens) for num_context in metadata.context_lens.tolist()]
    for b, num_query in enumerate(metadata.query_starts.diff().tolist()):
        groups[num_query, num_blocks[b].bit_length()].append(b)
    for (num_query, _), rows in groups.items():
        num_context = max(num_blocks[b] for b in rows) * page_tokens
        size = max(1, _ELEMENTS_PER_GROUP // (num_context * num_kv_heads * head_dim))
        for first in range(0, len(rows), size):
            yield num_query, num_context, torch.tensor(rows[first : first + size])


def _seen(context_lens_B: Tensor, num_query: int, num_context: int, window: int | None) -> Tensor:
    position_BQ1 = (context_lens_B[:, None] - num_query + torch.arange(num_query))[:, :, None]
    key_X = torch.arange(num_context)
    is_seen_BQX = key_X <= position_BQ1
    return is_seen_BQX if window is None else is_seen_BQX & (key_X > position_BQ1 - window)


def _context(kv_pages: Tensor, layer: int, blocks_BW: Tensor, is_seen_BQX: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of some sequences, [B, X, K, H] each, zero where no query sees them.

    Beyond a sequence's end there is stale data, and a NaN in it would spread even with weight zero.
    """
    num_sequences, _, num_context = is_seen_BQX.shape
    unseen = (~is_seen_BQX.any(1)).flatten().nonzero()[:, 0]
    sides = []
    for side in (0, 1):
        x_BXKH = kv_pages[:, layer, side].index_select(0, blocks_BW.flatten())
        x_BXKH.view(num_sequences * num_context, -1).index_fill_(0, unseen, 0.0)
        sides.append(x_BXKH.view(num_sequences, num_context, *kv_pages.shape[4:]))
    return sides[0], sides[1]


def _attend(q_BQNH: Tensor, k_BXKH: Tensor, v_BXKH: Tensor, is_seen_BQX: Tensor, scale: float) -> Tensor:
    """Run one fused attention. The query heads of a key/value head become further queries of it."""
    num_sequences, num_query, num_heads, head_dim = q_BQNH.shape
    num_kv_heads = k_BXKH.shape[2]
    group = num_heads // num_kv_heads
    q = q_BQNH.view(num_sequences, num_query, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        q.reshape(num_sequences, num_kv_heads, group * num_query, head_dim),
        k_BXKH.transpose(1, 2),
        v_BXKH.transpose(1, 2),
        attn_mask=is_seen_BQX.repeat(1, group, 1)[:, None],
        scale=scale,
    )
    out = out.view(num_sequences, num_kv_heads, group, num_query, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_sequences, num_query, num_heads, head_dim)
