"""The benchmark of structured output, on a tiny random model and a tiny kit; and the schemas that it draws."""

import json
from pathlib import Path

import jsonschema
import pytest

from bench.serving.random_schemas import random_schema
from bench.serving.structured import TASKS, _fault
from serving.engine import grammar
from serving.engine.matcher import GrammarCompiler
from tests.bench.test_cli import bench
from tests.worlds.serving import make_checkpoint, make_tokenizer


def test_random_schemas_are_valid_and_can_be_compiled(tmp_path: Path):
    compiler = GrammarCompiler(make_tokenizer(tmp_path))
    schemas = [random_schema(seed) for seed in range(60)]
    assert schemas[7] == random_schema(7)
    assert len({json.dumps(schema) for schema in schemas}) > 50
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
        compiler.matcher(grammar.json_schema(schema))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "x"}', '{"a": 1, "b": 2}'])
def test_an_answer_that_does_not_match_is_a_fault(text: str):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    assert _fault(schema, text)
    assert not _fault(schema, '{"a": 1}')


def test_a_run_reports_validity_and_costs(tmp_path: Path):
    base, out = make_checkpoint(tmp_path / "base"), tmp_path / "structured.json"
    for task in TASKS:
        (tmp_path / "kit" / "tasks" / task).mkdir(parents=True)
        lines = [json.dumps({"prompt": f"{task} {number}", "completion": "x"}) for number in range(20)]
        (tmp_path / "kit" / "tasks" / task / "train.jsonl").write_text("\n".join(lines))
    bench("structured", "--kit", tmp_path / "kit", "--base", base, "--schemas", 32, "--quick", "--out", out)
    found = json.loads(out.read_text())
    assert found["num_schemas"] == 32
    assert found["num_cut_by_max_tokens"] < 16
    assert (found["schemas_valid_fraction"], found["faults"]) == (1.0, {})
    assert found["step_ms_plain"] > 0
    assert found["structured_overhead_fraction"] == found["step_ms_structured"] / found["step_ms_plain"] - 1
    assert 0 < found["mask_build_us_per_row"]["p50"] <= found["mask_build_us_per_row"]["p95"]
    assert 0 < found["compile_ms"]["p50"] <= found["compile_ms"]["max"]
