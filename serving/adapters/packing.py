"""Packs an adapter: lays its rows out in pages that are copied into the arena as they are. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError

_OS_PAGE_BYTES = 4096  # mapping a page takes an entry of 8 bytes
_MAP_BYTES = 32 * 1024  # private memory of a mapped file and its Python objects, about


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter on the host, laid out in pages in the model's dtype, so that few large copies bring it to the arena.

    The rows of `lora_a` (D elements each) and of `lora_b` transposed (F elements each) lie in the flat `pages_PE`.
    `a_rows_I` and `b_rows_I` hold their offsets in elements (int64). The entries of module m start at
    `table_starts[m]` in both. No row crosses the end of a page. A row longer than a page (of vocabulary size: an
    embedding's `lora_a`, a head's `lora_b`) is cut into pieces of `piece_width` elements. Row i of piece k is entry
    `table_starts[m] + k * ranks[m] + i`.

    If `is_dora[m]`, the rows of `lora_b` are multiplied by the DoRA factor (magnitude / norm) of each output. The
    factors minus 1 follow them as one row of F elements (or its pieces): the module's gains.

    All rows of module m lie in the first `page_ends[m]` pages, so it can be used before the other pages have come. If
    `is_mapped`, the tensors are a file's bytes in the page cache, which all engines of a machine share.
    """

    pages_PE: Tensor
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    is_dora: tuple[bool, ...]
    table_starts: tuple[int, ...]
    page_ends: tuple[int, ...]
    a_rows_I: Tensor
    b_rows_I: Tensor
    is_mapped: bool = False

    @property
    def num_pages(self) -> int:
        """The number of pages that it takes in the arena."""
        return self.pages_PE.shape[0]

    @property
    def num_bytes(self) -> int:
        """The private host memory that it takes; if mapped, only the cost of the mapping."""
        size = self.pages_PE.nbytes + self.a_rows_I.nbytes + self.b_rows_I.nbytes
        return min(size, _MAP_BYTES + size // _OS_PAGE_BYTES * 8) if self.is_mapped else size

    def pinned(self) -> "PackedAdapter":
        """Return a copy in pinned memory, which a GPU can read by itself."""
        return replace(self, pages_PE=self.pages_PE.pin_memory(), is_mapped=False)

    def touch(self) -> None:
        """Read a little of each page of memory, so that a later copy does not wait for the disk."""
        self.pages_PE.view(-1)[:: _OS_PAGE_BYTES // self.pages_PE.itemsize].max()


def pack_adapter(
    adapter: Adapter,
    modules: Sequence[str],
    page_elements: int,
    dtype: torch.dtype,
    dora_factors: Mapping[str, Tensor] = MappingProxyType({}),
    order: Sequence[int] | None = None,
) -> PackedAdapter:
    """Lay an adapter's rows out in pages. `modules` are all target modules of the model, in the order of their index.

    `dora_factors` holds magnitude / norm, one value for each output, of the DoRA modules. Modules are laid out in the
    `order` in which a forward pass reads them (by index if None). Each run of rows goes to the first page with room.
    Raises InvalidAdapterError if a value overflows `dtype`.
    """
    factors = [adapter.factors.get(module) for module in modules]
    sides = [
        ([], []) if f is None else _matrices(f, dora_factors.get(module), page_elements)
        for module, f in zip(modules, factors, strict=True)
    ]
    places, num_pages = _lay_out(sides, range(len(modules)) if order is None else order, page_elements)
    tables = [_table(*place) for place in places]
    return PackedAdapter(
        pages_PE=_write(sides, places, num_pages, page_elements, dtype),
        ranks=tuple(0 if f is None else f.rank for f in factors),
        scalings=tuple(0.0 if f is None else f.scaling for f in factors),
        is_dora=tuple(module in dora_factors for module in modules),
        table_starts=tuple(accumulate((len(a) for a, _ in tables), initial=0))[:-1],
        page_ends=tuple(max((*a, *b), default=-1) // page_elements + 1 for a, b in tables),
        a_rows_I=torch.tensor([offset for a, _ in tables for offset in a], dtype=torch.int64),
        b_rows_I=torch.tensor([offset for _, b in tables for offset in b], dtype=torch.int64),
    )


def dora_factors(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return magnitude / norm of each output of an adapter's DoRA modules, on a base with these (out, in) weights."""
    dora = {module: factors for module, factors in adapter.factors.items() if factors.magnitude_F is not None}
    return {module: factors.dora_factor(weights[module]) for module, factors in dora.items()}


def piece_width(width: int, page_elements: int) -> int:
    """Return the width of a row's pieces: the row's own width if it fits a page, else of the fewest equal pieces."""
    return -(-width // -(-width // page_elements))


class _Run(NamedTuple):
    """Rows [first, last) of a matrix with `width` columns, side by side in one page from element `offset` on."""

    first: int
    last: int
    width: int
    offset: int


_Sides = tuple[list[Tensor], list[Tensor]]  # a module's matrices of both tables
_Places = tuple[list[list[_Run]], list[list[_Run]]]  # where the rows of each of these matrices go


def _matrices(factors: LoraFactors, dora_factor_F: Tensor | None, page_elements: int) -> _Sides:
    """Return a module's matrices of both tables in the order of their entries, none wider than a page."""
    a_RD, b_RF = factors.a_RD, factors.b_FR.T
    width_a, width_b = (piece_width(rows.shape[1], page_elements) for rows in (a_RD, b_RF))
    if dora_factor_F is None:
        return list(a_RD.split(width_a, 1)), list(b_RF.split(width_b, 1))
    gains_1F = (dora_factor_F - 1.0)[None]
    return list(a_RD.split(width_a, 1)), [*(b_RF * dora_factor_F).split(width_b, 1), *gains_1F.split(width_b, 1)]


def _lay_out(sides: Sequence[_Sides], order: Sequence[int], page_elements: int) -> tuple[list[_Places], int]:
    """Return where the rows of each module go, and how many pages that takes."""
    places: list[_Places] = [([], []) for _ in sides]
    used: list[int] = []  # elements used of each page
    least = min((rows.shape[1] for a, b in sides for rows in (*a, *b)), default=1)
    first_open = 0  # pages before this one have no room for even the narrowest row
    for module in order:
        for matrices, runs in zip(sides[module], places[module], strict=True):
            for rows in matrices:
                while first_open < len(used) and page_elements - used[first_open] < least:
                    first_open += 1
                runs.append(_place(rows.shape[0], rows.shape[1], page_elements, used, first_open))
    return places, len(used)


def _place(num_rows: int, width: int, page_elements: int, used: list[int], page: int) -> list[_Run]:
    """Place rows into the room left in the pages from `page` on, then into new pages."""
    assert width <= page_elements, f"a row of {width} elements does not fit a page of {page_elements}"
    runs: list[_Run] = []
    first = 0
    while first < num_rows:
        if page == len(used):
            used.append(0)
        last = min(num_rows, first + (page_elements - used[page]) // width)
        if last > first:
            runs.append(_Run(first, last, width, page * page_elements + used[page]))
            used[page] += (last - first) * width
        first, page = last, page + 1
    return runs


def _table(a: Sequence[Sequence[_Run]], b: Sequence[Sequence[_Run]]) -> tuple[list[int], list[int]]:
    """Return a module's entries of both tables, the shorter one padded with zeros that are never read."""
    a_rows, b_rows = (
        [run.offset + i * run.width for runs in side for run in runs for i in range(run.last - run.first)]
        for side in (a, b)
    )
    length = max(len(a_rows), len(b_rows))
    return a_rows + [0] * (length - len(a_rows)), b_rows + [0] * (length - len(b_rows))


def _write(
    sides: Sequence[_Sides], places: Sequence[_Places], num_pages: int, page_elements: int, dtype: torch.dtype
) -> Tensor:
    """Write the rows to their places [P, E]; raises InvalidAdapterError if a value overflows `dtype`."""
    flat = torch.zeros(num_pages * page_elements, dtype=dtype)
    for matrices, all_runs in zip(sides, places, strict=True):
        for rows, runs in zip(matrices[0] + matrices[1], all_runs[0] + all_runs[1], strict=True):
            for first, last, width, offset in runs:
                flat[offset : offset + (last - first) * width].view(-1, width).copy_(rows[first:last])
    if num_pages and not torch.stack(flat.aminmax()).isfinite().all():
        raise InvalidAdapterError(f"the adapter has values that overflow {dtype}")
    return flat.view(num_pages, page_elements)
