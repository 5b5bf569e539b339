"""The evaluation harness `lm_eval` with its `local-completions` model, on a task of a few rows."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.clients.checklist import Checklist, Target

check = Checklist("lm_eval", "lm_eval")
ROWS = [
    {"question": "The sky is", "options": [" blue", " a spoon"], "answer": 0},
    {"question": "Two and two is", "options": [" four", " a tree"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = 'doc_to_choice: "{{options}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
ANSWERS = 'doc_to_target: "{{options[answer]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
ANSWERS += "metric_list: [{metric: exact_match}]\n"


def evaluate(target: Target, kind: str, rest: str, metric: str) -> float:
    """Run the harness on one task and return a metric of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        task = TASK.format(name="colours", rows=folder / "rows.jsonl", kind=kind) + rest
        (folder / "colours.yaml").write_text(task)
        model = f"model={target.base},base_url={target.api}/completions,tokenizer_backend=none"
        model += ",tokenized_requests=False,num_concurrent=2,max_retries=1"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
        command += ["--tasks", "colours", "--include_path", name, "--output_path", f"{name}/out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-600:]
        [report] = (folder / "out").rglob("results_*.json")
        return json.loads(report.read_text())["results"]["colours"][metric]


@check
def loglikelihood(target: Target) -> None:
    """Choices scored by `echo` and `logprobs`."""
    assert 0 <= evaluate(target, "multiple_choice", CHOICES, "acc,none") <= 1


@check
def generate_until(target: Target) -> None:
    """Answers up to a stop string."""
    assert 0 <= evaluate(target, "generate_until", ANSWERS, "exact_match,none") <= 1


if __name__ == "__main__":
    check.main()
