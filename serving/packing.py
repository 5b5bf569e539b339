"""An adapter laid out in pages: pure functions from factors to one blob that is copied into the arena as it is.

Shape letters: M target modules of the whole model, N rows of an adapter over all modules, P pages, E elements of a
page, R rank, D in, F out, 2 the two tables.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter on the host, cut into pages in the model's dtype, so that making it resident is one copy.

    The table `a_rows_N` has the element offsets (int64) in the flat blob of the rows of `lora_a` (D elements), the
    table `b_rows_N` those of `lora_b` transposed (F elements); module m's entries begin at `table_starts[m]` in both.
    No row straddles a page. A row longer than a page (of vocabulary size: an embedding's `lora_a`, a head's `lora_b`)
    is cut into pieces of `piece_width` elements: row i of piece k is entry `table_starts[m] + k * ranks[m] + i`.

    With `is_dora[m]`, the module's DoRA gains, one row of F elements (or its pieces), follow its rows of `lora_b`: what
    the factor (magnitude / norm) of each output has over 1. `lora_b` has been multiplied by that factor.
    """

    blob_PE: Tensor
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    is_dora: tuple[bool, ...]
    table_starts: tuple[int, ...]
    a_rows_N: Tensor
    b_rows_N: Tensor

    @property
    def num_pages(self) -> int:
        """Pages of the arena that it takes."""
        return self.blob_PE.shape[0]

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return self.blob_PE.nbytes + self.a_rows_N.nbytes + self.b_rows_N.nbytes


def pack_adapter(
    adapter: Adapter,
    modules: Sequence[str],
    page_elements: int,
    dtype: torch.dtype,
    dora_factors: Mapping[str, Tensor] = MappingProxyType({}),
) -> PackedAdapter:
    """Lay an adapter's rows out in pages. `modules` are all target modules of the model, in the order of their index.

    `dora_factors` has (magnitude / norm), one for each output, of the modules that are DoRA. Rows of one matrix stay
    together as far as a page reaches, largest groups first, each into the first page with room.
    Raises InvalidAdapterError where a value overflows `dtype`.
    """
    factors = [adapter.factors.get(module) for module in modules]
    sides = [
        ([], []) if f is None else _matrices(f, dora_factors.get(module), page_elements)
        for module, f in zip(modules, factors, strict=True)
    ]
    blob_PE, offsets = _write([rows for a, b in sides for rows in (*a, *b)], page_elements, dtype)
    tables = [_table([next(offsets) for _ in a], [next(offsets) for _ in b]) for a, b in sides]
    return PackedAdapter(
        blob_PE=blob_PE,
        ranks=tuple(0 if f is None else f.rank for f in factors),
        scalings=tuple(0.0 if f is None else f.scaling for f in factors),
        is_dora=tuple(module in dora_factors for module in modules),
        table_starts=tuple(accumulate((table_2N.shape[1] for table_2N in tables), initial=0))[:-1],
        a_rows_N=torch.cat([table_2N[0] for table_2N in tables]),
        b_rows_N=torch.cat([table_2N[1] for table_2N in tables]),
    )


def dora_factors(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The (magnitude / norm) of each output of an adapter's DoRA modules on a base of these (out, in) weights."""
    dora = {module: factors for module, factors in adapter.factors.items() if factors.magnitude_F is not None}
    return {module: factors.dora_factor(weights[module]) for module, factors in dora.items()}


def piece_width(width: int, page_elements: int) -> int:
    """The width of the pieces of a row: itself if a page holds it, else as few and as equal pieces as will fit."""
    return -(-width // -(-width // page_elements))


class _Group(NamedTuple):
    """Rows [first, last) of one matrix, side by side in one page from element `offset` of the blob on."""

    matrix: int
    first: int
    last: int
    offset: int


def _matrices(
    factors: LoraFactors, dora_factor_F: Tensor | None, page_elements: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of both tables in the order of their entries, none wider than a page."""
    a_RD, b_RF = factors.a_RD, factors.b_FR.T
    width_a, width_b = (piece_width(rows.shape[1], page_elements) for rows in (a_RD, b_RF))
    if dora_factor_F is None:
        return list(a_RD.split(width_a, 1)), list(b_RF.split(width_b, 1))
    gains_1F = (dora_factor_F - 1.0)[None]
    return list(a_RD.split(width_a, 1)), [*(b_RF * dora_factor_F).split(width_b, 1), *gains_1F.split(width_b, 1)]


def _write(matrices: Sequence[Tensor], page_elements: int, dtype: torch.dtype) -> tuple[Tensor, Iterator[Tensor]]:
    """The blob, and the offsets of each matrix' rows in it."""
    groups, num_pages = _lay_out(matrices, page_elements)
    offsets = [torch.empty(rows.shape[0], dtype=torch.int64) for rows in matrices]
    blob = torch.zeros(num_pages * page_elements, dtype=dtype)
    for group in groups:
        rows = matrices[group.matrix][group.first : group.last]
        offsets[group.matrix][group.first : group.last] = group.offset + rows.shape[1] * torch.arange(rows.shape[0])
        blob[group.offset : group.offset + rows.numel()] = rows.flatten()
    if not blob.isfinite().all():
        raise InvalidAdapterError(f"the adapter has values that {dtype} cannot hold")
    return blob.view(num_pages, page_elements), iter(offsets)


def _table(a_rows: Sequence[Tensor], b_rows: Sequence[Tensor]) -> Tensor:
    """One module's entries of both tables, the shorter one padded with zeros that nobody reads."""
    counts = [sum(len(rows) for rows in side) for side in (a_rows, b_rows)]
    table_2N = torch.zeros(2, max(counts), dtype=torch.int64)
    for side, (count, rows) in enumerate(zip(counts, (a_rows, b_rows), strict=True)):
        if count:
            table_2N[side, :count] = torch.cat(list(rows))
    return table_2N


def _lay_out(matrices: Sequence[Tensor], page_elements: int) -> tuple[list[_Group], int]:
    """Where each run of rows goes, and how many pages that takes."""
    used: list[int] = []  # elements taken of each page
    groups = []
    for num_elements, matrix, first, last in sorted(_runs(matrices, page_elements), reverse=True):
        groups.append(_Group(matrix, first, last, _place(num_elements, page_elements, used)))
    return groups, len(used)


def _runs(matrices: Sequence[Tensor], page_elements: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of rows no larger than a page, as (elements, matrix, first row, last row)."""
    for matrix, rows in enumerate(matrices):
        num_rows, width = rows.shape
        rows_per_page = page_elements // width
        assert rows_per_page > 0, f"a row of {width} elements does not fit a page of {page_elements}"
        for first in range(0, num_rows, rows_per_page):
            last = min(first + rows_per_page, num_rows)
            yield (last - first) * width, matrix, first, last


def _place(num_elements: int, page_elements: int, used: list[int]) -> int:
    """Offset in the blob of a run of that many elements: in the first page with room, or in a new one."""
    page = next((p for p, taken in enumerate(used) if taken + num_elements <= page_elements), len(used))
    if page == len(used):
        used.append(0)
    offset = page * page_elements + used[page]
    used[page] += num_elements
    return offset
