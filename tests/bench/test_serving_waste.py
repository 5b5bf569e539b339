"""The benchmark's measure of wasted memory."""

from pathlib import Path

import pytest

from bench.serving.waste import MeasuredEngine
from cluster.adapters.files import load_adapter
from cluster.config.settings import MIB, ServingConfig
from serving.engine.request import AdapterRef, Request, SamplingParams
from tests.worlds.serving import KINDS, make_adapter, make_checkpoint

ADAPTERS = {
    "r4": {"rank": 4},
    "dora-everywhere": {"rank": 5, "dora": True, "modules": (*KINDS, "embed_tokens", "lm_head")},
}


def request_of(name: str, num_prompt: int) -> Request:
    ref = AdapterRef(name, name, 1, name) if name in ADAPTERS else None
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    return Request(name, tuple(range(1, num_prompt + 1)), sampling, ref)


def test_waste_is_the_empty_part_of_the_pages_in_use(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    engine = MeasuredEngine.open(base, ServingConfig(memory_bytes=4 * MIB))
    assert engine.memory_waste() == (0, 0.0)
    engine.submit(request_of("base", 35))
    engine.step()
    assert engine.memory_waste() == (3, pytest.approx(12 / 16)), "36 tokens in 3 pages of 16"
    for seed, (name, kind) in enumerate(ADAPTERS.items()):
        adapter = load_adapter(make_adapter(tmp_path / name, base, seed=seed, **kind))
        engine.add_adapter(AdapterRef(name, name, 1, name), adapter)
        engine.submit(request_of(name, 6))
    engine.step()
    resident, page_elements = engine._adapters.residents(), engine._arena_PE.shape[1]
    held = sum(int((engine._arena_PE[list(adapter.pages)] != 0).sum()) for adapter in resident)
    num_tokens, token_elements = 37 + 7 + 7, page_elements // 16
    in_use = sum(len(adapter.pages) for adapter in resident) + 3 + 1 + 1
    empty = in_use - (held + num_tokens * token_elements) / page_elements
    assert engine.memory_waste() == (in_use, pytest.approx(empty))
