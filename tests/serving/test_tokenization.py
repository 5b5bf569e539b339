"""Tests /tokenize and /detokenize against the tokenizer of the checkpoint itself."""

from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config.settings import ServingConfig
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import BOS, make_adapter, make_checkpoint, set_chat_template

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}"
    "{% if tools %}{{ tools[0].function.name }}<tool_call>{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hallo, schöne Welt"}]
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "org/v1")
    set_chat_template(folder / "org/v1", TEMPLATE)
    adapter = make_adapter(folder / "adapter", folder / "org/v1", rank=2)
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=400)
    with serve_bases(folder, folder, config, ("org/v1",)) as server:
        assert server.post("/v1/load_lora_adapter", lora_name="bot", lora_path=str(adapter)).status_code == 200
        yield server


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(server.files / "org/v1")


@pytest.mark.parametrize("model", ["org/v1", "bot", "bot@1", None])
@pytest.mark.parametrize("more", [{}, {"add_special_tokens": True}, {"add_special_tokens": False}])
def test_a_prompt_becomes_the_tokens_of_the_tokenizer(server: Server, tokenizer, model: str | None, more: dict):
    answer = server.post("/tokenize", model=model, prompt="Hallo, schöne <s> 🙂", **more)
    expected = tokenizer("Hallo, schöne <s> 🙂", **more)["input_ids"]
    assert answer.json() == {"count": len(expected), "max_model_len": 400, "tokens": expected, "token_strs": None}
    text = server.post("/detokenize", model=model, tokens=expected).json()
    assert text == {"prompt": tokenizer.decode(expected)}


@pytest.mark.parametrize("generates", [True, False])
def test_a_chat_becomes_the_tokens_of_its_template(server: Server, tokenizer, generates: bool):
    body = {"messages": HELLO, "tools": [TOOL], "chat_template_kwargs": {"mood": "!"}}
    answer = server.post("/tokenize", **body, add_generation_prompt=generates)
    text = tokenizer.apply_chat_template(HELLO, tools=[TOOL], mood="!", add_generation_prompt=generates, tokenize=False)
    assert answer.json()["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.endswith("!weather<tool_call><a>" if generates else "!weather<tool_call>")
    more = server.post("/tokenize", **body, add_generation_prompt=generates, add_special_tokens=True)
    assert more.json()["tokens"] == tokenizer(text)["input_ids"]


def test_a_chat_counts_as_many_tokens_as_its_completion(server: Server):
    counted = server.post("/tokenize", model="bot", messages=HELLO).json()["count"]
    done = server.client.chat.completions.create(model="bot", messages=HELLO, max_tokens=1)
    assert counted == done.usage.prompt_tokens


def test_a_final_message_is_continued(server: Server):
    turns = [*HELLO, {"role": "assistant", "content": "Ja"}]
    answer = server.post("/tokenize", messages=turns, continue_final_message=True, add_generation_prompt=False)
    assert server.post("/detokenize", tokens=answer.json()["tokens"]).json()["prompt"].endswith("<assistant>Ja")


def test_token_strs_are_the_entries_of_the_vocabulary(server: Server, tokenizer):
    answer = server.post("/tokenize", prompt="ü a<s>", return_token_strs=True).json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert answer["token_strs"][-1] == "<s>"


def test_no_tokens_are_no_fault(server: Server):
    empty = server.post("/tokenize", prompt="", add_special_tokens=False)
    assert (empty.status_code, empty.json()["count"], empty.json()["tokens"]) == (200, 0, [])
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert server.post("/detokenize", tokens=[BOS]).json() == {"prompt": "<s>"}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/tokenize", {}, 400, "prompt: send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt: send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {}}, 400, "mm_processor_kwargs: this server does not"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "'nobody' does not exist"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True}, 400, "requires add_generation_prompt=false"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "a message of the role user needs text"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, 400, "trust_request_chat_template"),
        ("/detokenize", {"tokens": [5, 100_000]}, 400, "has token id 100000"),
        ("/detokenize", {"tokens": [-1]}, 400, "greater than or equal to 0"),
        ("/detokenize", {}, 400, "tokens: Field required"),
    ],
)
def test_bad_bodies_are_refused(server: Server, path: str, body: dict, status: int, said: str):
    answer = server.post(path, **body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_a_lone_surrogate_is_refused(server: Server):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/tokenize", content='{"prompt": "\\ud800"}', headers=headers)
    assert answer.status_code == 400
    assert "not valid Unicode" in answer.json()["error"]["message"]


def test_without_a_model_the_only_base_is_meant(tmp_path: Path):
    for seed, name in enumerate(("v1", "v2")):
        make_checkpoint(tmp_path / name, seed=seed)
    with serve_bases(tmp_path, tmp_path, ServingConfig(memory_bytes=8 * 2**20), ("v1", "v2")) as server:
        answer = server.post("/tokenize", prompt="a")
        assert (answer.status_code, server.post("/tokenize", model="v2", prompt="a").status_code) == (400, 200)
        assert answer.json()["error"]["message"] == "model: name the model. Served bases are: v1, v2."
