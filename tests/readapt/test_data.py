import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import InvalidCheckpointError, InvalidDataError
from cluster.registry.records import AdapterRecord, Status, Version
from readapt.training.data import IGNORED, Encoder, Row, collate, encoder_for, load_rows, load_task, task_folders
from tests.worlds.readapt import make_task, write_task
from tests.worlds.serving import EOS, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("data") / "v1")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return encoder_for(checkpoint, 12)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


GOOD = json.dumps({"prompt": "p", "completion": "c", "weight": 3})


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{'prompt'", "not valid JSON"),
        ('["p", "c"]', "JSON object, not list"),
        ('{"prompt": "p"}', "'completion' is missing"),
        ('{"prompt": 3, "completion": "c"}', "'prompt' must be a non-empty string"),
        ('{"prompt": "", "completion": "c"}', "'prompt' must be a non-empty string"),
        ('{"prompt": "p", "completion": null}', "'completion' must be a string"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, cause: str) -> None:
    path = write(tmp_path / "train.jsonl", GOOD, "", line)
    with pytest.raises(InvalidDataError, match=cause) as error:
        load_rows(path)
    assert f"{path}:3: " in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe{}"])
def test_file_without_usable_rows_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match=r"valid\.jsonl"):
        load_rows(path)


def test_a_version_has_the_rows_of_its_adapter_and_of_its_stages_once_each(tmp_path: Path) -> None:
    own, more = tmp_path / "own", tmp_path / "more"
    own.mkdir()
    stages = [{"name": "start", "data": str(own)}, {"name": "more", "data": str(more)}]
    version = Version(1, "a", 2, "v1", Status.LIVE, "k", "k", None, None, {"stages": stages}, 0.0, 0.0)
    record = AdapterRecord("a", str(own), "exact_match", 1.0)
    with pytest.raises(InvalidDataError, match=r"more: no such folder; a@2 was trained"):
        task_folders(record, version)
    more.mkdir()
    assert task_folders(record, version) == (own, more)
    with pytest.raises(InvalidDataError, match="no rows to judge it by"):
        task_folders(AdapterRecord("a", "", "exact_match", 1.0), replace(version, details={}))


def test_missing_split_is_named(tmp_path: Path) -> None:
    write_task(tmp_path, make_task())
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InvalidDataError, match=r"test\.jsonl"):
        load_task(tmp_path)


def test_task_round_trip(tmp_path: Path) -> None:
    task = make_task()
    assert load_task(write_task(tmp_path, task)) == task


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    row = {"prompt": "one\u2028two\x85three", "completion": "c"}
    path = write(tmp_path / "rows.jsonl", json.dumps(row, ensure_ascii=False), GOOD)
    assert load_rows(path)[0].prompt == row["prompt"]
    assert len(load_rows(path)) == 2


def test_completion_ends_with_eos_and_is_labelled_alone(encoder: Encoder) -> None:
    encoded = encoder.encode(Row("ab", "xyz"))
    assert encoded.input_ids[-1] == EOS
    assert encoder.decode(encoded.input_ids[encoded.num_prompt_tokens :]) == "xyz"
    assert encoder.decode(encoded.input_ids[: encoded.num_prompt_tokens]) == "ab"


def test_long_prompt_loses_its_beginning_and_never_the_completion(encoder: Encoder) -> None:
    encoded = encoder.encode(Row("0123456789abcdef", "xyz"))
    assert len(encoded.input_ids) == 12
    assert encoder.decode(encoded.input_ids) == "89abcdefxyz"


def test_completion_too_long_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(InvalidDataError, match="no room"):
        encoder.encode(Row("p", "x" * 11))
    assert encoder.encode(Row("pq", "x" * 10)).num_prompt_tokens == 1


def test_prompt_gets_the_tokenizers_own_special_tokens(checkpoint: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    encoder = encoder_for(checkpoint, 12)
    encoder.tokenizer = deepcopy(encoder.tokenizer)  # encoders of a base share theirs
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", encoder.tokenizer.bos_token_id)]
    )
    encoded = encoder.encode(Row("ab", "x"))
    assert encoded.input_ids[0] == encoder.tokenizer.bos_token_id
    assert encoded.input_ids.count(encoder.tokenizer.bos_token_id) == 1
    assert encoded.num_prompt_tokens == 3


def test_collate_labels_only_completion_and_eos(encoder: Encoder) -> None:
    rows = encoder.encode_all([Row("abcd", "x"), Row("a", "yz")])
    batch = collate(rows)
    assert batch.input_ids_BT.shape == batch.labels_BT.shape == (2, 6)
    assert batch.attention_mask_BT.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch.input_ids_BT[1, 4:].tolist() == [0, 0]
    assert (batch.labels_BT[0] != IGNORED).tolist() == [False] * 4 + [True] * 2
    assert batch.labels_BT[1].tolist() == [IGNORED, *rows[1].input_ids[1:], IGNORED, IGNORED]


def test_eos_comes_from_generation_config_then_config(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "v1")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [11, EOS]}))
    assert encoder_for(folder, 12).eos_id == 11
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 12}))
    assert encoder_for(folder, 12).eos_id == 12


def test_folder_without_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "v1")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InvalidCheckpointError, match="no usable tokenizer"):
        encoder_for(folder, 12)
