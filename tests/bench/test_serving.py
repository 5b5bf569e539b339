"""The serving benchmark: workloads, equal work for all engines, figures, and with a kit the whole benchmark."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import relora
from bench.serving import run as serving
from bench.serving.ours import Ours, config, replay_live, running, visit_all
from bench.serving.parts import compare, summary
from bench.serving.peft import Peft
from bench.serving.run import TARGETS, Rivals, headline, run
from bench.serving.served import ATTENTION, ServedModel, make_adapters, write_random_model
from bench.serving.shapes import QUICK, SHAPES, Dtype, Shape, Subject
from bench.serving.workloads import Answer, Ask, Lengths, Trace, batch, slora, zipf
from cluster.config.settings import MIB, ServingConfig
from cluster.errors import ConfigError
from tests.worlds.serving import make_checkpoint

PAIR = {"ours": {"tokens_per_s": 6.0}, "peft one adapter at a time": {"tokens_per_s": 2.0}}
LENGTHS = Lengths((3, 9), (2, 7))
KIT = Subject(SHAPES["stories3m-v1"])
TINY = Shape(
    "tiny",
    {
        "vocab_size": 71,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    },
    memory_bytes=4 * MIB,
    kv_bytes=MIB,
    many=ATTENTION,
    num_files=3,
)


def small(served: ServedModel) -> ServingConfig:
    return config(served, 4 * MIB, 4 * MIB)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return make_adapters(make_checkpoint(tmp_path_factory.mktemp("serving") / "base", std=0.08), 6, (4, 2), ATTENTION)


def test_synthetic_workload_draws_what_slora_draws():
    """The published generator's draws, in its order, from numpy's global state."""
    np.random.seed(42)
    adapters = (np.random.power(0.7, 40) * 9).astype(int)
    prompts, outputs = np.random.randint(3, 9, 40), np.random.randint(2, 7, 40)
    gaps = np.random.gamma(1 / 2.0**2, 2.0**2 / 20, 40)
    asks = slora(9, 20, 2.0, LENGTHS, 100, alpha=0.7, cv=2.0)
    assert [ask.adapter for ask in asks] == adapters.tolist()
    assert [(len(ask.prompt), ask.max_tokens) for ask in asks] == list(zip(prompts, outputs, strict=True))
    assert [ask.arrival_s for ask in asks] == pytest.approx(np.cumsum(gaps))


def test_zipf_prefers_the_first_adapters_and_keeps_the_rate():
    asks = zipf(100, 4000, 50.0, LENGTHS, 100)
    first = sum(ask.adapter == 0 for ask in asks) / len(asks)
    assert first == pytest.approx(1 / sum(1 / rank for rank in range(1, 101)), abs=0.03)
    assert asks[-1].arrival_s == pytest.approx(80, rel=0.1)


def test_trace_is_scaled_to_rate_and_model():
    trace = Trace(((10.0, 800, 80), (12.0, 16, 9000), (20.0, 1, 1)), (9, 1))
    asks = trace.asks(3, 2, rate=3.0, shrink=8, max_tokens=50, vocab_size=100)
    assert [ask.arrival_s for ask in asks] == pytest.approx([0.0, 0.2, 1.0])
    assert [(len(ask.prompt), ask.max_tokens) for ask in asks] == [(50, 10), (2, 50), (1, 1)]
    assert {ask.adapter for ask in asks} <= {0, 1}


def test_our_engine_and_peft_give_the_same_answers(served: ServedModel):
    ours, peft = Ours(served, 6, small(served)), Peft(served, 6)
    asks = [*slora(6, 200, 0.1, LENGTHS, served.vocab_size), Ask(0.1, None, (5, 6, 7), 4)]
    found = compare({"ours": ours.replay, "mixed": peft.replay_mixed, "one": peft.replay_by_adapter}, asks, 1)
    assert [run["same_answers"] for run in found.values()] == [1.0, 1.0, 1.0]
    assert found["ours"]["first_token_p50_s"] > 0
    alone = {answer.tokens for answer in ours.replay(batch(range(6), 5, 6, served.vocab_size))}
    assert len(alone) > 1, "the adapters change no answer"


def test_live_clients_and_replayed_requests_get_the_same_answers(served: ServedModel, tmp_path: Path):
    asks = zipf(6, 20, 400.0, LENGTHS, served.vocab_size)
    with running(served, small(served), tmp_path) as loop:
        visit_all(loop, served)
        answers = replay_live(loop, served, asks)
    assert [a.tokens for a in answers] == [a.tokens for a in Ours(served, 6, small(served)).replay(asks)]


def test_clients_refused_by_a_full_host_try_again(served: ServedModel, tmp_path: Path):
    """The host has room for one adapter and six are asked for at once, so five clients are refused at first."""
    asks = [Ask(0.0, number, (5, 6, 7), 8) for number in range(6)]
    one_adapter = replace(small(served), host_cache_bytes=3 * served.adapter_bytes // 2)
    with running(served, one_adapter, tmp_path) as loop:
        answers = replay_live(loop, served, asks)
    assert [a.tokens for a in answers] == [a.tokens for a in Ours(served, 6, small(served)).replay(asks)]


def test_summary_refuses_an_engine_that_generated_too_little():
    asks = [Ask(0.5, None, (1,), 3)]
    done = summary(asks, [Answer(1.0, 2.0, (7, 8, 9))])
    assert (done["tokens_per_s"], done["latency_mean_s"], done["first_token_p50_s"]) == (2.0, 1.5, 0.5)
    with pytest.raises(AssertionError, match="has not generated"):
        summary(asks, [Answer(1.0, 2.0, (7,))])


def test_figures_of_missing_rivals_are_null():
    rate = {"tokens_per_s": 6.0}
    report = {
        "adapters": {
            "1": {"ours": rate},
            "2": {"ours": rate, "same requests": PAIR},
            "4": {"ours": {"tokens_per_s": 3.0}},
        },
        "mixed": dict.fromkeys(("ours", "peft mixed", "ours beside base only", "ours base only"), rate),
        "vllm": None,
        "llamacpp": {"rows": {"2": {"ours": {"tokens_per_s": 5.0}, "llamacpp": {"tokens_per_s": 4.0}}}},
        "cold": {"ratio": 1.1},
        "trace": {"loads": {"0.5": {"slo_attainment": 1.0}}},
        "waste": {"memory_waste_fraction": 0.1},
        "overhead": {"8": 0.3},
        "chaos": {"max_wait_bound_violations": 0, "wrong_adapter_tokens": 0},
    }
    found = headline(report, QUICK)
    assert found["throughput_ratio_4_vs_2_adapters"] == 0.5
    assert found["throughput_vs_peft_2"] == 3.0
    assert found["throughput_vs_vllm_mixed_32"] is None
    assert found["decode_vs_llamacpp_single"] == 1.25


def test_a_rival_added_later_gets_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rate, runs = {"tokens_per_s": 6.0}, iter([None, {"ours": {"tokens_per_s": 6.0}, "vllm": {"tokens_per_s": 2.0}}])
    found = {
        "adapters": {"1": {"ours": rate}, "2": {"ours": rate, "same requests": PAIR}, "4": {"ours": rate}},
        "mixed": dict.fromkeys(("ours", "peft mixed", "ours beside base only", "ours base only"), rate),
        "llamacpp": None,
        "cold": {"ratio": 1.1},
        "trace": {"loads": {"0.5": {"slo_attainment": 1.0}}},
        "waste": {"memory_waste_fraction": 0.1},
        "overhead": {"8": 0.3},
        "chaos": {"max_wait_bound_violations": 0, "wrong_adapter_tokens": 0},
    }
    parts = {name: partial(found.get, name) for name in found} | {"vllm": lambda: next(runs)}
    monkeypatch.setattr(serving, "_parts", lambda *_: parts)
    monkeypatch.setattr(serving, "plot_all", lambda *_: None)
    reports = [
        run(tmp_path, tmp_path / "s.json", KIT, Rivals(), is_quick=True, console=Console(quiet=True)) for _ in range(2)
    ]
    assert [report["throughput_vs_vllm_mixed_32"] for report in reports] == [None, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_is_measured_by_the_same_parts(tmp_path: Path, dtype: Dtype):
    out, console = tmp_path / "tiny.json", Console(quiet=True)
    parts = ("mixed", "adapters", "decode", "cold", "waste")
    subject = Subject(TINY, dtype=dtype)
    report = run(tmp_path / "no kit", out, subject, Rivals(), is_quick=True, only=parts, console=console)
    assert report["throughput_ratio_4_vs_2_adapters"] > 0
    assert report["throughput_vs_peft_mixed_32"] > 0
    assert report["ttft_p99_ratio_cold_vs_resident_12_zipf"] > 0
    assert report["shape"]["num_files"] == 3
    assert set(TARGETS) & set(report) == {
        "throughput_vs_peft_mixed_32",
        "throughput_vs_base_only_32_distinct",
        "memory_waste_fraction",
    }
    made = tmp_path / "tiny.work" / subject.folder
    assert ServedModel(made, ()).dtype == dtype
    assert len(list((made.parent / f"{made.name}-rank-8-on-4-modules").iterdir())) == 3
    if dtype == "float32":  # rounding to bfloat16 may change a greedy choice
        assert report["mixed"]["peft mixed"]["same_answers"] == 1.0
    wider = replace(TINY, sizes={**TINY.sizes, "vocab_size": 72})
    found = run(tmp_path, out, Subject(wider, dtype=dtype), Rivals(), is_quick=True, only=["waste"], console=console)
    assert "mixed" not in found, "figures of another shape are not reused"
    assert ServedModel(made.with_name(Subject(wider, dtype=dtype).folder), ()).vocab_size == 72, (
        "its model is not reused either"
    )


def test_adapters_that_share_files_are_separate_in_the_engine(tmp_path: Path):
    write_random_model(TINY.sizes, tmp_path / "tiny", "float32", "cpu")
    served = make_adapters(tmp_path / "tiny", 5, num_files=2)
    assert [folder.name for folder in served.adapters] == ["00000", "00001", "00000", "00001", "00000"]
    ours = Ours(served, 5, small(served))
    answers = ours.replay(batch(range(5), 6, 5, served.vocab_size))
    assert ours.engine.stats()["adapters_resident"] == 5
    assert len(answers) == 5


def test_peft_computes_in_the_dtype_of_the_base(tmp_path: Path):
    write_random_model(TINY.sizes, tmp_path / "tiny", "bfloat16", "cpu")
    peft = Peft(make_adapters(tmp_path / "tiny", 2), 2)
    assert {parameter.dtype for parameter in peft.model.parameters()} == {torch.bfloat16}


def test_shapes_have_their_advertised_size_and_enough_memory():
    millions = {}
    for shape in SHAPES.values():
        if shape.sizes is None:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shape.sizes))
        millions[shape.name] = round(sum(p.numel() for p in model.parameters()) / 1e6)
        config = model.config
        token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        token_bytes *= 4 if shape.name == "125m" else 2
        longest = shape.size.lengths.prompt[1] + shape.size.lengths.output[1]
        assert 32 * longest * token_bytes <= shape.kv_bytes < shape.memory_bytes
        assert 16 * token_bytes // 4 >= config.intermediate_size, "a row of an adapter does not fit a page"
    assert millions == {"125m": 124, "llama-7b": 6738, "llama-3-8b": 8030}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_reported_before_anything_starts(tmp_path: Path):
    command = ["bench", "serving", "--kit", str(tmp_path), "--out", str(tmp_path / "o.json"), "--device", "cuda"]
    result = CliRunner().invoke(relora.app, command)
    assert result.exit_code == 2
    assert "no CUDA device" in result.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_named(tmp_path: Path):
    command = ["bench", "serving", "--kit", str(tmp_path), "--out", str(tmp_path / "o.json"), "--parts", "mixt"]
    error = CliRunner().invoke(relora.app, command).exception
    assert isinstance(error, ConfigError)
    assert "unknown part mixt; choose from mixed, adapters" in str(error)


def test_quick_run_writes_every_figure(kit: Path, tmp_path: Path):
    out = tmp_path / "serving.json"
    run(kit, out, KIT, Rivals(), is_quick=True, console=Console(quiet=True))
    report = json.loads(out.read_text())
    sized = ("_2000_vs_5_", "_peft_5", "_peft_100", "_1024", "_1000_zipf")
    assert {key for key in TARGETS if not any(part in key for part in sized)} <= set(report)
    assert (report["wrong_adapter_tokens"], report["max_wait_bound_violations"]) == (0, 0)
    assert report["throughput_vs_vllm_mixed_32"] is None
    assert (tmp_path / "serving-load.png").stat().st_size > 10_000
