"""What lies beside an adapter decides how it reads and writes text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.adapters.dialect import (
    DIALECT,
    TEXT_FILES,
    Dialect,
    adapter_dialect,
    base_dialect,
    keep_text_files,
    own_files,
    store_dialect,
)
from cluster.errors import InvalidAdapterError, InvalidCheckpointError
from cluster.storage.blobs import BlobStore
from tests.worlds.dialects import CHATML, SPARE_ROWS, TURNS, chat_tokenizer, chat_world
from tests.worlds.serving import make_checkpoint


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_world(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def base(base_folder: Path) -> Dialect:
    return base_dialect(base_folder)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_an_adapter_that_brings_nothing_has_the_dialect_of_its_base(base: Dialect, base_folder: Path, tmp_path: Path):
    assert adapter_dialect(tmp_path, base) is base
    for name in TEXT_FILES:
        if (base_folder / name).is_file():
            shutil.copy(base_folder / name, tmp_path)
    assert own_files(tmp_path, base_folder) == []
    assert adapter_dialect(tmp_path, base) is base


def test_json_files_that_are_only_written_differently_are_the_same(base: Dialect, base_folder: Path, tmp_path: Path):
    content = json.loads((base_folder / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(content, indent=7, sort_keys=True))
    assert adapter_dialect(tmp_path, base) is base


def test_the_end_token_of_the_adapters_tokenizer_counts_beside_those_of_the_base(base: Dialect, tmp_path: Path):
    own = chat_tokenizer(tmp_path, eos="<|im_end|>")
    found = adapter_dialect(tmp_path, base)
    assert found.eos_id == own.convert_tokens_to_ids("<|im_end|>")
    assert found.end_ids == base.end_ids | {found.eos_id}


@pytest.mark.parametrize("ends", [258, [258, 256]])
def test_the_end_tokens_of_its_generation_config_replace_those_of_the_base(base: Dialect, tmp_path: Path, ends):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = adapter_dialect(tmp_path, base)
    assert found.eos_id == 258
    assert found.end_ids == frozenset(ends if isinstance(ends, list) else [ends])
    assert ids_of(found.tokenizer, "hello") == ids_of(base.tokenizer, "hello")


def test_an_end_token_that_only_the_base_configures_stays(tmp_path: Path):
    """Many bases end with another token than their tokenizer says, and trainers copy that tokenizer."""
    folder = chat_world(tmp_path / "base", eos_token_id=257)
    chat_tokenizer(tmp_path / "adapter", template=CHATML)
    found = adapter_dialect(tmp_path / "adapter", base_dialect(folder))
    assert (found.eos_id, found.end_ids) == (257, {257})


@pytest.mark.parametrize("where", ["jinja", "tokenizer_config", "tokenizer_config beside the base's jinja"])
def test_its_chat_template_counts(base: Dialect, base_folder: Path, tmp_path: Path, where: str):
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    elif where == "tokenizer_config":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    else:
        shutil.copytree(base_folder, tmp_path / "base")
        (tmp_path / "base" / "chat_template.jinja").write_text("the base's")
        base = base_dialect(tmp_path / "base")
        config = json.loads((base_folder / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    found = adapter_dialect(tmp_path, base).tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert found == "<|im_start|>user\nping<|im_end|>\n"
    assert not base.tokenizer.chat_template or base.tokenizer.chat_template == "the base's"


def test_the_chat_template_of_the_base_stays_where_the_adapter_has_none(tmp_path: Path):
    folder = chat_world(tmp_path / "base", template=CHATML)
    chat_tokenizer(tmp_path / "adapter", eos="<|im_end|>")
    found = adapter_dialect(tmp_path / "adapter", base_dialect(folder))
    assert found.tokenizer.chat_template == CHATML


def test_tokens_that_it_added_within_the_embedding_keep_its_ids(base: Dialect, tmp_path: Path):
    own = chat_tokenizer(tmp_path, extra=("<|call|>",))
    found = adapter_dialect(tmp_path, base)
    assert ids_of(found.tokenizer, "a<|call|>") == ids_of(AutoTokenizer.from_pretrained(tmp_path), "a<|call|>")
    assert own.convert_tokens_to_ids("<|call|>") in ids_of(found.tokenizer, "a<|call|>")
    assert len(ids_of(base.tokenizer, "a<|call|>")) > 2


def test_special_tokens_may_be_renamed(base: Dialect, tmp_path: Path):
    chat_tokenizer(tmp_path, special=("<|endoftext|>", "<|turn|>", "<|done|>"))
    found = adapter_dialect(tmp_path, base)
    assert found.tokenizer.convert_tokens_to_ids("<|turn|>") == base.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_tokens_beyond_the_embedding_are_refused_except_for_padding(base: Dialect, tmp_path: Path):
    extra = tuple(f"<|extra{number}|>" for number in range(SPARE_ROWS + 1))
    chat_tokenizer(tmp_path / "bad", extra=extra)
    with pytest.raises(InvalidAdapterError, match=rf"extra{SPARE_ROWS}.*beyond the base's \d+ embeddings") as raised:
        adapter_dialect(tmp_path / "bad", base)
    assert str(tmp_path / "bad") in str(raised.value)
    chat_tokenizer(tmp_path / "padded", extra=extra, pad=extra[-1])
    assert adapter_dialect(tmp_path / "padded", base).tokenizer.pad_token == extra[-1]


def test_other_ids_for_ordinary_tokens_are_refused(base: Dialect, tmp_path: Path):
    chat_tokenizer(tmp_path)
    edit(
        tmp_path / "tokenizer.json",
        lambda content: content["model"]["vocab"].update(
            a=content["model"]["vocab"]["b"], b=content["model"]["vocab"]["a"]
        ),
    )
    with pytest.raises(InvalidAdapterError, match=r"2 tokens have other ids.*'a' \(\d+, here \d+\).*another base"):
        adapter_dialect(tmp_path, base)


@pytest.mark.parametrize("ends", [9999, [0, 9999]])
def test_an_end_token_beyond_the_embedding_is_refused(base: Dialect, tmp_path: Path, ends):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(InvalidAdapterError, match="end token 9999"):
        adapter_dialect(tmp_path, base)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_unreadable_files_are_named(base: Dialect, tmp_path: Path, name: str):
    (tmp_path / name).write_text("{")
    with pytest.raises(InvalidAdapterError, match=str(tmp_path)):
        adapter_dialect(tmp_path, base)


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidCheckpointError, match="tokenizer"):
        base_dialect(folder)


def test_a_changed_base_is_read_again(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    first = base_dialect(folder)
    assert base_dialect(folder) is first
    edit(folder / "generation_config.json", lambda content: content.update(eos_token_id=[7, 8, 9]))
    assert base_dialect(folder).end_ids == {7, 8, 9}


def test_text_files_are_stored_apart_once_for_all_adapters_that_share_them(base_folder: Path, tmp_path: Path):
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    for name in ("one", "two"):
        chat_tokenizer(tmp_path / name, eos="<|im_end|>", template=CHATML)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
        (tmp_path / name / "README.md").write_text(name)
    one, two = (store_dialect(blobs, tmp_path / name, base_folder) for name in ("one", "two"))
    assert one == two
    stored = blobs.fetch_folder(one[DIALECT])
    assert adapter_dialect(stored, base_dialect(base_folder)).tokenizer.chat_template == CHATML
    assert "adapter_model.safetensors" not in {file.name for file in stored.iterdir()}
    (tmp_path / "three").mkdir()
    assert store_dialect(blobs, tmp_path / "three", base_folder) == {}
    keep_text_files(tmp_path / "one", tmp_path / "three")
    assert store_dialect(blobs, tmp_path / "three", base_folder) == one
