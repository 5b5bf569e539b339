"""Segmented LoRA on CUDA; `kernels.reference` defines each operation.

One program computes one tile of one segment, at the segment's true rank. The grid depends only on numbers that the host
knows: how many segments there are, the most tokens of any, and the largest rank. So no launch waits for the device, and
programs beyond their segment's tokens or rank return at once. There are no atomics: each output element has one owner,
so every run gives the same results.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (the arguments of a kernel have Triton's types, not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import LoraGroup, LoraSegments
from kernels.triton_common import UPCAST, span


def lora_shrink(x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
    """Multiply each token with its adapter's `lora_a`; see `kernels.reference.lora_shrink`."""
    num_in = x_TD.shape[1]
    assert x_TD.stride(1) == arena.stride(0) == 1
    h_TR = torch.zeros(x_TD.shape[0], group.num_columns, dtype=torch.float32, device=x_TD.device)
    for module, column in zip(group.modules, group.columns, strict=True):
        if module.max_rank == 0:
            continue
        block_t, block_r = _tile(module.max_tokens, 32), _tile(module.max_rank, 64)
        shrink_kernel[_grid(module, block_t, module.max_rank, block_r)](
            x_TD,
            arena,
            h_TR[:, column:],
            module.token_starts,
            module.ranks,
            module.scalings,
            module.table_starts,
            module.a_rows,
            num_in,
            x_TD.stride(0),
            h_TR.stride(0),
            module.ranks.stride(0),
            module.scalings.stride(0),
            module.table_starts.stride(0),
            BLOCK_T=block_t,
            BLOCK_R=block_r,
            BLOCK_D=min(128, max(16, triton.next_power_of_2(num_in))),
            UPCAST=UPCAST,
        )
    return h_TR


def lora_lookup(ids_T: Tensor, arena: Tensor, module: LoraSegments, width: int) -> Tensor:
    """Read the columns of `lora_a` that the ids name; see `kernels.reference.lora_lookup`."""
    assert ids_T.stride(0) == arena.stride(0) == 1
    h_TR = torch.zeros(ids_T.shape[0], module.max_rank, dtype=torch.float32, device=ids_T.device)
    block_t, block_r = _tile(module.max_tokens, 32), _tile(module.max_rank, 64)
    lookup_kernel[_grid(module, block_t, module.max_rank, block_r)](
        ids_T,
        arena,
        h_TR,
        module.token_starts,
        module.ranks,
        module.scalings,
        module.table_starts,
        module.a_rows,
        width,
        h_TR.stride(0),
        module.ranks.stride(0),
        module.scalings.stride(0),
        module.table_starts.stride(0),
        BLOCK_T=block_t,
        BLOCK_R=block_r,
    )
    return h_TR


def lora_expand(h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
    """Add `h @ lora_b^T` of each token's adapter to `out_TF`; see `kernels.reference.lora_expand`."""
    assert out_TF.stride(1) == h_TR.stride(1) == arena.stride(0) == 1
    for module, column, part_TF in zip(group.modules, group.columns, out_TF.split(group.widths, 1), strict=True):
        if module.max_rank == 0:
            continue
        num_out = part_TF.shape[1]
        block_t, block_f = _tile(module.max_tokens, 32), min(128, max(16, triton.next_power_of_2(num_out)))
        expand_kernel[_grid(module, block_t, num_out, block_f)](
            h_TR[:, column:],
            arena,
            part_TF,
            module.token_starts,
            module.ranks,
            module.table_starts,
            module.b_rows,
            num_out,
            h_TR.stride(0),
            part_TF.stride(0),
            module.ranks.stride(0),
            module.table_starts.stride(0),
            BLOCK_T=block_t,
            BLOCK_R=_tile(module.max_rank, 32),
            BLOCK_F=block_f,
        )


def dora_scale(arena: Tensor, group: LoraGroup, out_TF: Tensor, bias_F: Tensor | None) -> None:
    """Scale the base model's outputs as DoRA adapters do; see `kernels.reference.dora_scale`."""
    assert out_TF.stride(1) == arena.stride(0) == 1
    biases = (None,) * len(group.modules) if bias_F is None else bias_F.split(group.widths)
    for module, bias, part_TF in zip(group.modules, biases, out_TF.split(group.widths, 1), strict=True):
        if module.gain_rows is None:
            continue
        num_out = part_TF.shape[1]
        block_t, block_f = _tile(module.max_tokens, 32), min(128, max(16, triton.next_power_of_2(num_out)))
        dora_kernel[_grid(module, block_t, num_out, block_f)](
            arena,
            part_TF,
            arena if bias is None else bias,
            module.token_starts,
            module.gain_rows,
            num_out,
            part_TF.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_T=block_t,
            BLOCK_F=block_f,
        )


@triton.jit
def shrink_kernel(
    x_ptr,
    arena_ptr,
    h_ptr,
    token_starts_ptr,
    ranks_ptr,
    scalings_ptr,
    table_starts_ptr,
    a_rows_ptr,
    num_in,
    x_stride,
    h_stride,
    ranks_stride,
    scalings_stride,
    table_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`h[tile of T, tile of R] = scaling * (x @ A^T)` of segment `program_id(2)`, summed over D in order."""
    segment = tl.program_id(2)
    first_token, token, end = _token_tile(token_starts_ptr, BLOCK_T)
    rank = tl.load(ranks_ptr + segment * ranks_stride)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (first_token < end) & (tl.program_id(1) * BLOCK_R < rank):
        is_token, is_row = token < end, row < rank
        entry = tl.load(table_starts_ptr + segment * table_stride) + row
        a_offset = tl.load(a_rows_ptr + entry, mask=is_row, other=0)
        x_offset = token.to(tl.int64) * x_stride
        acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for first in range(0, num_in, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            is_column = column < num_in
            x = tl.load(x_ptr + x_offset[:, None] + column, mask=is_token[:, None] & is_column, other=0.0)
            a = tl.load(arena_ptr + a_offset[None, :] + column[:, None], mask=is_row & is_column[:, None], other=0.0)
            if UPCAST:
                x, a = x.to(tl.float32), a.to(tl.float32)
            acc += tl.dot(x, a, input_precision="ieee")
        acc *= tl.load(scalings_ptr + segment * scalings_stride)
        h_offset = token.to(tl.int64) * h_stride
        tl.store(h_ptr + h_offset[:, None] + row, acc, mask=is_token[:, None] & is_row)


@triton.jit
def lookup_kernel(
    ids_ptr,
    arena_ptr,
    h_ptr,
    token_starts_ptr,
    ranks_ptr,
    scalings_ptr,
    table_starts_ptr,
    a_rows_ptr,
    width,
    h_stride,
    ranks_stride,
    scalings_stride,
    table_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`h[tile of T, tile of R] = scaling * A[:, ids]^T` of segment `program_id(2)`; A's rows come in pieces."""
    segment = tl.program_id(2)
    first_token, token, end = _token_tile(token_starts_ptr, BLOCK_T)
    rank = tl.load(ranks_ptr + segment * ranks_stride)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (first_token < end) & (tl.program_id(1) * BLOCK_R < rank):
        is_token = token < end
        is_value = is_token[:, None] & (row < rank)
        id = tl.load(ids_ptr + token, mask=is_token, other=0)
        entry = tl.load(table_starts_ptr + segment * table_stride) + (id // width * rank)[:, None] + row
        a_offset = tl.load(a_rows_ptr + entry, mask=is_value, other=0) + (id % width)[:, None]
        value = tl.load(arena_ptr + a_offset, mask=is_value, other=0.0).to(tl.float32)
        h_offset = token.to(tl.int64) * h_stride
        scaling = tl.load(scalings_ptr + segment * scalings_stride)
        tl.store(h_ptr + h_offset[:, None] + row, scaling * value, mask=is_value)


@triton.jit
def expand_kernel(
    h_ptr,
    arena_ptr,
    out_ptr,
    token_starts_ptr,
    ranks_ptr,
    table_starts_ptr,
    b_rows_ptr,
    num_out,
    h_stride,
    out_stride,
    ranks_stride,
    table_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`out[tile of T, tile of F] += h @ B^T` of segment `program_id(2)`.

    16-bit rows are widened to float32, the dtype of h, so that nothing is rounded before the sum.
    """
    segment = tl.program_id(2)
    first_token, token, end = _token_tile(token_starts_ptr, BLOCK_T)
    rank = tl.load(ranks_ptr + segment * ranks_stride)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if (first_token < end) & (rank > 0):
        is_token, is_column = token < end, column < num_out
        table_start = tl.load(table_starts_ptr + segment * table_stride)
        acc = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            is_row = row < rank
            b_offset = tl.load(b_rows_ptr + table_start + row, mask=is_row, other=0)
            h_offset = token.to(tl.int64) * h_stride
            h = tl.load(h_ptr + h_offset[:, None] + row, mask=is_token[:, None] & is_row, other=0.0)
            b = tl.load(arena_ptr + b_offset[:, None] + column, mask=is_row[:, None] & is_column, other=0.0)
            acc += tl.dot(h, b.to(tl.float32), input_precision="ieee")
        out_offset = out_ptr + (token.to(tl.int64) * out_stride)[:, None] + column
        is_out = is_token[:, None] & is_column
        out = tl.load(out_offset, mask=is_out, other=0.0).to(tl.float32)
        tl.store(out_offset, (out + acc).to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def dora_kernel(
    arena_ptr,
    out_ptr,
    bias_ptr,
    token_starts_ptr,
    gain_rows_ptr,
    num_out,
    out_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`out[tile of T, tile of F] += gain * (out - bias)` of segment `program_id(2)`."""
    segment = tl.program_id(2)
    first_token, token, end = _token_tile(token_starts_ptr, BLOCK_T)
    gain_row = tl.load(gain_rows_ptr + segment)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if (first_token < end) & (gain_row >= 0):
        is_column = column < num_out
        is_out = (token < end)[:, None] & is_column
        out_offset = out_ptr + (token.to(tl.int64) * out_stride)[:, None] + column
        out = tl.load(out_offset, mask=is_out, other=0.0).to(tl.float32)
        gain = tl.load(arena_ptr + gain_row + column, mask=is_column, other=0.0).to(tl.float32)
        base = out
        if HAS_BIAS:
            base -= tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        tl.store(out_offset, (out + gain * base).to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def _token_tile(token_starts_ptr, BLOCK_T: tl.constexpr):
    """Return the first token of this program's tile, all its tokens, and the end of its segment."""
    start, end = span(token_starts_ptr)
    first = start + tl.program_id(0) * BLOCK_T
    return first, first + tl.arange(0, BLOCK_T), end


def _grid(module: LoraSegments, block_t: int, num_columns: int, block_columns: int) -> tuple[int, int, int]:
    num_segments = module.ranks.shape[0]
    return triton.cdiv(module.max_tokens, block_t), triton.cdiv(num_columns, block_columns), num_segments


def _tile(size: int, largest: int) -> int:
    """Return the smallest power of two that covers `size`, at least 16 (`tl.dot` takes no less), at most `largest`."""
    return min(largest, max(16, triton.next_power_of_2(size)))
