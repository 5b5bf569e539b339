"""How much of the arena's pages in use is empty, measured on an engine after each step."""

from serving.adapters.cache import ResidentAdapter
from serving.engine.engine import Engine


class MeasuredEngine(Engine):
    """An engine that can say how much memory it wastes. Costs nothing in a step."""

    def memory_waste(self) -> tuple[int, float]:
        """Return the number of pages in use, and how many pages' worth of them is empty.

        In use are the pages of running sequences (a shared page counts once) and of resident adapters. Empty is the
        room after a sequence's last token and around an adapter's rows.
        """
        page_elements, page_tokens = self._arena_PE.shape[1], self.config.page_tokens
        num_adapter_pages = self._adapters.num_pages_used
        num_pages = self._allocator.num_pages - self._allocator.num_free - self._prefixes.num_idle
        running = [sequence for sequence in self._sequences.values() if sequence.row is not None]
        rooms = [len(self._scheduler._table.pages(s)) * page_tokens - len(s.tokens) for s in running]
        slack = sum(max(room, 0) for room in rooms) * page_elements // page_tokens
        rows = sum(map(self._num_row_elements, self._adapters.residents()))
        return num_pages, num_adapter_pages + (slack - rows) / page_elements

    def _num_row_elements(self, adapter: ResidentAdapter) -> int:
        shapes = self._model.target_shapes.values()
        triples = zip(shapes, adapter.ranks_M.tolist(), adapter.is_dora_M.tolist(), strict=True)
        return sum(rank * (num_out + num_in) + is_dora * num_out for (num_out, num_in), rank, is_dora in triples)
