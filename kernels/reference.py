"""The definition of each operation in plain torch: the twins that every implementation is tested against.

They work on any device. Everything is computed in float32 and rounded once to the dtype of the output. R of a group is
its number of columns of h (`LoraGroup.num_columns`), F the sum of its modules' out features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.segments import LoraGroup, LoraSegments


def lora_shrink(x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
    """Multiply each token with its adapter's `lora_a` in each module of the group, and scale.

    `h[t, c : c + rank] = scaling * (x[t] @ A^T)`, where A is the `[rank, D]` matrix of t's segment in the module whose
    columns of h start at c. Columns beyond the rank and tokens without an adapter are zero.

    x_TD:  any float dtype
    arena: flat, same dtype
    Returns float32 [T, R].
    """
    h_TR = torch.zeros(x_TD.shape[0], group.num_columns, dtype=torch.float32, device=x_TD.device)
    for module, column in zip(group.modules, group.columns, strict=True):
        for tokens, rank, table_start, scaling in _each_segment(module):
            a_RD = _rows(arena, module.a_rows[table_start : table_start + rank], x_TD.shape[1])
            h_TR[tokens, column : column + rank] = scaling * (x_TD[tokens].float() @ a_RD.T)
    return h_TR


def lora_lookup(ids_T: Tensor, arena: Tensor, module: LoraSegments, width: int) -> Tensor:
    """Read the column of its adapter's `lora_a` that each token id names, and scale it.

    This is `lora_shrink` for the embedding, whose input is one-hot: `h[t, :rank] = scaling * A[:, ids[t]]`. Columns
    beyond the rank and tokens without an adapter are zero.

    ids_T: int64
    arena: flat, any float dtype
    width: rows of A are cut into pieces of `width` elements (the last is shorter); row i of piece k is entry
           `table_starts[s] + k * ranks[s] + i` of a_rows
    Returns float32 [T, module.max_rank].
    """
    h_TR = torch.zeros(ids_T.shape[0], module.max_rank, dtype=torch.float32, device=ids_T.device)
    for tokens, rank, table_start, scaling in _each_segment(module):
        for t in range(tokens.start, tokens.stop):
            piece, column = divmod(int(ids_T[t]), width)
            first = table_start + piece * rank
            h_TR[t, :rank] = scaling * arena[module.a_rows[first : first + rank] + column].float()
    return h_TR


def lora_expand(h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
    """Add `h @ lora_b^T` of each token's adapter to the outputs of the group's modules, in place.

    In each module's columns, `out[t] += h[t, c : c + rank] @ B^T`, where B^T is the `[rank, width]` matrix of t's
    segment and the module's columns of h start at c. Tokens without an adapter do not change.

    h_TR:   float32, from `lora_shrink` or `lora_lookup`
    arena:  flat, any float dtype; rows of lora_b must be finite (packing checks it), because an implementation may
            multiply another adapter's row by zero
    out_TF: the arena's dtype or float32; the modules' outputs side by side
    """
    parts = out_TF.split(group.widths, 1)
    for module, column, part_TF in zip(group.modules, group.columns, parts, strict=True):
        for tokens, rank, table_start, _ in _each_segment(module):
            b_RF = _rows(arena, module.b_rows[table_start : table_start + rank], part_TF.shape[1])
            part_TF[tokens] = (part_TF[tokens].float() + h_TR[tokens, column : column + rank] @ b_RF).to(out_TF.dtype)


def dora_scale(arena: Tensor, group: LoraGroup, out_TF: Tensor, bias_F: Tensor | None) -> None:
    """Scale the base model's outputs as DoRA adapters do (arXiv 2402.09353, section 4.1), in place.

    In each module's columns, `out[t] += gain * (out[t] - bias)` with the gains of t's segment: DoRA's factor
    (magnitude / norm) minus 1. Tokens of other adapters do not change.

    arena:  flat, any float dtype
    out_TF: the arena's dtype or float32; the modules' outputs side by side
    bias_F: the bias that the outputs already contain
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
    """Write the keys and values of new tokens to their pages, in place.

    With `page, offset = divmod(slots[t], page_tokens)`: `kv_pages[page, layer, 0, offset] = k[t]` and
    `kv_pages[page, layer, 1, offset] = v[t]`.

    k_TKH, v_TKH: any float dtype
    kv_pages:     [P, L, 2, page_tokens, K, H], same dtype, a view of the arena
    slots_T:      int64, all different
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
    """Attend causally from each sequence's new tokens to all its tokens, whose keys and values are already stored.

    Query j of sequence b is at position `context_lens[b] - num_query + j` and sees the key positions p with
    `position - window < p <= position` (all `p <= position` without a window). Query heads `g * G` to `g * G + G - 1`
    read key/value head g (grouped-query attention).

    q_TNH:    any float dtype
    kv_pages: [P, L, 2, page_tokens, K, H], same dtype, a view of the arena
    Returns [T, N, H] in q's dtype.
    """
    out_TNH = torch.empty_like(q_TNH)
    starts = metadata.query_starts.tolist()
    for b, num_context in enumerate(metadata.context_lens.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        k_XKH, v_XKH = _context(kv_pages, layer, metadata.block_tables_BW[b], num_context)
        out_TNH[tokens] = _attend(q_TNH[tokens].float(), k_XKH, v_XKH, scale, window).to(q_TNH.dtype)
    return out_TNH


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise each row by its root mean square (arXiv 1910.07467): `weight * (x / sqrt(mean(x ** 2) + eps))`.

    As in transformers, the normalised row is rounded before the weight is applied.

    x_TD, weight_D: any float dtype, the same
    Returns a new tensor [T, D] in x's dtype.
    """
    x = x_TD.float()
    return weight_D * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).to(x_TD.dtype)


def rotate(x_TNH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> None:
    """Apply rotary position embedding (arXiv 2104.09864), in place: rotate each pair of each head by an angle.

    Elements i and i + J of a head are a pair, with J = H / 2: x[i] becomes `x[i] cos[i] - x[i + J] sin[i]`, and
    x[i + J] becomes `x[i + J] cos[i] + x[i] sin[i]`.

    x_TNH:          any float dtype; each token's heads side by side, possibly a slice of a projection's output
    cos_TJ, sin_TJ: same dtype
    """
    first, second = x_TNH.float().chunk(2, -1)
    cos, sin = cos_TJ[:, None].float(), sin_TJ[:, None].float()
    x_TNH.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Return `silu(gate) * up` of each row, the gated unit of SwiGLU (arXiv 2002.05202).

    gate_up_TF: any float dtype; the gate's columns, then those of up
    Returns [T, F / 2] in the same dtype.
    """
    gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
    return (gate_TF * gate_TF.sigmoid() * up_TF).to(gate_up_TF.dtype)


def mask_logits(logits_OV: Tensor, rows_O2: Tensor, bits_O2V2: Tensor) -> None:
    """Set the logits of the tokens that each row's mask lacks to -inf, in place.

    logits_OV: float32
    rows_O2:   int64; the rows that have a mask
    bits_O2V2: int32; bit i of word w stands for token 32 w + i. The words have at least V bits.
    """
    for row, bits_V2 in zip(rows_O2.tolist(), bits_O2V2.tolist(), strict=True):
        for token in range(logits_OV.shape[1]):
            if not bits_V2[token // 32] >> token % 32 & 1:
                logits_OV[row, token] = -torch.inf


def _each_segment(segments: LoraSegments) -> Iterator[tuple[slice, int, int, float]]:
    """Yield the tokens, rank, start in the row table and scaling of each segment that has a rank."""
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
