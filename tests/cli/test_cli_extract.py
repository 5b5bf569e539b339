"""`relora extract` on tiny checkpoints: its caps, its warnings, and rows of any format for `--verify`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapters.files import load_adapter
from tests.cli.conftest import Run
from tests.worlds.serving import make_checkpoint


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of width 160 and its tuned version, in which all matrices changed at full rank."""
    folder = tmp_path_factory.mktemp("tuned")
    sizes = {"hidden_size": 160, "intermediate_size": 170, "num_hidden_layers": 1, "head_dim": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = make_checkpoint(folder / "base", **sizes)
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    changed = {
        name: w + 0.1 * torch.randn(w.shape, generator=generator) if w.ndim == 2 else w for name, w in weights.items()
    }
    make_checkpoint(folder / "tuned", **sizes)
    save_file(changed, folder / "tuned/model.safetensors", {"format": "pt"})
    return folder


def test_ranks_stay_within_what_engines_serve_and_both_warnings_are_printed(run: Run, tuned: Path, tmp_path: Path):
    files = ("--base", tuned / "base", "--tuned", tuned / "tuned")
    code, output, errors = run("extract", *files, "--out", tmp_path / "out", "--energy", 0.999)
    assert code == 0, errors
    assert load_adapter(tmp_path / "out", max_rank=128).max_rank == 128
    assert "warning: energy-0.999: 9 modules are cut to rank 128. `--max-rank` raises this cap" in output
    assert "warning: energy-0.999: the adapter has " in output
    code, output, errors = run("extract", *files, "--out", tmp_path / "more", "--energy", 0.999, "--max-rank", 160)
    assert code == 0, errors
    assert load_adapter(tmp_path / "more").max_rank > 128
    assert "are cut to rank" not in output


def test_verify_reads_rows_of_any_format(run: Run, tuned: Path, tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tuned / "tuned/chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "yes"}]}
    rows = [
        {"text": "a\u2028b"},
        {"prompt": "1?", "completion": "yes"},
        chat,
        {"prompt": "1?", "completion": "x" * 600},
    ]
    file = tmp_path / "rows.jsonl"
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    files = ("--base", tuned / "base", "--tuned", tuned / "tuned", "--out", tmp_path / "out", "--verify", file)
    code, _, errors = run("extract", *files, "--rank", 4)
    assert code == 0, errors
    assert json.loads((tmp_path / "out/extraction.json").read_text())["verify"]["num_rows"] == 3, "one is too long"
    file.write_text('{"prompt": "1?", "completion": "yes"}\n{"completion": "yes"}\n')
    code, _, errors = run("extract", *files[:5], tmp_path / "none", *files[6:], "--rank", 4)
    assert code == 1
    assert f"{file}:2: field 'prompt' is missing" in errors
