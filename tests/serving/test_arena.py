"""The arena's memory: zeros, and in huge pages on Linux."""

import re
from pathlib import Path

import pytest
import torch

from serving.memory.arena import new_arena

SMAPS = Path("/proc/self/smaps")


def test_each_arena_has_its_own_zeros() -> None:
    arena_PE = new_arena(3, 5, torch.float16, torch.device("cpu"))
    assert (arena_PE.shape, arena_PE.dtype, arena_PE.any().item()) == ((3, 5), torch.float16, False)
    arena_PE.fill_(1.0)
    assert not new_arena(3, 5, torch.float16, torch.device("cpu")).any()


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")
def test_it_asks_for_huge_pages_of_private_memory() -> None:
    arena_PE = new_arena(64, 1 << 16, torch.float32, torch.device("cpu"))
    maps = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) .*?^VmFlags:(.*?)$", SMAPS.read_text(), re.M | re.S)
    ours = [(mode, flags) for a, b, mode, flags in maps if int(a, 16) <= arena_PE.data_ptr() < int(b, 16)]
    assert [mode for mode, _ in ours] == ["rw-p"]
    assert "hg" in ours[0][1].split() or not Path("/sys/kernel/mm/transparent_hugepage").exists()
