"""Names of base models and adapters, and the model string of a request.

A name may be plain (`intent`), that of a repository on the Hugging Face Hub (`org/adapter`), or composed
(`base:adapter`). Its parts have no meaning of their own: names are compared as they are.
"""

import re

from cluster.errors import InvalidRequestError

MAX_LENGTH = 200
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:[/:][A-Za-z0-9_][A-Za-z0-9._-]*)*")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_FOREIGN = re.compile(r"[^A-Za-z0-9._/:-]")
_RULE = (
    "Names consist of ASCII letters, digits, '.', '_' and '-'. '/' and ':' join parts, as in 'org/adapter' and "
    "'base:adapter'; each part starts with a letter, a digit or '_'."
)
_FLAT = str.maketrans({"/": "+", ":": "="})  # these two occur in no name
_UNFLAT = str.maketrans({"+": "/", "=": ":"})


def check_name(name: str) -> str:
    """Return `name` if it can name a base model or an adapter, else raise InvalidRequestError that says what is wrong.

    No accepted name starts with `/` or has `..` as a part, so names are safe in URLs and as relative paths.
    """
    if _NAME.fullmatch(name) is None or len(name) > MAX_LENGTH:
        raise InvalidRequestError(f"Bad name {name[:160]!r}: {_fault(name)}. {_RULE}")
    return name


def flat_name(name: str) -> str:
    """Return the name without `/` and `:`, for systems that use it as a file name. `unflat_name` undoes it."""
    return name.translate(_FLAT)


def unflat_name(flat: str) -> str:
    """Return the name that `flat_name` turned into `flat`."""
    return flat.translate(_UNFLAT)


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


def _fault(name: str) -> str:
    """Say why `_NAME` or the length limit rejects a name."""
    if not name:
        return "it is empty"
    if len(name) > MAX_LENGTH:
        return f"it has {len(name)} characters, the limit is {MAX_LENGTH}"
    if "@" in name:
        return "'@' is reserved for versions, as in 'intent@2'"
    foreign = _FOREIGN.search(name)
    if foreign is not None:
        return f"it contains {foreign[0]!r}"
    part = next(part for part in re.split("[/:]", name) if not _NAME.fullmatch(part))
    return f"its part {part!r} starts with {part[0]!r}" if part else "one of its parts is empty"
