"""Training a group of adapters in one pass is timed against single runs."""

from pathlib import Path

import pytest

from bench.readapt.training_group import group_speedup
from tests.worlds.serving import make_checkpoint


def test_the_speedup_is_the_ratio_of_both_times(tmp_path: Path) -> None:
    figures = group_speedup(make_checkpoint(tmp_path / "v1"), num_adapters=3, batch_rows=2, mean_tokens=12, rounds=3)
    assert (figures["num_adapters"], figures["batch_rows"], figures["device"].split()[0]) == (3, 2, "cpu,")
    assert 0 < figures["group_s"] < 3 * figures["one_by_one_s"]
    assert figures["packed_training_speedup"] == pytest.approx(figures["one_by_one_s"] / figures["group_s"])
