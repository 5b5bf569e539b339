"""The field types of fleet.toml, with the checks that a single value can fail.

While a file is loaded, `info.context["folder"]` is the file's folder: relative paths become absolute in it.
"""

import re
from pathlib import Path
from typing import Annotated, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, ValidationInfo
from pydantic.dataclasses import dataclass

from cluster.errors import InvalidRequestError
from cluster.names import check_name
from cluster.storage.sources import check_source

SQLITE = "sqlite:///"


def _valid_name(name: str) -> str:
    try:
        return check_name(name)
    except InvalidRequestError as error:
        raise ValueError(str(error)) from error


def _valid_origin(origin: str) -> str:
    if re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin) is None:
        raise ValueError(
            f"Not an origin: {origin!r}. Write a scheme, a host and perhaps a port, without a path, or '*'"
        )
    return origin


def _absolute_path(path: Path, info: ValidationInfo) -> Path:
    if re.match("[a-z0-9+]+:/", str(path)):  # a path has lost one of the URL's slashes
        raise ValueError("A URL is not supported here. Give a folder")
    return info.context["folder"] / path if info.context else path


def _absolute_folder(folder: str, info: ValidationInfo) -> str:
    return str(_absolute_path(Path(folder), info))


def _source(value: object, info: ValidationInfo) -> Path | str:
    """Return a URL as it is, and a path as an absolute one."""
    if not isinstance(value, str | Path):
        raise ValueError("Input should be a valid string")
    if isinstance(value, Path) or "://" not in value:
        return _absolute_path(Path(value), info)
    try:
        return check_source(value)
    except InvalidRequestError as error:
        raise ValueError(str(error)) from error


def _absolute_blobs(url: str, info: ValidationInfo) -> str:
    return _absolute_folder(url, info) if "://" not in url else url


def _absolute_registry(url: str, info: ValidationInfo) -> str:
    if "://" not in url:
        raise ValueError(f"Not a database URL: {url!r}. Write a SQLite file as sqlite:///registry.db")
    if not url.startswith(SQLITE):
        return url
    return f"{SQLITE}{_absolute_path(Path(url.removeprefix(SQLITE)), info)}"


def _web_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"Not a web address: {url!r}. Write it as http://host:port")
    return url.rstrip("/").removesuffix("/v1")


Config = TypeVar("Config")
Name = Annotated[str, AfterValidator(_valid_name)]
FilePath = Annotated[Path, AfterValidator(_absolute_path)]
Source = Annotated[Path | str, PlainValidator(_source)]
Folder = Annotated[str, AfterValidator(_absolute_folder), Field(validate_default=True)]
Origin = Annotated[str, AfterValidator(_valid_origin)]
BlobsUrl = Annotated[str, AfterValidator(_absolute_blobs), Field(validate_default=True)]
RegistryUrl = Annotated[str, AfterValidator(_absolute_registry), Field(validate_default=True)]
WebUrl = Annotated[str, AfterValidator(_web_url)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True)
def frozen(cls: type[Config]) -> type[Config]:
    """Make a frozen pydantic dataclass that refuses unknown keys, NaN and infinities."""
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast("type[Config]", dataclass(cls, frozen=True, config=strict))
