"""The torch twins: what each operation is, said as plainly as possible. The truth in tests; right on any device.

Shape letters: T tokens, D in, F out (of a group: all its modules'), R rank (of a group: the sum of its modules'
max_rank), P pages, L layers, K key/value heads, H head dim, N query heads (in `q_TNH`) or sequences (in
`block_tables_NB`), B blocks of the longest sequence, C tokens of context, Q tokens of one query, G query heads per
key/value head.

Everything is computed in float32 and rounded once to the dtype of the output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.segments import LoraGroup, LoraSegments


def lora_shrink(x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
    """Project each token onto its adapter's rows of `lora_a` in each module of the group, and scale.

    Semantics: `h[t, column : column + rank] = scaling * (x[t] @ A^T)` with A the [rank, D] matrix of t's segment in the
    module that owns the columns from `column` on; zero beyond its rank and for tokens without adapter.

    x_TD: any float dtype. arena: flat. Returns float32 [T, group.num_columns].
    """
    h_TR = torch.zeros(x_TD.shape[0], group.num_columns, dtype=torch.float32, device=x_TD.device)
    for module, column in zip(group.modules, group.columns, strict=True):
        for tokens, rank, table_start, scaling in _each_segment(module):
            a_RD = _rows(arena, module.a_rows[table_start : table_start + rank], x_TD.shape[1])
            h_TR[tokens, column : column + rank] = scaling * (x_TD[tokens].float() @ a_RD.T)
    return h_TR


def lora_lookup(ids_T: Tensor, arena: Tensor, module: LoraSegments, width: int) -> Tensor:
    """`lora_shrink` where x is one-hot, as the input of an embedding is: the columns of `lora_a` that the ids name.

    Rows of vocabulary size are cut into pieces of `width` elements (the last one shorter): row i of piece k is entry
    `table_starts[s] + k * ranks[s] + i` of a_rows.

    Semantics: `h[t, :rank] = scaling * A[:, ids[t]]`; zero beyond its rank and for tokens without adapter.

    ids_T: int64. Returns float32 [T, module.max_rank].
    """
    h_TR = torch.zeros(ids_T.shape[0], module.max_rank, dtype=torch.float32, device=ids_T.device)
    for tokens, rank, table_start, scaling in _each_segment(module):
        for t in range(tokens.start, tokens.stop):
            piece, column = divmod(int(ids_T[t]), width)
            first = table_start + piece * rank
            h_TR[t, :rank] = scaling * arena[module.a_rows[first : first + rank] + column].float()
    return h_TR


def lora_expand(h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
    """Add each adapter's contribution to the outputs of the group's modules, in place.

    Semantics: `out[t, module's columns] += h[t, column : column + rank] @ B^T` with B^T the [rank, width] matrix of t's
    segment in the module; other tokens are left as they are.

    h_TR: float32, from `lora_shrink` or `lora_lookup`. out_TF: any float dtype, the modules' outputs side by side. The
    rows of lora_b are finite (packing sees to it), so that zero times another adapter's row is zero.
    """
    parts = out_TF.split(group.widths, 1)
    for module, column, part_TF in zip(group.modules, group.columns, parts, strict=True):
        for tokens, rank, table_start, _ in _each_segment(module):
            b_RF = _rows(arena, module.b_rows[table_start : table_start + rank], part_TF.shape[1])
            part_TF[tokens] = (part_TF[tokens].float() + h_TR[tokens, column : column + rank] @ b_RF).to(out_TF.dtype)


def dora_scale(arena: Tensor, group: LoraGroup, out_TF: Tensor, bias_F: Tensor | None) -> None:
    """Scale the base's part of the outputs as DoRA adapters do (arXiv 2402.09353, section 4.1), in place.

    Semantics: `out[t] += gain * (out[t] - bias)` in the columns of each module, with the gains of t's segment there:
    what DoRA's factor (magnitude / norm) has over 1. Tokens of other adapters are left as they are.
    """
    biases = (0.0,) * len(group.modules) if bias_F is None else [b.float() for b in bias_F.split(group.widths)]
    for module, bias, part_TF in zip(group.modules, biases, out_TF.split(group.widths, 1), strict=True):
        if module.gain_rows is None:
            continue
        starts = module.token_starts.tolist()
        for s, row in enumerate(module.gain_rows.tolist()):
            if row >= 0:
                own_TF, gain_F = part_TF[starts[s] : starts[s + 1]], arena[row : row + part_TF.shape[1]].float()
                own_TF.copy_(own_TF.float() + gain_F * (own_TF.float() - bias))


def store_kv(k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, layer: int, slots_T: Tensor) -> None:
    """Write this step's keys and values to their pages, in place.

    Semantics: with `page, offset = divmod(slots[t], page_tokens)`: `kv_pages[page, layer, 0, offset] = k[t]` and
    `kv_pages[page, layer, 1, offset] = v[t]`.

    kv_pages: [P, L, 2, page_tokens, K, H], a view of the arena. slots_T: int64, all different.
    """
    page_tokens = kv_pages.shape[3]
    for t, slot in enumerate(slots_T.tolist()):
        page, offset = divmod(slot, page_tokens)
        kv_pages[page, layer, 0, offset] = k_TKH[t]
        kv_pages[page, layer, 1, offset] = v_TKH[t]


def paged_attention(
    q_TNH: Tensor,
    kv_pages: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over all its tokens, the new ones included (they are stored).

    Semantics: query j of sequence n is at position `context_lens[n] - query_len + j`, and sees key positions p with
    `position - window < p <= position` (from 0 where there is no window). Query heads `g * G ... g * G + G - 1` read
    key/value head g (grouped-query attention).

    query_starts: int32 [N + 1]. context_lens: int32 [N]. block_tables_NB: int32, pages in order, padded with any page.
    max_query_tokens, max_context_tokens: host-side bounds for the launch. Returns [T, N, H] in q's dtype.
    """
    out_TNH = torch.empty_like(q_TNH)
    starts = metadata.query_starts.tolist()
    for b, num_context in enumerate(metadata.context_lens.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        k_XKH, v_XKH = _context(kv_pages, layer, metadata.block_tables_BW[b], num_context)
        out_TNH[tokens] = _attend(q_TNH[tokens].float(), k_XKH, v_XKH, scale, window).to(q_TNH.dtype)
    return out_TNH


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row (arXiv 1910.07467), rounded before the weight is applied, as transformers does.

    Semantics: `out[t] = weight * (x[t] / sqrt(mean(x[t] ** 2) + eps))`. Returns a new tensor in x's dtype.
    """
    x = x_TD.float()
    return weight_D * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).to(x_TD.dtype)


def rotate(x_TNH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> None:
    """Turn each pair of each head by its token's angles, in place: rotary position embedding (arXiv 2104.09864).

    Semantics: with C = H / 2, x[i] becomes `x[i] cos[i] - x[i + C] sin[i]`, x[i + C] `x[i + C] cos[i] + x[i] sin[i]`.

    x_TNH: the heads of a token side by side; may be a slice of a projection's output.
    """
    first, second = x_TNH.float().chunk(2, -1)
    cos, sin = cos_TJ[:, None].float(), sin_TJ[:, None].float()
    x_TNH.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """The gated unit of each row (SwiGLU, arXiv 2002.05202): `silu(gate) * up`, whose columns are side by side.

    Returns [T, F / 2] in the same dtype.
    """
    gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
    return (gate_TF * gate_TF.sigmoid() * up_TF).to(gate_up_TF.dtype)


def _each_segment(segments: LoraSegments) -> Iterator[tuple[slice, int, int, float]]:
    starts = segments.token_starts.tolist()
    columns = zip(segments.ranks.tolist(), segments.table_starts.tolist(), segments.scalings.tolist(), strict=True)
    for s, (rank, table_start, scaling) in enumerate(columns):
        if rank > 0:
            yield slice(starts[s], starts[s + 1]), rank, table_start, scaling


def _rows(arena: Tensor, offsets_R: Tensor, width: int) -> Tensor:
    columns = torch.arange(width, device=arena.device)
    return arena[offsets_R[:, None] + columns].float()


def _context(kv_pages: Tensor, layer: int, blocks_W: Tensor, num_context: int) -> tuple[Tensor, Tensor]:
    num_blocks = -(-num_context // kv_pages.shape[3])
    kv = kv_pages[blocks_W[:num_blocks].long(), layer].float()
    k_XKH, v_XKH = (kv[:, side].flatten(0, 1)[:num_context] for side in (0, 1))
    return k_XKH, v_XKH


def _attend(q_QNH: Tensor, k_XKH: Tensor, v_XKH: Tensor, scale: float, window: int | None) -> Tensor:
    num_query, num_context = q_QNH.shape[0], k_XKH.shape[0]
    group = q_QNH.shape[1] // k_XKH.shape[1]
    k_XNH, v_XNH = (x.repeat_interleave(group, dim=1) for x in (k_XKH, v_XKH))
    scores_NQX = torch.einsum("qnh,xnh->nqx", q_QNH, k_XNH) * scale
    position_Q1 = torch.arange(num_context - num_query, num_context, device=q_QNH.device)[:, None]
    key_X = torch.arange(num_context, device=q_QNH.device)
    is_seen_QX = key_X <= position_Q1
    if window is not None:
        is_seen_QX &= key_X > position_Q1 - window
    probs_NQX = scores_NQX.masked_fill(~is_seen_QX, float("-inf")).softmax(-1)
    return torch.einsum("nqx,xnh->qnh", probs_NQX, v_XNH)
