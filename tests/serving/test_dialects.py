"""Over HTTP: what lies beside an adapter decides its prompts, where its answers end and how they read."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cluster.adapters.dialect import DIALECT, base_dialect
from cluster.adapters.folder import counting_files
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidAdapterError, NotFoundError
from cluster.registry.records import Status
from cluster.storage.blobs import BlobStore
from readapt.training.data import Row, encoder_for
from serving.engine.dialects import MAX_DIALECTS, Dialects
from serving.engine.request import AdapterRef
from serving.gateway.golden import probe_golden
from serving.gateway.local_backend import LocalBackend
from serving.gateway.prompters import MAX_PROMPTERS, Prompters
from serving.gateway.routing import Target
from tests.worlds.dialects import CHATML, SPARE_ROWS, TURNS, chat_tokenizer, chat_world, teach
from tests.worlds.servers import Server, serve_bases

CONFIG = ServingConfig(memory_bytes=16 * 2**20, max_model_tokens=200)
PROMPT = "<|im_start|>user\nping<|im_end|>\n<|im_start|>assistant\n"
CALL = "<|call|>"  # a token that only the third adapter's tokenizer knows


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A base without a chat template. Adapters: "plain" brings nothing, "chat" ChatML, "tool" a token of its own."""
    files = tmp_path_factory.mktemp("files")
    base = chat_world(files / "base")
    plain = teach(base, files / "plain", [Row(PROMPT, "pong")], "<|im_end|>", AutoTokenizer.from_pretrained(base))
    shutil.copytree(plain, files / "chat")
    chat_tokenizer(files / "chat", template=CHATML, eos="<|im_end|>")
    tokenizer = chat_tokenizer(files / "tokens", extra=(CALL,))
    teach(base, files / "tool", [Row(f"{CALL}go:", f"{CALL}went")], "<|endoftext|>", tokenizer)
    chat_tokenizer(files / "tool", extra=(CALL,))
    with serve_bases(files, tmp_path_factory.mktemp("served"), CONFIG, ("base",)) as server:
        for name in ("plain", "chat", "tool"):
            answer = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(files / name))
            assert answer.status_code == 200, answer.text
        yield server


def complete(server: Server, model: str, prompt: str = PROMPT, **more: object) -> tuple[str, str, int]:
    """Return the text, the finish reason and the number of tokens of a greedy answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0, **more}
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["finish_reason"], answer.json()["usage"]["completion_tokens"]


def by_peft(base: Path, adapter: Path, prompt: str, num_tokens: int) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Return the adapter's tokenizer and the greedy tokens of transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer, written[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_chat_template_and_the_end_token_beside_the_adapter_count(served: Server):
    tokenizer, tokens = by_peft(served.files / "base", served.files / "chat", PROMPT, 40)
    assert tokenizer.decode(tokens) == "pong<|im_end|>"
    answer = served.client.chat.completions.create(model="chat", messages=TURNS, temperature=0, max_tokens=40)
    assert answer.choices[0].message.content == "pong"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer(PROMPT)["input_ids"]), 5)


def test_the_base_and_an_adapter_that_brings_nothing_stay_as_they_are(served: Server):
    for model in ("base", "plain"):
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            served.client.chat.completions.create(model=model, messages=TURNS)
    text, reason, num_tokens = complete(served, "plain")
    assert (text[:4], reason, num_tokens) == ("pong", "length", 40)
    assert complete(served, "chat") == ("pong", "stop", 5)
    assert complete(served, "chat", ignore_eos=True) == complete(served, "plain", ignore_eos=True)


def test_streams_and_pinned_versions_have_the_dialect_too(served: Server):
    stream = served.client.chat.completions.create(model="chat@1", messages=TURNS, temperature=0, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "pong"
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("model", ["plain", "tool"])
@pytest.mark.parametrize("more", [{}, {"skip_special_tokens": False}])
def test_a_stop_string_that_is_a_special_token_ends_the_answer(served: Server, model: str, more: dict):
    prompt, special, expected = (
        (PROMPT, "<|im_end|>", "pong") if model == "plain" else (f"{CALL}go:", "<|endoftext|>", f"{CALL}went")
    )
    whole, _, _ = complete(served, model, prompt, ignore_eos=True, skip_special_tokens=False)
    assert whole.startswith(expected + special)
    text, reason, num_tokens = complete(served, model, prompt, stop=[special], ignore_eos=True, **more)
    assert (reason, num_tokens) == ("stop", 5 if model == "plain" else 6)
    assert text == (expected if more else expected.removeprefix(CALL))


def test_a_stop_string_with_a_line_end_after_the_special_token_ends_the_answer(served: Server):
    assert complete(served, "plain", stop="<|im_end|>\n") == ("pong", "stop", 5)


def test_a_stop_string_is_read_in_the_tokenizer_of_the_adapter(served: Server):
    """Only "tool" knows the token, so only it can stop there by id."""
    tokenizer, tokens = by_peft(served.files / "base", served.files / "tool", f"{CALL}go:", 12)
    assert tokens[0] == tokenizer.convert_tokens_to_ids(CALL)
    assert complete(served, "tool", f"{CALL}go:") == ("went", "stop", len(tokens))
    assert complete(served, "tool", f"{CALL}go:", skip_special_tokens=False)[0].startswith(f"{CALL}went")
    assert complete(served, "tool", f"{CALL}go:", stop=CALL) == ("", "stop", 1)


def test_a_request_that_mixes_dialects_in_a_batch_answers_each_in_its_own(served: Server):
    asked = [("chat", PROMPT), ("plain", PROMPT), ("tool", f"{CALL}go:"), ("base", PROMPT)] * 4
    alone = {model: complete(served, model, prompt) for model, prompt in asked[:4]}
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: complete(served, *each), asked))
    assert together == [alone[model] for model, _ in asked]


def test_a_version_that_a_client_loads_notes_its_rank_and_bytes(served: Server):
    [version] = served.registry.versions(adapter="plain")
    folder = served.files / "plain"
    assert version.details["num_bytes"] == sum(file.stat().st_size for file in counting_files(folder)) > 0
    assert version.details["rank"] == json.loads((folder / "adapter_config.json").read_text())["r"]


def test_the_version_remembers_where_its_text_files_are(served: Server):
    details = {name: served.registry.find(name, 1).details for name in ("plain", "chat", "tool")}
    assert DIALECT not in details["plain"]
    assert details["chat"][DIALECT] != details["tool"][DIALECT]
    chat = served.registry.find("chat", 1)
    assert chat.content_hash != served.registry.find("plain", 1).content_hash, "the text files are part of the adapter"


@pytest.mark.parametrize("fault", ["other ids", "beyond"])
def test_a_tokenizer_that_does_not_fit_is_refused_by_name(served: Server, tmp_path: Path, fault: str):
    shutil.copytree(served.files / "plain", tmp_path / "bad")
    extra = [f"<|x{number}|>" for number in range(SPARE_ROWS + 1)] if fault == "beyond" else []
    chat_tokenizer(tmp_path / "bad", extra=extra)
    if fault == "other ids":
        file = tmp_path / "bad" / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        file.write_text(json.dumps(content))
    answer = served.post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
    assert "another base" in answer.text if fault == "other ids" else "beyond the base's" in answer.text
    assert all(known.name != "bad" for known in served.registry.adapters())


async def test_golden_prompts_are_checked_in_the_dialect(served: Server):
    blobs = BlobStore(str(Path(served.registry._reading.url.database).parent / "blobs"), served.files / "cache")
    base, adapter = served.files / "base", served.files / "tool"
    tokenizer, tokens = by_peft(base, adapter, f"{CALL}go:", 12)
    live = served.registry.find("tool", 1)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    golden = {"golden": [{"prompt": f"{CALL}go:", "completion": text}]}
    version = served.registry.add_version(
        "tool", "base", Status.CANDIDATE, live.blob_key, live.content_hash, details={**live.details, **golden}
    )
    await probe_golden(version, blobs, base, LocalBackend(served.loops["base"], blobs))


def test_the_same_files_give_the_same_reading_in_judging(served: Server):
    encoder = encoder_for(served.files / "base", 64, served.files / "chat")
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoder.eos_id, end in encoder.end_ids) == (end, True)
    assert encoder.encode(Row(PROMPT, "pong")).input_ids[-1] == end


def test_an_adapter_with_only_a_template_and_an_end_shares_the_bases_tables(tmp_path: Path):
    base = base_dialect(chat_world(tmp_path / "base"))
    dialects = Dialects(base)
    template, tokens = tmp_path / "template", tmp_path / "tokens"
    template.mkdir()
    (template / "chat_template.jinja").write_text(CHATML)
    (template / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    chat_tokenizer(tokens, extra=(CALL,))
    of_base = dialects.of(None)
    for key, folder in (("template", template), ("tokens", tokens)):
        dialects.load(key, lambda folder=folder: folder)
    shared, own = (dialects.of(AdapterRef("hash", key, 1, "blob", dialect=key)) for key in ("template", "tokens"))
    assert (shared.vocabulary, shared.grammars) == (of_base.vocabulary, of_base.grammars)
    assert shared.end_ids == {5} != of_base.end_ids
    assert own.vocabulary is not of_base.vocabulary
    assert own.vocabulary.special_ids([CALL])


def test_dialects_beyond_the_limit_are_dropped_and_loaded_again(tmp_path: Path):
    base = chat_world(tmp_path / "base")
    dialects = Dialects(base_dialect(base))
    refs = [AdapterRef("hash", "a", 1, "blob", str(number)) for number in range(MAX_DIALECTS + 1)]
    (tmp_path / "beside").mkdir()
    for ref in refs:
        assert not dialects.has(ref.dialect)
        (tmp_path / "beside" / "generation_config.json").write_text(json.dumps({"eos_token_id": int(ref.dialect)}))
        dialects.load(ref.dialect, lambda: tmp_path / "beside")
    assert dialects.of(refs[-1]).end_ids == {MAX_DIALECTS}
    assert dialects.of(None).end_ids == base_dialect(base).end_ids
    with pytest.raises(NotFoundError, match="a@1"):
        dialects.of(refs[0])


async def test_prompters_are_shared_bounded_and_opened_again_after_a_failure(tmp_path: Path):
    base = chat_world(tmp_path / "base")
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    prompters = Prompters(blobs)
    plain = Target("base")
    assert await prompters.of(plain, base) is await prompters.of(plain, base)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    key = blobs.put_folder(tmp_path / "bad")
    version = type("V", (), {"details": {DIALECT: key}})()
    for _ in range(2):
        with pytest.raises(InvalidAdapterError):
            await prompters.of(Target("base", version), base)
    first = await prompters.of(plain, base)
    for number in range(MAX_PROMPTERS):
        (tmp_path / "ends").mkdir(exist_ok=True)
        (tmp_path / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": number}))
        version = type("V", (), {"details": {DIALECT: blobs.put_folder(tmp_path / "ends")}})()
        await prompters.of(Target("base", version), base)
    assert await prompters.of(plain, base) is not first


def test_a_load_refuses_an_adapter_of_another_base_and_warns_of_an_unknown_one(served: Server, tmp_path: Path):
    shutil.copytree(served.files / "plain", tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    other = chat_world(tmp_path / "another-base", seed=9)
    fields = json.loads(config.read_text())

    def load(recorded: str) -> tuple[int, dict]:
        config.write_text(json.dumps({**fields, "base_model_name_or_path": recorded}))
        answer = served.post("/v1/load_lora_adapter", lora_name="other", lora_path=str(config.parent))
        return answer.status_code, answer.json()

    status, body = load(str(other))
    assert (status, body["error"]["code"]) == (400, "invalid_adapter")
    assert "trained on another base" in body["error"]["message"]
    status, body = load("org/unknown")
    assert status == 200
    assert "'org/unknown'" in body["warnings"][0]
    assert list(served.registry.find("other", 1).warnings) == body["warnings"]
    for recorded in ("base", str(served.files / "base")):
        assert "warnings" not in load(recorded)[1]
