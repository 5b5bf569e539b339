"""An adapter laid out in pages: pure functions from factors to one blob that is copied into the arena as it is.

Shape letters: M target modules of the whole model, N rows of an adapter over all modules, P pages, E elements of a
page, R rank, D in, F out, 2 the two tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError

_PAGE_BYTES = 4096  # of the operating system's memory; each one that is mapped takes an entry of 8 bytes
_MAP_BYTES = 32 * 1024  # of private memory for one mapped file and the Python objects beside it, about


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter on the host, cut into pages in the model's dtype, so that making it resident is a few large copies.

    The table `a_rows_I` has the element offsets (int64) in the flat blob of the rows of `lora_a` (D elements), the
    table `b_rows_I` those of `lora_b` transposed (F elements); module m's entries begin at `table_starts[m]` in both.
    No row straddles a page. A row longer than a page (of vocabulary size: an embedding's `lora_a`, a head's `lora_b`)
    is cut into pieces of `piece_width` elements: row i of piece k is entry `table_starts[m] + k * ranks[m] + i`.

    With `is_dora[m]`, the module's DoRA gains, one row of F elements (or its pieces), follow its rows of `lora_b`: what
    the factor (magnitude / norm) of each output has over 1. `lora_b` has been multiplied by that factor.

    All rows of module m lie in the first `page_ends[m]` pages, so that it can be used before the others have come.
    With `is_mapped` the tensors are a file's bytes in the page cache, which all engines of a machine share.
    """

    blob_PE: Tensor
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
        """Pages of the arena that it takes."""
        return self.blob_PE.shape[0]

    @property
    def num_bytes(self) -> int:
        """Private host memory that it takes: if mapped, what the map costs."""
        size = self.blob_PE.nbytes + self.a_rows_I.nbytes + self.b_rows_I.nbytes
        return min(size, _MAP_BYTES + size // _PAGE_BYTES * 8) if self.is_mapped else size

    def pinned(self) -> "PackedAdapter":
        """A copy in memory that a GPU can read by itself."""
        return replace(self, blob_PE=self.blob_PE.pin_memory(), is_mapped=False)

    def touch(self) -> None:
        """Read a little of each page of memory, so that whoever copies it soon need not wait for a disk."""
        self.blob_PE.view(-1)[:: _PAGE_BYTES // self.blob_PE.itemsize].max()


def pack_adapter(
    adapter: Adapter,
    modules: Sequence[str],
    page_elements: int,
    dtype: torch.dtype,
    dora_factors: Mapping[str, Tensor] = MappingProxyType({}),
    order: Sequence[int] | None = None,
) -> PackedAdapter:
    """Lay an adapter's rows out in pages. `modules` are all target modules of the model, in the order of their index.

    `dora_factors` has (magnitude / norm), one for each output, of the modules that are DoRA. Rows go in the `order` in
    which the modules are used (their index, if None), as many at a time as the first page with room takes.
    Raises InvalidAdapterError where a value overflows `dtype`.
    """
    factors = [adapter.factors.get(module) for module in modules]
    sides = [
        ([], []) if f is None else _matrices(f, dora_factors.get(module), page_elements)
        for module, f in zip(modules, factors, strict=True)
    ]
    places, num_pages = _lay_out(sides, range(len(modules)) if order is None else order, page_elements)
    tables = [_table(*place) for place in places]
    return PackedAdapter(
        blob_PE=_write(sides, places, num_pages, page_elements, dtype),
        ranks=tuple(0 if f is None else f.rank for f in factors),
        scalings=tuple(0.0 if f is None else f.scaling for f in factors),
        is_dora=tuple(module in dora_factors for module in modules),
        table_starts=tuple(accumulate((len(a) for a, _ in tables), initial=0))[:-1],
        page_ends=tuple(max((*a, *b), default=-1) // page_elements + 1 for a, b in tables),
        a_rows_I=torch.tensor([offset for a, _ in tables for offset in a], dtype=torch.int64),
        b_rows_I=torch.tensor([offset for _, b in tables for offset in b], dtype=torch.int64),
    )


def dora_factors(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The (magnitude / norm) of each output of an adapter's DoRA modules on a base of these (out, in) weights."""
    dora = {module: factors for module, factors in adapter.factors.items() if factors.magnitude_F is not None}
    return {module: factors.dora_factor(weights[module]) for module, factors in dora.items()}


def piece_width(width: int, page_elements: int) -> int:
    """The width of the pieces of a row: itself if a page holds it, else as few and as equal pieces as will fit."""
    return -(-width // -(-width // page_elements))


class _Run(NamedTuple):
    """Rows [first, last) of a matrix of so many columns, side by side in one page from element `offset` on."""

    first: int
    last: int
    width: int
    offset: int


_Sides = tuple[list[Tensor], list[Tensor]]  # of a module: the matrices of both tables
_Places = tuple[list[list[_Run]], list[list[_Run]]]  # where the rows of each of them go


def _matrices(factors: LoraFactors, dora_factor_F: Tensor | None, page_elements: int) -> _Sides:
    """The matrices of both tables in the order of their entries, none wider than a page."""
    a_RD, b_RF = factors.a_RD, factors.b_FR.T
    width_a, width_b = (piece_width(rows.shape[1], page_elements) for rows in (a_RD, b_RF))
    if dora_factor_F is None:
        return list(a_RD.split(width_a, 1)), list(b_RF.split(width_b, 1))
    gains_1F = (dora_factor_F - 1.0)[None]
    return list(a_RD.split(width_a, 1)), [*(b_RF * dora_factor_F).split(width_b, 1), *gains_1F.split(width_b, 1)]


def _lay_out(sides: Sequence[_Sides], order: Sequence[int], page_elements: int) -> tuple[list[_Places], int]:
    """Where the rows of each module go, and how many pages that takes."""
    places: list[_Places] = [([], []) for _ in sides]
    used: list[int] = []  # elements taken of each page
    least = min((rows.shape[1] for a, b in sides for rows in (*a, *b)), default=1)
    first_open = 0  # the pages before are full: not even the narrowest row has room
    for module in order:
        for matrices, runs in zip(sides[module], places[module], strict=True):
            for rows in matrices:
                while first_open < len(used) and page_elements - used[first_open] < least:
                    first_open += 1
                runs.append(_place(rows.shape[0], rows.shape[1], page_elements, used, first_open))
    return places, len(used)


def _place(num_rows: int, width: int, page_elements: int, used: list[int], page: int) -> list[_Run]:
    """Rows into what is left of the pages from `page` on, then into new ones."""
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
    """One module's entries of both tables, the shorter one padded with zeros that nobody reads."""
    a_rows, b_rows = (
        [run.offset + i * run.width for runs in side for run in runs for i in range(run.last - run.first)]
        for side in (a, b)
    )
    length = max(len(a_rows), len(b_rows))
    return a_rows + [0] * (length - len(a_rows)), b_rows + [0] * (length - len(b_rows))


def _write(
    sides: Sequence[_Sides], places: Sequence[_Places], num_pages: int, page_elements: int, dtype: torch.dtype
) -> Tensor:
    """The blob; raises InvalidAdapterError where a value overflows."""
    blob = torch.zeros(num_pages * page_elements, dtype=dtype)
    for matrices, all_runs in zip(sides, places, strict=True):
        for rows, runs in zip(matrices[0] + matrices[1], all_runs[0] + all_runs[1], strict=True):
            for first, last, width, offset in runs:
                blob[offset : offset + (last - first) * width].view(-1, width).copy_(rows[first:last])
    if num_pages and not torch.stack(blob.aminmax()).isfinite().all():
        raise InvalidAdapterError(f"the adapter has values that {dtype} cannot hold")
    return blob.view(num_pages, page_elements)
