"""The arena: the one tensor of pages that KV cache and adapters share."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def new_arena(num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros [P, E]. On a Linux CPU they lie in huge pages if the kernel grants them.

    A step reads a little from many places of the arena. With pages of 4 KiB most of that time is address translation.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_pages, page_elements, dtype=dtype, device=device)
    # Private, unlike Python's default: huge pages of shared memory have their own kernel switch, usually off.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, num_pages * page_elements * dtype.itemsize, flags=flags)
    with suppress(OSError):  # the kernel has no huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype).view(num_pages, page_elements)  # keeps the buffer alive
