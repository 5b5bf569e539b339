from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from cluster.names import check_name, flat_name, parse_model, unflat_name

GOOD = [
    *("a", "intent", "Qwen2.5-0.5B_instruct", "0", "a" * 200, "_x", "v1..2"),
    *("acme/support-bot", "Qwen/Qwen2.5-0.5B", "v1:intent", "Qwen/Qwen2.5-0.5B:acme/support-bot", "a/b/c"),
]
names = st.from_regex(r"\A[a-z0-9_][a-z0-9._-]{0,5}([/:][a-z0-9_][a-z0-9._-]{0,5}){0,3}\Z")


@pytest.mark.parametrize("name", GOOD)
def test_good_names_pass(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "it is empty"),
        (".", "its part '.' starts with '.'"),
        ("..", "its part '..' starts with '.'"),
        ("../etc", "its part '..' starts with '.'"),
        ("a/../b", "its part '..' starts with '.'"),
        ("a:..", "its part '..' starts with '.'"),
        ("/etc/passwd", "one of its parts is empty"),
        ("a//b", "one of its parts is empty"),
        ("a/", "one of its parts is empty"),
        ("a:", "one of its parts is empty"),
        ("-rf", "its part '-rf' starts with '-'"),
        ("a/-rf", "its part '-rf' starts with '-'"),
        ("a\\b", r"it contains '\\\\'"),
        ("a b", "it contains ' '"),
        ("a+b", "it contains '+'"),
        ("ä", "it contains 'ä'"),
        ("a\n", r"it contains '\\n'"),
        ("%2e%2e", "it contains '%'"),
        ("a@1", "'@' is reserved for versions, as in 'intent@2'"),
        ("a" * 201, "it has 201 characters, the limit is 200"),
    ],
)
def test_bad_names_are_refused_with_the_fault(name: str, fault: str):
    with pytest.raises(InvalidRequestError) as raised:
        check_name(name)
    assert repr(name[:160]) in str(raised.value)
    assert fault.replace("\\\\", "\\") in str(raised.value)


@given(st.text() | st.text(alphabet="ab./:-_@"))
def test_no_accepted_name_leaves_its_folder(name: str):
    try:
        check_name(name)
    except InvalidRequestError:
        return
    assert name.isascii()
    assert not set(name) & set("\\@%?#+= \n\0")
    path = PurePosixPath(name)
    assert not path.is_absolute()
    assert str(path) == name
    assert ".." not in path.parts


@given(names)
def test_a_flat_name_is_one_file_name_and_can_be_undone(name: str):
    assert check_name(name) == name
    assert not set(flat_name(name)) & set("/:")
    assert unflat_name(flat_name(name)) == name


@pytest.mark.parametrize(
    ("model", "parsed"),
    [
        ("intent", ("intent", None)),
        ("intent@2", ("intent", 2)),
        ("v1.5@10", ("v1.5", 10)),
        ("acme/support-bot@3", ("acme/support-bot", 3)),
        ("Qwen/Qwen2.5-0.5B:bot@1", ("Qwen/Qwen2.5-0.5B:bot", 1)),
    ],
)
def test_a_model_string_may_pin_a_version(model: str, parsed: tuple):
    assert parse_model(model) == parsed


@pytest.mark.parametrize(
    "model", ["", "@1", "a@", "a@0", "a@01", "a@-1", "a@1@2", "a@x", "a@²", "a@1 ", "a@9999999999", "../a@1", "a@1/b"]
)
def test_bad_model_strings_are_refused(model: str):
    with pytest.raises(InvalidRequestError):
        parse_model(model)
