"""The streamed pieces add up to what the tokenizer decodes, up to the first stop string."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from serving.engine.detokenizer import MAX_WINDOW, Detokenizer, Vocabulary

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.\nA new line begins here; naïve café.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n\n\nprint(f(3))  # done",
    "Größe und Übermut: ein Märchen. Ça va? 数据和模型 データ 😀😀👍🏽 done. Привет, мир!",
    "It is what it is. It isn't what it was , they said .  Two  spaces.",
] * 3
SPECIAL = ["<s>", "</s>", "<pad>"]
STOPS = ["\n", "the", "it is", "ab", "xaby", ".\n", "é", "😀", " "]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, "</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: sentencepiece BPE, a space before the text, unknown characters as byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoder)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[*SPECIAL, *byte_tokens], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁").replace("\n", "") for text in CORPUS], trainer)
    # The trainer makes the byte tokens special; in the real tokenizers they are ordinary entries of the vocabulary.
    content = tokenizer.to_str()
    plain = Tokenizer.from_str(_without_added(content, byte_tokens))
    return wrap(plain, "</s>")


def _without_added(content: str, names: Sequence[str]) -> str:
    data = json.loads(content)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in set(names)]
    return json.dumps(data)


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer with unigram pieces and a metaspace decoder, which drops only the first piece's space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, "</s>")


def wrap(tokenizer: Tokenizer, eos: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.add_tokens(["<tool>"])  # added but not special, so it is shown
    return fast


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace)}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def pieces_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(Vocabulary(tokenizer), stop)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def whole(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def tokens_to_stop(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stop: Sequence[str]) -> list[int]:
    """Return the tokens up to the first one that completes a stop string, found by brute force."""
    for count in range(1, len(tokens) + 1):
        if any(one in whole(tokenizer, tokens[:count]) for one in stop):
            return list(tokens[:count])
    return list(tokens)


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the stop string that is complete first, found character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text


def token_lists(name: str) -> st.SearchStrategy[list[int]]:
    """Draw random tokens with many byte and special tokens, mixed with real text."""
    tokenizer = TOKENIZERS[name]
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    low = st.lists(st.integers(0, 258), max_size=6)
    text = st.sampled_from(CORPUS).map(lambda t: tokenizer.encode(t, add_special_tokens=False)[:25])
    return st.lists(st.one_of(anything, low, text), max_size=5).map(lambda parts: [t for part in parts for t in part])


@each_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_add_up_to_the_decoded_text(name: str, data: st.DataObject):
    tokens = data.draw(token_lists(name))
    assert "".join(pieces_of(TOKENIZERS[name], tokens)) == whole(TOKENIZERS[name], tokens)


@each_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data(), stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(name: str, data: st.DataObject, stop: list[str]):
    tokenizer, tokens = TOKENIZERS[name], data.draw(token_lists(name))
    seen = tokens_to_stop(tokenizer, tokens, stop)
    detokenizer = Detokenizer(Vocabulary(tokenizer), stop)
    shown, stopped_after = "", None
    for count, token in enumerate(tokens, 1):
        shown += detokenizer.push(token)
        if detokenizer.stopped_by is not None:
            stopped_after = count
            break
    has_stop = any(one in whole(tokenizer, seen) for one in stop)
    assert stopped_after == (len(seen) if has_stop else None)
    assert shown + detokenizer.finish() == cut(whole(tokenizer, seen), stop)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unfinished_characters_are_never_shown(name: str, data: st.DataObject):
    """Real text never shows a replacement character, wherever its tokens are cut."""
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(alphabet="abé 数😀👍🏽\nß", max_size=20))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    assert not any("\ufffd" in detokenizer.push(token) for token in tokens)


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_text_is_shown_as_soon_as_it_is_decided(name: str):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode("The quick brown fox jumps over the lazy dog", add_special_tokens=False)
    detokenizer, shown = Detokenizer(Vocabulary(tokenizer)), ""
    for count, token in enumerate(tokens, 1):
        shown += detokenizer.push(token)
        assert shown == whole(tokenizer, tokens[:count])


def test_a_stop_string_in_a_byte_token_stops_at_once():
    """Byte tokens are shown late, because their run may still become invalid. A stop string does not wait for that."""
    tokenizer = TOKENIZERS["byte_fallback"]
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    tokens = [*tokenizer.encode("The fox", add_special_tokens=False), newline]
    detokenizer = Detokenizer(Vocabulary(tokenizer), ("\n",))
    assert "".join(detokenizer.push(token) for token in tokens) == "The fox"
    assert detokenizer.stopped_by is not None
    assert detokenizer.push(tokens[0]) == ""
    assert detokenizer.finish() == ""


def spell(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode each character on its own."""
    return [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]


@pytest.mark.parametrize(
    "encode", [spell, lambda t, text: t.encode(text, add_special_tokens=False)], ids=["spelt", "merged"]
)
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one the two", ("the",), "one "),
        ("one th two", ("the",), "one th two"),
        ("zxaby", ("ab", "xaby"), "zx"),
        ("zxaby", ("by", "xaby"), "z"),
        ("aaab", ("aab",), "a"),
        ("end th", ("the",), "end th"),
        ("the", ("the",), ""),
    ],
)
def test_stop_strings_in_short_texts(encode: Callable, text: str, stop: tuple[str, ...], shown: str):
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(pieces_of(tokenizer, encode(tokenizer, text), stop)) == shown


def test_special_tokens_have_no_text_and_other_added_tokens_do():
    tokenizer = TOKENIZERS["byte_level"]
    eos, tool = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<tool>")
    tokens = [*tokenizer.encode("a", add_special_tokens=False), eos, tool, eos, *tokenizer.encode("é")]
    assert "".join(pieces_of(tokenizer, tokens)) == "a<tool>é"


def test_tokens_beyond_the_tokenizer_have_no_text():
    """Embeddings are often padded to a round size, so a model can choose a token that has no text."""
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [*tokenizer.encode("a", add_special_tokens=False), len(tokenizer) + 3, *tokenizer.encode("b")]
    assert "".join(pieces_of(tokenizer, tokens)) == "ab"


class CountingVocabulary(Vocabulary):
    """A vocabulary that remembers the longest list of tokens that it decoded."""

    longest = 0

    def decode(self, tokens: list[int]) -> str:
        self.longest = max(self.longest, len(tokens))
        return super().decode(tokens)


def degenerate(name: str) -> dict[str, list[int]]:
    """Return long outputs whose tokens complete no character: lone bytes, or one long run of bytes."""
    tokenizer = TOKENIZERS[name]
    if name == "byte_level":
        (lone,) = tokenizer.convert_tokens_to_ids(["\u0122"])  # byte 0x80 in the byte-level alphabet
        (start,) = tokenizer.convert_tokens_to_ids(["\u00e2"])  # byte 0xE2, the first of three
        return {"lone bytes": [lone] * 500, "beginnings": [start] * 500}
    lone, e2, x82, xac = tokenizer.convert_tokens_to_ids(["<0x80>", "<0xE2>", "<0x82>", "<0xAC>"])
    return {"lone bytes": [lone] * 500, "many characters": [e2, x82, xac] * 200}


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_degenerate_output_costs_no_more_per_token(name: str):
    tokenizer = TOKENIZERS[name]
    for tokens in degenerate(name).values():
        vocabulary = CountingVocabulary(tokenizer)
        detokenizer = Detokenizer(vocabulary)
        text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
        assert text == whole(tokenizer, tokens)
        assert vocabulary.longest <= 2 * MAX_WINDOW + 8


@each_tokenizer
def test_many_special_tokens_cost_nothing(name: str):
    tokenizer = TOKENIZERS[name]
    vocabulary = CountingVocabulary(tokenizer)
    detokenizer = Detokenizer(vocabulary)
    assert "".join(detokenizer.push(tokenizer.eos_token_id) for _ in range(500)) == ""
    assert vocabulary.longest == 0
