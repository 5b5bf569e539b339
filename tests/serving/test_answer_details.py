"""What an answer has beside its text: log-probabilities, the echoed prompt, token ids, the best of several."""

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config.settings import ServingConfig
from serving.gateway.token_bytes import TokenBytes
from tests.serving.test_api import TEMPLATE
from tests.serving.test_detokenizer import CORPUS, TOKENIZERS, each_tokenizer
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint, set_chat_template

PROMPT = "Größe: 数据"
ASKED = {"model": "tone", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    make_adapter(folder / "tone", folder / "v1", rank=4)
    set_chat_template(folder / "v1", TEMPLATE)
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=200, max_rank=16)
    with serve_bases(folder, tmp_path_factory.mktemp("server"), config, ("v1",)) as server:
        assert server.post("/v1/load_lora_adapter", lora_name="tone", lora_path=str(folder / "tone")).is_success
        yield server


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(server.files / "v1")


def choices_of(server: Server, **more: object) -> list[dict]:
    response = server.post("/v1/completions", **{**ASKED, **more})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def choice_of(server: Server, **more: object) -> dict:
    (choice,) = choices_of(server, **more)
    return choice


def stream_of(server: Server, **more: object) -> list[dict]:
    chunks = server.client.completions.create(**ASKED, extra_body=more, stream=True)
    return [chunk.choices[0].model_dump() for chunk in chunks]


# Log-probabilities.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("more", [{}, {"skip_special_tokens": False}, {"allowed_token_ids": [101, 256, 257]}])
def test_the_tokens_joined_are_the_text(server: Server, seed: int, more: dict):
    """The tiny model writes incomplete characters, special tokens and its end token."""
    choice = choice_of(server, logprobs=4, temperature=1.0, seed=seed, max_tokens=40, **more)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    starts = [len("".join(logprobs["tokens"][:n])) for n in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == starts
    for token, logprob, top in zip(
        *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert len(top) in (4, 5), "as many as asked, and the chosen one"


def test_a_chats_token_bytes_joined_are_the_text(server: Server):
    messages = [{"role": "user", "content": "abc"}]
    for seed in range(4):
        asked = {"messages": messages, "model": "v1", "max_tokens": 30, "seed": seed}
        chat = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=5).choices[0]
        content = chat.logprobs.content
        joined = b"".join(bytes(one.bytes) for one in content)
        assert joined.decode(errors="replace") == chat.message.content
        assert "".join(one.token for one in content) == chat.message.content
        assert all(len(one.top_logprobs) == 5 for one in content)


def test_streamed_logprobs_are_those_of_the_whole_answer(server: Server):
    whole = choice_of(server, logprobs=2, echo=True)
    pieces = [chunk["logprobs"] for chunk in stream_of(server, logprobs=2, echo=True) if chunk["logprobs"]]
    for key in ("tokens", "text_offset"):
        assert [one for piece in pieces for one in piece[key]] == whole["logprobs"][key]


# The prompt.


@pytest.mark.parametrize("prompt", [PROMPT, list(PROMPT.encode())], ids=["text", "tokens"])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echo_puts_the_prompt_first(server: Server, prompt: str | list[int], max_tokens: int):
    asked = {"prompt": prompt, "max_tokens": max_tokens}
    plain, echoed = choice_of(server, **asked), choice_of(server, **asked, echo=True)
    scored = choice_of(server, **asked, echo=True, logprobs=1)
    decoded = AutoTokenizer.from_pretrained(server.files / "v1").decode(prompt) if isinstance(prompt, list) else prompt
    assert echoed["text"] == scored["text"] == decoded + plain["text"]
    assert echoed["finish_reason"] == plain["finish_reason"]
    assert echoed["logprobs"] is None
    assert "".join(scored["logprobs"]["tokens"]) == scored["text"]
    assert scored["logprobs"]["token_logprobs"][0] is None
    assert scored["logprobs"]["top_logprobs"][0] is None
    assert all(len(top) in (1, 2) for top in scored["logprobs"]["top_logprobs"][1:])
    assert "".join(chunk["text"] for chunk in stream_of(server, **asked, echo=True)) == echoed["text"]


def test_nothing_is_generated_with_max_tokens_0(server: Server):
    response = server.post("/v1/completions", **{**ASKED, "max_tokens": 0}).json()
    assert response["choices"][0]["text"] == ""
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 0
    assert response["usage"]["prompt_tokens"] == len(PROMPT.encode())


def test_an_echos_logprobs_are_those_of_a_continuation(server: Server):
    """What the model generated scores the same as a part of a prompt: the way in which evaluations use an echo."""
    generated = choice_of(server, logprobs=1, return_token_ids=True)
    tokens = [*generated["prompt_token_ids"], *generated["token_ids"]]
    echoed = choice_of(server, prompt=tokens, max_tokens=1, logprobs=1, echo=True)["logprobs"]
    count = len(generated["token_ids"])
    assert echoed["token_logprobs"][-1 - count : -1] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=1e-4)
    top = echoed["top_logprobs"][-1 - count : -1]
    assert all(
        token == max(one, key=one.get) for token, one in zip(echoed["tokens"][-1 - count : -1], top, strict=True)
    )


def test_prompt_logprobs_have_vllms_format(server: Server, tokenizer: PreTrainedTokenizerFast):
    choice = choice_of(server, prompt_logprobs=2, echo=True, logprobs=0)
    tokens = tokenizer(PROMPT)["input_ids"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token, logprob, entries in zip(tokens[1:], choice["logprobs"]["token_logprobs"][1:], rest, strict=False):
        own = entries[str(token)]
        assert own["logprob"] == pytest.approx(logprob)
        assert own["rank"] >= 1
        assert len(entries) == (2 if own["rank"] <= 2 else 3)
        assert sorted(one["rank"] for one in entries.values())[:2] == [1, 2]
    body = {"model": "v1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "ignore_eos": True}
    chat = server.post("/v1/chat/completions", **body, prompt_logprobs=0, return_token_ids=True).json()
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert len(chat["choices"][0]["token_ids"]) == 2


@pytest.mark.parametrize("kept", [1, 3, 500])
def test_a_truncated_prompt_keeps_its_last_tokens(server: Server, kept: int):
    cut = choice_of(server, truncate_prompt_tokens=kept, echo=True, return_token_ids=True)
    tokens = choice_of(server, return_token_ids=True)["prompt_token_ids"]
    assert cut["prompt_token_ids"] == tokens[-kept:]
    assert cut["token_ids"] == choice_of(server, prompt=tokens[-kept:], return_token_ids=True)["token_ids"]


def test_a_long_prompt_fits_when_it_is_truncated(server: Server):
    assert server.post("/v1/completions", **{**ASKED, "prompt": "x" * 999}).status_code == 400
    response = server.post("/v1/completions", **{**ASKED, "prompt": "x" * 999}, truncate_prompt_tokens=-1).json()
    assert response["usage"]["prompt_tokens"] == 200 - 16


# Token ids, the reason to stop, the best of several.


def test_token_ids_are_returned_whole_and_streamed(server: Server, tokenizer: PreTrainedTokenizerFast):
    whole = choice_of(server, return_token_ids=True)
    assert whole["prompt_token_ids"] == tokenizer(PROMPT)["input_ids"]
    assert tokenizer.decode(whole["token_ids"], skip_special_tokens=True) == whole["text"]
    chunks = stream_of(server, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == whole["token_ids"]
    assert "token_ids" not in choice_of(server)


def test_an_answer_says_what_stopped_it(server: Server):
    plain = choice_of(server, return_token_ids=True)
    token = plain["token_ids"][5]
    assert plain["stop_reason"] is None
    assert choice_of(server, stop_token_ids=[token])["stop_reason"] == token
    assert choice_of(server, stop=[plain["text"][3]])["stop_reason"] == plain["text"][3]
    *_, last = stream_of(server, stop_token_ids=[token])
    assert last["stop_reason"] == token


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_best_of_several_come_first(server: Server, logprobs: int | None):
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "prompt": ["once", "twice"], "logprobs": logprobs}
    everything = choices_of(server, **{**asked, "logprobs": 0}, n=6)
    best = choices_of(server, **asked, n=2, best_of=6)
    assert [choice["index"] for choice in best] == [0, 1, 2, 3]
    for prompt in range(2):
        own = everything[6 * prompt : 6 * prompt + 6]
        ranked = sorted(own, key=lambda choice: -fmean(choice["logprobs"]["token_logprobs"]))
        assert [choice["text"] for choice in best[2 * prompt : 2 * prompt + 2]] == [one["text"] for one in ranked[:2]]
    assert all((choice["logprobs"] is None) == (logprobs is None) for choice in best)


# Bytes of tokens.


@each_tokenizer
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_bytes_of_tokens_joined_are_the_text(name: str, data: st.DataObject):
    tokenizer = TOKENIZERS[name]
    bytes_of = TokenBytes(tokenizer)
    text = data.draw(st.one_of(st.sampled_from(CORPUS), st.text(alphabet="abé 数😀ß<", max_size=12)))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(bytes_of, tokens))
    decoded = tokenizer.decode(tokens).encode()
    assert joined in (decoded, b" " + decoded), "only a space before the text may be missing"


def test_special_and_unknown_tokens_have_bytes_too():
    bytes_of, tokenizer = TokenBytes(TOKENIZERS["byte_level"]), TOKENIZERS["byte_level"]
    assert bytes_of(tokenizer.eos_token_id) == b"</s>"
    assert bytes_of(tokenizer.convert_tokens_to_ids("<tool>")) == b"<tool>"
    assert bytes_of(len(tokenizer) + 5) == b""
