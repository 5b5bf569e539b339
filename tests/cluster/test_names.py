import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from cluster.names import check_name, parse_model


@pytest.mark.parametrize("name", ["a", "intent", "Qwen2.5-0.5B_instruct", "0", "a" * 128])
def test_good_names_pass(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../etc", "a/b", "a\\b", "-rf", "_x", "a b", "a@1", "ä", "a\n", "a" * 129]
)
def test_bad_names_are_refused_and_quoted(name: str):
    with pytest.raises(InvalidRequestError) as raised:
        check_name(name)
    assert repr(name[:160]) in str(raised.value)


@given(st.text())
def test_no_accepted_name_leaves_its_folder(name: str):
    try:
        check_name(name)
    except InvalidRequestError:
        return
    assert name.isascii()
    assert not set(name) & set("/\\@%? \n\0")
    assert name.strip(".") == name.rstrip(".") != ""


@pytest.mark.parametrize(
    ("model", "parsed"), [("intent", ("intent", None)), ("intent@2", ("intent", 2)), ("v1.5@10", ("v1.5", 10))]
)
def test_a_model_string_may_pin_a_version(model: str, parsed: tuple):
    assert parse_model(model) == parsed


@pytest.mark.parametrize(
    "model", ["", "@1", "a@", "a@0", "a@01", "a@-1", "a@1@2", "a@x", "a@²", "a@1 ", "a@9999999999", "../a@1"]
)
def test_bad_model_strings_are_refused(model: str):
    with pytest.raises(InvalidRequestError):
        parse_model(model)
