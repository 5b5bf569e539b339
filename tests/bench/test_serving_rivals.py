"""Rivals in their own environments: what their processes read and write, and the conversion to GGUF."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.serving.llamacpp import gguf_name, neighbouring_pairs, reordered
from bench.serving.parts import prompts
from bench.serving.rivals import RivalError, run_llamacpp, run_vllm
from bench.serving.served import ServedModel
from bench.serving.workloads import Answer, Ask

ASKS = [Ask(0.0, 1, (3, 4), 2), Ask(0.0, None, (5,), 1)]
SIZES = {"vocab_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32"}


@pytest.fixture
def served(tmp_path: Path) -> ServedModel:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SIZES))
    return ServedModel(model, (tmp_path / "a0", tmp_path / "a1"))


def interpreter(folder: Path, script: str) -> Path:
    """Make a file that stands for the Python of another environment, called with -I, script, inputs and output file."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def answering(folder: Path, answer: object) -> Path:
    (folder / "answer.json").write_text(json.dumps(answer))
    return interpreter(
        folder, f'cp "$3" {folder}/inputs.json; echo "$1 $2" > {folder}/call; cp {folder}/answer.json "$4"'
    )


def vllm_answers(python: Path, served: ServedModel) -> list[list[Answer]]:
    return run_vllm(python, served, ASKS, max_rank=8, max_adapters=2, repeats=2, threads=1)


def test_vllm_gets_all_requests_and_its_answers_end_together(tmp_path: Path, served: ServedModel):
    runs = [{"wall_s": wall_s, "tokens": [[7, 8], [9]]} for wall_s in (0.5, 0.25)]
    found = vllm_answers(answering(tmp_path, {"runs": runs}), served)
    assert found == [[Answer(None, s, (7, 8)), Answer(None, s, (9,))] for s in (0.5, 0.25)]
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    assert inputs["adapters"] == [str(folder) for folder in served.adapters]
    assert inputs["requests"][1] == {"prompt": [5], "adapter": None, "max_tokens": 1}
    assert (inputs["engine"]["max_loras"], inputs["engine"]["max_lora_rank"], inputs["repeats"]) == (2, 8, 2)
    isolated, script = (tmp_path / "call").read_text().split()
    assert isolated == "-I", "else our modules would hide those of the environment"
    assert Path(script).is_file()


def test_llamacpp_gets_the_same_prompts_as_our_engine(tmp_path: Path, served: ServedModel):
    record = {"setting": "x", "tokens_per_s": 2.0, "sampled_tokens_per_s": 1.0, "tokens": [[3, 4]]}
    found = run_llamacpp(
        answering(tmp_path, {"1": record}),
        served,
        adapter=1,
        batches=(1, 4),
        prompt_tokens=3,
        decode_tokens=2,
        repeats=1,
        threads=1,
    )
    assert (found[1].tokens_per_s, found[1].tokens) == (2.0, ((3, 4),))
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    assert [tuple(row) for row in inputs["prompts"]] == prompts(4, 3, SIZES["vocab_size"])
    assert inputs["adapter"] == str(served.adapters[1])


def test_a_failed_process_is_reported_with_its_last_lines(tmp_path: Path, served: ServedModel):
    python = interpreter(tmp_path, "echo first line >&2; seq 20 >&2; echo no module named vllm >&2; exit 3")
    with pytest.raises(RivalError, match=r"(?s)ended with 3:\n.*no module named vllm") as caught:
        vllm_answers(python, served)
    assert "first line" not in str(caught.value)


def test_a_process_without_output_has_failed(tmp_path: Path, served: ServedModel):
    with pytest.raises(RivalError, match="ended with 0"):
        vllm_answers(interpreter(tmp_path, "exit 0"), served)


def test_a_missing_interpreter_is_named(tmp_path: Path, served: ServedModel):
    with pytest.raises(RivalError, match="nowhere"):
        vllm_answers(tmp_path / "nowhere", served)


def rotated_half_apart(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of one head as Hugging Face computes it: element i with element i + half."""
    low, high = rows.chunk(2)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])


def rotated_neighbours(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of one head as llama.cpp computes it: element 2i with element 2i + 1."""
    even, odd = rows[0::2], rows[1::2]
    return torch.stack(
        [even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], 1
    ).flatten()


def test_reordered_rows_give_the_same_scores_under_the_other_rotation():
    draw = torch.Generator().manual_seed(0)
    q_NH, k_NH = (torch.randn(2, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    q_angles, k_angles = (torch.rand(4, generator=draw, dtype=torch.float64) for _ in range(2))
    q_other, k_other = (torch.from_numpy(neighbouring_pairs(x.reshape(16).numpy(), 2)).view(2, 8) for x in (q_NH, k_NH))
    for head in range(2):
        ours = rotated_half_apart(q_NH[head], q_angles) @ rotated_half_apart(k_NH[head], k_angles)
        theirs = rotated_neighbours(q_other[head], q_angles) @ rotated_neighbours(k_other[head], k_angles)
        torch.testing.assert_close(ours, theirs)


def test_only_queries_and_keys_are_reordered_by_their_heads():
    rows = np.arange(16.0).reshape(16, 1)
    assert reordered("model.layers.0.self_attn.q_proj", rows, SIZES)[:4, 0].tolist() == [0, 2, 1, 3]
    assert reordered("model.layers.0.self_attn.k_proj", rows, SIZES)[:4, 0].tolist() == [0, 4, 1, 5]
    assert reordered("model.layers.0.self_attn.v_proj", rows, SIZES) is rows


def test_names_in_gguf():
    assert gguf_name("model.layers.11.self_attn.o_proj") == "blk.11.attn_output"
    assert gguf_name("model.embed_tokens") == "token_embd"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_norm")
