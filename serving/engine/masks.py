"""Which tokens the grammars of a batch allow next, as packed bits, and how they change the logits.

A mask takes microseconds, so the engine's thread computes it. Only constrained sequences have one.

Shape letters beside the usual ones: O2 constrained rows; V2 32-bit words of a mask, with one bit for each token.
"""

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from serving.engine.matcher import Matcher
from serving.engine.sampler import SampleArray
from serving.engine.sequence import SequenceState


class Mask(NamedTuple):
    """The tokens that some rows of a batch may have next. See `kernels.reference.mask_logits`."""

    rows_O2: Tensor
    bits_O2V2: Tensor


class MaskBuilder:
    """Computes the masks of a step, with several threads in one call of the library; applies them with `ops`."""

    def __init__(self, ops: Ops, vocab_size: int, num_threads: int):
        self._ops = ops
        self._num_words = -(-vocab_size // 32)
        # With one thread, waking it costs more than a mask, and on a busy machine much more.
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None

    def of(self, sequences: Sequence[SequenceState], rows_O: SampleArray) -> Callable[[Tensor], None] | None:
        """Return what masks the logits of the constrained sequences, or None if there are none.

        The masks are built at once, while a GPU still computes the logits.
        """
        rows = np.flatnonzero(rows_O["is_constrained"]).tolist()
        matchers = [matcher for row in rows if (matcher := sequences[row].matcher) is not None]
        return partial(self.apply, mask=self.build(rows, matchers)) if rows else None

    def build(self, rows: Sequence[int], matchers: Sequence[Matcher]) -> Mask:
        """Return the masks of some rows. Each row's matcher has seen all its tokens so far.

        Tokens that end a sequence are allowed exactly where its grammar may stop. A matcher with an error allows
        nothing.
        """
        tables = {matcher.table for matcher in matchers}
        num_words = max(self._num_words, *(table.num_words for table in tables))
        bits_O2V2 = np.zeros((len(matchers), num_words), np.uint32)
        for table in tables:
            own = [i for i, matcher in enumerate(matchers) if matcher.table is table]
            part_O2V2 = np.zeros((len(own), table.num_words), np.uint32)
            address, num_bytes = part_O2V2.ctypes.data, part_O2V2.strides[0]
            states = [(matchers[i].state, place) for place, i in enumerate(own)]
            if self._executor is not None:
                self._executor.unsafe_compute_mask_ptr(states, address, num_bytes, len(own))
            else:
                for state, place in states:
                    state.unsafe_compute_mask_ptr(address + place * num_bytes, num_bytes)
            bits_O2V2[own, : table.num_words] = part_O2V2
        for bits_V2, matcher in zip(bits_O2V2, matchers, strict=True):
            if matcher.state.is_error():
                bits_V2[:] = 0
            else:
                _set_ends(bits_V2, matcher.table.end, matcher.end_ids)
        return Mask(torch.tensor(rows), torch.from_numpy(bits_O2V2.view(np.int32)))

    def apply(self, logits_OV: Tensor, mask: Mask) -> None:
        """Set the logits of the tokens that the masks do not allow to -inf, in place."""
        rows_O2, bits_O2V2 = (tensor.to(logits_OV.device) for tensor in mask)
        self._ops.mask_logits(logits_OV, rows_O2, bits_O2V2)


def _set_ends(bits_V2: NDArray[np.uint32], end: int, end_ids: Set[int]) -> None:
    """Allow a sequence's own end tokens if the library allows the table's, else forbid them."""
    may_stop = bits_V2[end >> 5] >> (end & 31) & 1
    known_ids = [token for token in end_ids if token < 32 * len(bits_V2)]
    for token in (end, *known_ids):
        bits_V2[token >> 5] &= ~np.uint32(1 << (token & 31))
    if may_stop:
        for token in known_ids:
            bits_V2[token >> 5] |= np.uint32(1 << (token & 31))
