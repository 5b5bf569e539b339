"""The engine on real weights: greedy tokens are those of transformers, in any batch. Needs the kit's folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams
from tests.worlds.serving import make_adapter

PROMPTS = ["Once upon a time", "Lily and Tom went to the park.", "The dog was"]


@pytest.mark.parametrize("name", ["stories260k", "stories3m-v1"])
def test_greedy_tokens_of_a_real_model_equal_transformers(kit: Path, name: str):
    folder = kit / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0, len(p) :] for p in prompts]
    engine = Engine.open(folder, ServingConfig(memory_bytes=8 << 20))
    tokens = generate(engine, [request_of(index, prompt) for index, prompt in enumerate(prompts)])
    assert tokens == [row.tolist() for row in expected]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_requests_tokens_do_not_depend_on_its_batch(kit: Path, tmp_path: Path, dtype: str, is_compiled: bool):
    """The base and five adapters of different ranks, two prompts each: one at a time, and all at once."""
    folder = kit / "models" / "stories3m-v1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = ServingConfig(memory_bytes=64 << 20, dtype=dtype, compiled_kernels=is_compiled, prefix_cache="off")
    engine = Engine.open(folder, config)
    refs = [AdapterRef(f"hash-{seed}", f"a{seed}", 1, f"blob-{seed}") for seed in range(5)]
    for seed, ref in enumerate(refs):
        engine.add_adapter(
            ref, load_adapter(make_adapter(tmp_path / ref.name, folder, rank=3 + 4 * seed, seed=seed, scale=0.02))
        )
    pairs = itertools.product([None, *refs], PROMPTS[:2])
    requests = [request_of(index, tokenizer.encode(prompt), ref) for index, (ref, prompt) in enumerate(pairs)]
    alone = [generate(engine, [request])[0] for request in requests]
    assert generate(engine, requests) == alone
    assert len(set(map(tuple, alone))) > len(requests) // 2


def request_of(index: int, prompt: Sequence[int], ref: AdapterRef | None = None) -> Request:
    return Request(str(index), tuple(prompt), SamplingParams(temperature=0.0, max_tokens=24), ref)


def generate(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.tokens
    return list(tokens.values())
