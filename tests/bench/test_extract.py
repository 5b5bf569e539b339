"""The parts of the extraction benchmark at small sizes, and with a kit the whole of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import relora
from bench.extract import memory, rivals, run, svd
from bench.extract.run import TARGETS
from bench.extract.tuned import served
from cluster.adapters.files import load_adapter
from readapt.training.data import Row
from tests.worlds.serving import make_adapter, make_checkpoint


def test_speed_and_gap_are_measured_on_every_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readapt.lowrank.svd.EXACT_SIDE", 64)
    found = svd.measure(200, 8, 1, lambda line: None)
    assert set(found) == set(svd.SPECTRA)
    for case in found.values():
        assert case["ours_s"] > 0
        assert -1e-5 < case["energy_gap"] < 0.02
        assert case["energy_gap"] <= case["energy_gap_bound"] + 1e-5
    assert found["flat"]["energy_at_rank"] < 0.2 < found["i^-1"]["energy_at_rank"]
    assert found["flat"]["energy_gap"] < found["flat"]["svd_lowrank_energy_gap"]


def test_peak_memory_is_measured_in_a_separate_process(tmp_path: Path) -> None:
    base, tuned = memory.write_pair(tmp_path, side=2048)
    found = memory.measure(base, tuned, tmp_path / "out", 16)
    assert found["largest_bytes"] == 4 * 2048 * 2048
    assert found["peak_bytes"] > found["own_bytes"] + 2 * found["largest_bytes"]
    assert found["peak_rss_over_largest_tensor"] < 12, "buffers of the libraries weigh more for small tensors"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_extractors_are_measured_and_their_energy_is_recomputed(tmp_path: Path) -> None:
    base, tuned = rivals.write_wide_pair(tmp_path, hidden=128)
    found = rivals.measure(base, tuned, tmp_path, 8, None, lambda line: None)
    assert "mergekit" in found["mergekit"]["not_run"]
    for name in ("ours", "plain_peft"):
        assert found[name]["peak_bytes"] > 50 << 20
        assert found[name]["cpu_s"] > 0.5
    assert found["ours"]["energy"] == pytest.approx(found["plain_peft"]["energy"], abs=1e-4)
    assert 0.3 < found["ours"]["energy"] < 1
    failed = rivals.watched(["/bin/sh", "-c", "echo no such model; exit 3"])
    assert failed == {"not_run": "exit 3: no such model"}


def test_served_quality_counts_exact_answers(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = load_adapter(make_adapter(tmp_path / "adapter", base))
    rows = [Row(f"{n} and", "never written by a random model") for n in range(3)]
    assert served(base, None, rows) == served(base, adapter, rows) == 0.0


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`"
)  # a warning of PEFT about the adapter of the plain script
def test_the_whole_benchmark(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK", run.Size(256, 8, 1, 512, 128, ("trec",), 4))
    result = CliRunner().invoke(
        relora.app, ["bench", "extract", "--kit", str(kit), "--out", str(tmp_path / "o.json"), "--quick"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "o.json").read_text())
    assert set(TARGETS) | {"kl_to_tuned", "top1_agreement"} <= report.keys()
    assert report["top1_agreement"] > 0.9
    stored = load_file(tmp_path / "o.work" / "tuned-trec" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
