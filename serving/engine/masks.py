"""Which tokens the grammars of a batch allow next, as packed bits, and how they change the logits.

A mask takes microseconds, so the engine's thread computes it. Only constrained sequences have one.

Shape letters beside the usual ones: W2 32-bit words of a mask, with one bit for each token; W4 its bytes.
"""

import math
from collections.abc import Sequence, Set

import numpy as np
import torch
from llguidance import LLExecutor
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.matcher import Matcher

Bits = NDArray[np.uint32]


class MaskBuilder:
    """Computes which tokens the grammars of a batch allow next, in one call of the library."""

    def __init__(self, num_threads: int):
        self._executor = LLExecutor(num_threads)

    def build(self, matchers: Sequence[Matcher], end_ids: Sequence[Set[int]]) -> Bits:
        """Return a mask for each matcher: [O, W2]. `end_ids` are the tokens that end each sequence.

        They are allowed exactly where the grammar may stop. A matcher in an error state allows nothing.
        """
        bits_OW2 = np.zeros((len(matchers), max(matcher.table.num_words for matcher in matchers)), np.uint32)
        for table in {matcher.table for matcher in matchers}:
            rows = [row for row, matcher in enumerate(matchers) if matcher.table is table]
            part_OW2 = np.zeros((len(rows), table.num_words), np.uint32)
            states = [(matchers[row].state, i) for i, row in enumerate(rows)]
            self._executor.unsafe_compute_mask_ptr(states, part_OW2.ctypes.data, part_OW2.strides[0], len(rows))
            bits_OW2[rows, : table.num_words] = part_OW2
        for row, (matcher, ids) in enumerate(zip(matchers, end_ids, strict=True)):
            if matcher.state.is_error():
                bits_OW2[row] = 0
            else:
                _set_ends(bits_OW2[row], matcher.table.end, ids)
        return bits_OW2


def _set_ends(bits_W2: Bits, end: int, end_ids: Set[int]) -> None:
    """Allow a sequence's own end tokens if the library allows the table's, else forbid them."""
    may_stop = bits_W2[end >> 5] >> (end & 31) & 1
    known_ids = [token for token in end_ids if token < 32 * len(bits_W2)]
    for token in (end, *known_ids):
        bits_W2[token >> 5] &= ~np.uint32(1 << (token & 31))
    if may_stop:
        for token in known_ids:
            bits_W2[token >> 5] |= np.uint32(1 << (token & 31))


def mask_logits(logits_OV: Tensor, bits_OW2: Bits) -> None:
    """Set the logits of the tokens that the masks do not allow to -inf, in place."""
    denied_OW4 = ~bits_OW2.view(np.uint8)  # in little-endian order, as the library's masks are
    num_tokens, device = logits_OV.shape[1], logits_OV.device
    is_on_cpu = device.type == "cpu"  # where NumPy unpacks bits twenty times as fast as torch
    is_denied_OV = _unpack(denied_OW4, num_tokens) if is_on_cpu else unpack(denied_OW4, num_tokens, device)
    logits_OV.masked_fill_(is_denied_OV, -math.inf)


def unpack(bytes_OW4: NDArray[np.uint8], num_tokens: int, device: torch.device) -> Tensor:
    """Return the first `num_tokens` bits of each row as booleans: [O, V]. The device gets them packed."""
    powers_8 = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    packed_OW4 = torch.from_numpy(bytes_OW4).to(device)
    return (packed_OW4[:, :, None] & powers_8 != 0).flatten(1)[:, :num_tokens]


def _unpack(bytes_OW4: NDArray[np.uint8], num_tokens: int) -> Tensor:
    bits_OV = np.unpackbits(bytes_OW4, axis=1, count=num_tokens, bitorder="little")
    return torch.from_numpy(bits_OV.view(np.bool_))
