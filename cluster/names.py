"""Names of base models and adapters, and the model string of a request."""

import re

from cluster.errors import InvalidRequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


def check_name(name: str) -> str:
    """Return `name` if it can name a base model or an adapter, else raise InvalidRequestError that quotes it.

    Names are used in file paths and URLs: no separators, no `..` at the start, at most 128 characters.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"Bad name {name[:160]!r}: a name has 1 to 128 letters, digits, '.', '_' or '-', "
            "and starts with a letter or digit."
        )
    return name


def parse_model(model: str) -> tuple[str, int | None]:
    """Split a request's model string: `intent@2` is ("intent", 2); `intent`, for the live version, ("intent", None)."""
    name, pin, number = model.partition("@")
    if not pin:
        return check_name(name), None
    if _NUMBER.fullmatch(number) is None:
        raise InvalidRequestError(
            f"Bad model {model[:160]!r}: '@' must be followed by a version number, as in 'intent@2'."
        )
    return check_name(name), int(number)
