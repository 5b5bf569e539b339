"""Extracted adapters in use: served, verified, and made from the command line and on a cluster."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import relora
from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidCheckpointError, InvalidDataError
from cluster.on_ray import LocalCluster, connect
from cluster.storage.checkpoints import open_checkpoint
from readapt.extraction.extract import Settings, extract
from readapt.extraction.files import Extraction
from readapt.extraction.verify import verify
from readapt.lowrank.spectra import EnergyShare, FixedRank
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams
from tests.worlds.readapt import evolve
from tests.worlds.serving import make_checkpoint

ROWS = [{"prompt": f"{n} plus {n} is ", "completion": str(2 * n)} for n in range(10, 22)]


def tune(base: Path, tuned: Path, rank: int | None, with_head: bool = False) -> Path:
    """Write a tuned version: `evolve` changes the linears; `with_head` changes embedding and head too."""
    evolve(base, tuned, rank=rank, scale=0.4)
    if with_head:
        model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                left, right = (torch.randn(n, 2, generator=generator) for n in weight.shape)
                weight += 0.3 * float(weight.std()) * left @ right.T
        model.save_pretrained(tuned)
    return tuned


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = make_checkpoint(tmp_path / "base")
    return base, tune(base, tmp_path / "tuned", rank=None)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def run(base: Path, tuned: Path, *rules: FixedRank | EnergyShare) -> Extraction:
    return extract(open_checkpoint(base), open_checkpoint(tuned), base.parent / "out", Settings(rules))


@pytest.mark.parametrize("is_tied", [False, True])
def test_engine_with_the_adapter_generates_the_tokens_of_the_tuned_model(tmp_path: Path, is_tied: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=is_tied)
    tuned = tune(base, tmp_path / "tuned", rank=5, with_head=True)
    adapter = load_adapter(run(base, tuned, FixedRank(16)).folder)
    assert {"model.embed_tokens", "lm_head"} <= adapter.factors.keys()
    prompt = tuple(range(40, 60))

    def generated(folder: Path, ref: AdapterRef | None) -> list[int]:
        engine = Engine.open(folder, ServingConfig(memory_bytes=8 << 20))
        if ref is not None:
            engine.add_adapter(ref, adapter)
        engine.submit(Request("a", prompt, SamplingParams(temperature=0.0, max_tokens=12), ref))
        tokens: list[int] = []
        while engine.has_work:
            tokens += [token for event in engine.step() for token in event.tokens]
        return tokens

    ours, theirs = generated(base, AdapterRef("hash", "extracted", 1, "blob")), generated(tuned, None)
    assert ours == theirs != generated(base, None)


def test_verification_measures_how_close_each_rank_comes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(*pair, FixedRank(2), EnergyShare(0.999))
    found = verify(done, *pair, write_rows(tmp_path / "rows.jsonl", ROWS))
    by_label = found["adapters"]
    assert found["num_rows"] == 12
    assert found["base"]["kl"] > by_label["rank-2"]["kl"] > 10 * by_label["energy-0.999"]["kl"] >= 0
    assert by_label["energy-0.999"]["top1_agreement"] > 0.9 > found["base"]["top1_agreement"]
    ranks = [point["max_rank"] for point in found["curve"]]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    assert found["curve"][-1]["kl"] == pytest.approx(by_label["energy-0.999"]["kl"], rel=1e-6)
    assert found["curve"][1]["kl"] == pytest.approx(by_label["rank-2"]["kl"], rel=1e-3)
    whole = verify(done, *pair, write_rows(tmp_path / "rows.jsonl", [{"text": "some longer text of its own"}]))
    assert whole["base"]["kl"] > 0.01


def test_unusable_rows_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(*pair, FixedRank(2))
    for content in ("{", '{"question": "?"}', "", "[1]"):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(InvalidDataError, match=r"rows\.jsonl"):
            verify(done, *pair, tmp_path / "rows.jsonl")


def test_command_line_writes_adapters_report_and_verification(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--out", str(tmp_path / "out"), "--rank", "4"]
    options += ["--rank", "8", "--energy", "0.9", "--knee", "--budget", "9000", "--max-rank", "40"]
    result = CliRunner().invoke(relora.app, ["extract", *options, "--verify", str(rows)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert set(report["verify"]["adapters"]) == {"rank-4", "rank-8", "energy-0.9", "knee", "budget-9000"}
    assert max(adapter["rank_max"] for adapter in report["adapters"]) <= 40
    for adapter in report["adapters"]:
        factors = load_file(tmp_path / "out" / adapter["folder"] / "adapter_model.safetensors").values()
        assert sum(factor.numel() for factor in factors) == adapter["parameters"]
        assert adapter["rule"] in result.output
    assert "was not drawn" not in result.output


def test_without_matplotlib_the_command_line_says_that_there_is_no_plot(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("readapt.extraction.report.find_spec", lambda name: None)
    options = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--out", str(tmp_path / "out"), "--rank", "4"]
    result = CliRunner().invoke(relora.app, ["extract", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "spectrum.png was not drawn: it needs matplotlib (pip install 'relora[plots]')" in result.output
    assert not (tmp_path / "out" / "spectrum.png").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_cpus=2) as running:
        connect(running.address)
        yield running


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_cluster_extracts_the_same_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from readapt.on_ray import spread

    base, tuned = (open_checkpoint(folder) for folder in pair)
    alone = load_file(extract(base, tuned, tmp_path / "alone", Settings()).folder / "adapter_model.safetensors")
    done = extract(base, tuned, tmp_path / "spread", Settings(), spread)
    together = load_file(done.folder / "adapter_model.safetensors")
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    tensors = load_file(pair[1] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    shutil.copytree(pair[1], tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"up_proj\.weight has values that are not finite"):
        extract(base, open_checkpoint(tmp_path / "broken"), tmp_path / "out", Settings(), spread)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_calls_under_way_end_before_an_error_is_raised(tmp_path: Path) -> None:
    from readapt.on_ray import spread

    def call(number: int) -> None:
        (tmp_path / f"{number}.began").touch()
        time.sleep(0.2 * (number % 3))
        if number == 3:
            raise ValueError("the fourth call fails")
        (tmp_path / f"{number}.ended").touch()

    with pytest.raises(ValueError, match="the fourth call fails"):
        list(spread(call, range(100)))
    began, ended = ({file.stem for file in tmp_path.glob(f"*.{state}")} for state in ("began", "ended"))
    assert began == ended | {"3"}
    assert len(began) < 100
    time.sleep(1.0)
    assert began == {file.stem for file in tmp_path.glob("*.began")}, "no call begins after the error"
