"""The engine on real weights, where a folder of them is given: the same greedy tokens as transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import ServingConfig
from serving.engine import Engine
from serving.request import Request, SamplingParams

PROMPTS = ["Once upon a time", "Lily and Tom went to the park.", "The dog was"]


@pytest.mark.parametrize("name", ["stories260k", "stories3m-v1"])
def test_greedy_tokens_of_a_real_model_equal_transformers(kit: Path, name: str):
    folder = kit / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0, len(p) :] for p in prompts]
    engine = Engine.open(folder, ServingConfig(memory_bytes=8 << 20))
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), tuple(prompt), SamplingParams(temperature=0.0, max_tokens=24)))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.tokens
    assert list(tokens.values()) == [row.tolist() for row in expected]
