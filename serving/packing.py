"""An adapter laid out in pages: pure functions from factors to one blob that is copied into the arena as it is.

Shape letters: M target modules of the whole model, N rows of an adapter over all modules, P pages, E elements of a
page, R rank, D in, F out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter on the host, cut into pages in the model's dtype, so that making it resident is one copy.

    Row i of module m is entry `table_starts[m] + i` of `a_rows_N` and `b_rows_N`: element offsets (int64) in the flat
    blob of row i of `lora_a` (D elements) and of `lora_b` transposed (F elements). No row straddles a page.
    """

    blob_PE: Tensor
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
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


def pack_adapter(adapter: Adapter, modules: Sequence[str], page_elements: int, dtype: torch.dtype) -> PackedAdapter:
    """Lay an adapter's rows out in pages. `modules` are all target modules of the model, in the order of their index.

    Rows of one matrix stay together as far as a page reaches, largest groups first, each into the first page with room.
    Raises InvalidAdapterError where a value overflows `dtype`.
    """
    factors = [adapter.factors.get(module) for module in modules]
    ranks = tuple(0 if f is None else f.rank for f in factors)
    matrices = [rows for f in factors if f is not None for rows in _matrices(f)]
    groups, num_pages = _lay_out(matrices, page_elements)
    offsets = [torch.empty(rows.shape[0], dtype=torch.int64) for rows in matrices]
    blob = torch.zeros(num_pages * page_elements, dtype=dtype)
    for group in groups:
        rows = matrices[group.matrix][group.first : group.last]
        offsets[group.matrix][group.first : group.last] = group.offset + rows.shape[1] * torch.arange(rows.shape[0])
        blob[group.offset : group.offset + rows.numel()] = rows.flatten()
    if not blob.isfinite().all():
        raise InvalidAdapterError(f"the adapter has values that {dtype} cannot hold")
    return PackedAdapter(
        blob_PE=blob.view(num_pages, page_elements),
        ranks=ranks,
        scalings=tuple(0.0 if f is None else f.scaling for f in factors),
        table_starts=tuple(accumulate(ranks, initial=0))[:-1],
        a_rows_N=_concatenated(offsets[0::2]),
        b_rows_N=_concatenated(offsets[1::2]),
    )


class _Group(NamedTuple):
    """Rows [first, last) of one matrix, side by side in one page from element `offset` of the blob on."""

    matrix: int
    first: int
    last: int
    offset: int


def _matrices(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    return factors.a_RD, factors.b_FR.T


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


def _concatenated(offsets: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(offsets)) if offsets else torch.empty(0, dtype=torch.int64)
