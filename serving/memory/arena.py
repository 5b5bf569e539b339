"""The one memory that KV cache and adapters share.

Shape letters: P pages, E elements of a page.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def new_arena(num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [P, E]; on a Linux CPU in huge pages where the kernel grants them.

    A step reads a little in many places of the arena: with pages of 4 KiB most of that waits for address translation.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_pages, page_elements, dtype=dtype, device=device)
    # Private, not Python's default: for shared memory the kernel has another switch, which nearly everywhere says no.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, num_pages * page_elements * dtype.itemsize, flags=flags)
    with suppress(OSError):  # a kernel without huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype).view(num_pages, page_elements)  # keeps the buffer alive
