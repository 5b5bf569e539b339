"""Grammars allow exactly the tokens that can lead to an allowed answer: checked against lists of all answers."""

import itertools
import json
import random
import threading
from collections.abc import Iterable, Sequence

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.models import byte_tokenizer
from cluster.errors import InvalidRequestError
from kernels.ops import ops_for
from serving.engine import grammar, matcher
from serving.engine.masks import MaskBuilder
from serving.engine.matcher import GrammarCompiler, Matcher, TokenTable

MERGES = ("a b", "ab c", "1 2", "t r", "tr u", "tru e", '{ "', '" :', "Ã ©", "Ġ a", "> Ċ", '" }')
END_IDS = frozenset((500, 3))  # 3 is an ordinary character of the vocabulary: the grammar alone decides about it


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer in which a few tokens have several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    names = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


TOKENIZER = make_tokenizer()
VOCAB_SIZE = 510  # the model has rows that the tokenizer has not
COMPILER = GrammarCompiler(TOKENIZER)
NUM_TEXT_TOKENS = 256 + len(MERGES)


def byte_values() -> dict[str, int]:
    """Return the byte that each character of the byte-level alphabet stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_values()
TOKEN_BYTES = [
    bytes(BYTES[character] for character in TOKENIZER.convert_ids_to_tokens(token)) for token in range(NUM_TEXT_TOKENS)
]


def allowed(state: Matcher, end_ids: Iterable[int] = END_IDS) -> set[int]:
    state.end_ids = frozenset(end_ids)
    return masked([state], VOCAB_SIZE)[0]


def masked(states: Sequence[Matcher], num_tokens: int) -> list[set[int]]:
    """Return the tokens that are left in each row of logits. Other rows, before and after, stay as they are."""
    masks = MaskBuilder(ops_for("cpu"), num_tokens, 2)
    logits = torch.zeros(len(states) + 2, num_tokens)
    masks.apply(logits, masks.build(range(1, len(states) + 1), states))
    assert not logits[[0, -1]].any()
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits[1:-1]]


def expected(answers: set[bytes], prefix: bytes) -> set[int]:
    """Return the tokens after which some answer can still be reached, and the end tokens if the prefix is an answer."""
    starts = {answer[:length] for answer in answers for length in range(len(answer) + 1)}
    going_on = {token for token, text in enumerate(TOKEN_BYTES) if prefix + text in starts}
    return (going_on - END_IDS) | (set(END_IDS) if prefix in answers else set())


def is_forced(tokens: set[int], answers: set[bytes], prefix: bytes) -> bool:
    """Whether all answers go on with the one token: the library then asks for the tokenizer's own way to write it."""
    if len(tokens) != 1 or prefix in answers:
        return False
    follow = prefix + TOKEN_BYTES[min(tokens)]
    return all(answer.startswith(follow) for answer in answers if answer.startswith(prefix))


def texts(*parts: Iterable[str]) -> set[bytes]:
    return {"".join(chosen).encode() for chosen in itertools.product(*parts)}


DIGITS = [str(i) for i in range(10)]
FINITE = {
    "regex": (grammar.regex("(ab|abc)?[12]{1,2}"), texts(("", "ab", "abc"), "12", ("", "1", "2"))),
    "regex with characters of two bytes": (grammar.regex("[éè]{2}a"), texts("éè", "éè", "a")),
    "regex that may be empty": (grammar.regex("(true)?"), texts(("", "true"))),
    "choice": (grammar.choice(["a", "ab", "abc", 'q"\n', "é"]), texts(("a", "ab", "abc", 'q"\n', "é"))),
    "choice of one": (grammar.choice([" a"]), texts([" a"])),
    "lark": (grammar.context_free('start: x x\nx: "ab" | "1" y\ny: "2"'), texts(("ab", "12"), ("ab", "12"))),
    "gbnf": (grammar.context_free('root ::= "ab" item\nitem ::= [12] | "c"'), texts(("ab",), "12c")),
    "json": (
        grammar.json_schema(
            {
                "type": "object",
                "properties": {"a": {"enum": [1, 12, True]}, "b": {"const": "é"}},
                "required": ["a"],
                "additionalProperties": False,
            },
            has_whitespace=False,
        ),
        texts(('{"a":',), ("1", "12", "true"), ("}", ',"b":"é"}')),
    ),
    "json with one space": (
        grammar.json_schema({"const": [1, 2]}, whitespace=" "),
        texts("[", ("", " "), "1", ("", " "), ",", ("", " "), "2", ("", " "), "]"),
    ),
    "function calls": (
        grammar.function_calls(
            {"f": {"const": 1}, "g": {"$ref": "#/$defs/x", "$defs": {"x": {"const": True}}}},
            around=("<a>", "</a>"),
            around_each=("(", ")"),
            keys=("name", "args"),
        ),
        texts(("<a>(",), ('{"name": "f", "args": 1', '{"name": "g", "args": true'), ("})</a>",)),
    ),
}


SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": ["ab", "é", None]}, "minItems": 1, "maxItems": 2},
            "size": {"type": "integer", "minimum": -3, "maximum": 120},
        },
        "required": ["name", "tags", "size"],
        "additionalProperties": False,
    },
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[ab]{2,4}$"}, {"const": {"a": [1]}}]},
    "recursive": {
        "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": 2}},
        "$ref": "#/$defs/x",
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_random_walk_through_a_schema_ends_in_a_valid_document(name: str):
    choose = random.Random(1)
    form = grammar.json_schema(SCHEMAS[name])
    for _ in range(30):
        state, text = COMPILER.matcher(form), b""
        while not state.is_complete:
            token = choose.choice(sorted(allowed(state)))
            if token in END_IDS:
                break
            state.take(token)
            text += TOKEN_BYTES[token]
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("name", FINITE)
def test_exactly_the_tokens_that_lead_to_an_answer_are_allowed(name: str):
    """Walks at random, many times, and compares every step with the list of all answers."""
    form, answers = FINITE[name]
    choose = random.Random(0)
    seen = set()
    for _ in range(40):
        state, prefix = COMPILER.matcher(form), b""
        while True:
            tokens = allowed(state)
            assert tokens == expected(answers, prefix) or is_forced(tokens, answers, prefix), prefix
            token = choose.choice(sorted(tokens))
            if token in END_IDS:
                break
            state.take(token)
            prefix += TOKEN_BYTES[token]
            if state.is_complete:
                assert expected(answers, prefix) == set(END_IDS)
                break
        assert prefix in answers
        seen.add(prefix)
    assert len(seen) >= min(len(answers), 4), "the walks saw too little"


def test_an_answer_can_stop_only_at_an_end_token_of_its_own():
    """A request without end tokens goes on while the grammar does. One token more than the vocabulary is ignored."""
    state = COMPILER.matcher(grammar.regex("a*"))
    a = TOKENIZER.convert_tokens_to_ids("a")
    assert allowed(state, ()) == {a}
    assert allowed(state, (500,)) == {a, 500}
    assert allowed(state, (500, 10**6)) == {a, 500}


def test_a_token_that_ends_the_sequence_is_no_text_inside_the_grammar():
    """Otherwise the sequence would end there, in the middle of the answer."""
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    state = COMPILER.matcher(grammar.regex("[ab]{2}"))
    assert allowed(state, (a,)) == {b, TOKENIZER.convert_tokens_to_ids("ab")}


def test_sequences_of_several_tokenizers_share_a_batch():
    plain = byte_tokenizer()
    others = GrammarCompiler(plain)
    form = grammar.choice(["12"])
    states = [COMPILER.matcher(form), others.matcher(form), COMPILER.matcher(form)]
    whole, one = TOKENIZER.convert_tokens_to_ids("12"), plain.convert_tokens_to_ids("1")
    assert masked(states, 300) == [{whole}, {one}, {whole}]


BAD = {
    "regex": (lambda: grammar.regex("[a-z", "structured_outputs.regex"), "structured_outputs.regex: .*unclosed"),
    "look-around": (lambda: grammar.regex("(?=a)b", "guided_regex"), "guided_regex: .*look-around"),
    "lark": (lambda: grammar.context_free("start: foo", "guided_grammar"), "guided_grammar: .*unknown name.*foo"),
    "gbnf": (
        lambda: grammar.context_free("root := 1", "guided_grammar"),
        "guided_grammar: .*read as GBNF",
    ),
    "schema is no JSON": (lambda: grammar.json_schema('{"type":', "guided_json"), "guided_json: .*not valid JSON"),
    "schema type": (lambda: grammar.json_schema({"type": "objekt"}, "response_format"), "response_format: .*objekt"),
    "keyword": (lambda: grammar.json_schema({"type": "array", "uniqueItems": True}), "json_schema: .*uniqueItems"),
    "contradiction": (lambda: grammar.json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "minimum"),
    "reference": (lambda: grammar.json_schema({"$ref": "#/$defs/x"}), r"\$defs/x"),
    "remote reference": (lambda: grammar.json_schema({"$ref": "http://127.0.0.1/x.json"}), "127.0.0.1"),
    "endless nesting": (lambda: grammar.regex("(" * 400 + ")" * 400), "regex"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compiled_is_refused_with_its_place_and_cause(name: str):
    make, message = BAD[name]
    with pytest.raises(InvalidRequestError, match=f"(?s){message}") as error:
        COMPILER.matcher(make())
    assert len(str(error.value)) < 1000


def test_a_tokenizer_that_the_library_does_not_know_is_refused():
    unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(
        InvalidRequestError, match=r"This model's tokenizer does not support structured output: .*decoder"
    ):
        GrammarCompiler(unknown).matcher(grammar.regex("a"))


def test_a_lenient_schema_ignores_what_cannot_be_enforced():
    state = COMPILER.matcher(grammar.json_schema({"type": "array", "uniqueItems": True}, is_lenient=True))
    assert allowed(state) == {TOKENIZER.convert_tokens_to_ids("[")}


def test_a_token_outside_the_grammar_is_refused():
    state = COMPILER.matcher(grammar.choice(["a"]))
    assert state.error is None
    state.take(TOKENIZER.convert_tokens_to_ids("b"))
    assert isinstance(state.error, InvalidRequestError)
    assert "choice: " in str(state.error)
    assert allowed(state) == set()


def test_grammars_are_kept_until_others_were_used_more_recently(monkeypatch: pytest.MonkeyPatch):
    compiled = []
    original = matcher._compile
    monkeypatch.setattr(matcher, "MAX_COMPILED", 2)
    monkeypatch.setattr(matcher, "_compile", lambda form, table: compiled.append(form.text) or original(form, table))
    compiler = GrammarCompiler(TOKENIZER)
    first, second, third = (grammar.choice([text], origin=text) for text in "abc")
    for form in (first, second, grammar.choice(["a"], origin="another field"), third, first, second):
        compiler.matcher(form)
    assert compiled == [form.text for form in (first, second, third, second)]


def test_many_threads_build_one_table_and_get_matchers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    built = []
    original = TokenTable.__init__
    monkeypatch.setattr(TokenTable, "__init__", lambda *args: built.append(1) or original(*args))
    compiler = GrammarCompiler(TOKENIZER)
    barrier, results = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        state = compiler.matcher(grammar.choice(["ab", "1"]))
        state.take(TOKENIZER.convert_tokens_to_ids("1"))
        results.append(state.is_complete)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert len(built) == 1
    assert not compiler.matcher(grammar.choice(["ab", "1"])).is_complete
