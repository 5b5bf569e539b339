"""Runs the checks of one client and prints one JSON line for each. It needs only the standard library."""

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Target:
    """The server under test: `url` without /v1, a chat model that is a base, and an adapter of it."""

    url: str
    base: str
    adapter: str

    @property
    def api(self) -> str:
        """The address that OpenAI clients are given."""
        return f"{self.url}/v1"


Check = Callable[[Target], None]


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    """Return the message of the error that the call has to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


class Checklist:
    """The checks of one client, in the order in which they are written."""

    def __init__(self, client: str, package: str):
        self._client = client
        self._package = package
        self._checks: list[Check] = []

    def __call__(self, check: Check) -> Check:
        """Add a check; use as a decorator. A check fails by raising."""
        self._checks.append(check)
        return check

    def main(self) -> None:
        """Run all checks against the server that the command line names."""
        parser = argparse.ArgumentParser()
        for name in ("url", "base", "adapter"):
            parser.add_argument(name)
        target = Target(**vars(parser.parse_args()))
        for check in self._checks:
            print(json.dumps(self._record(check, target)), flush=True)

    def _record(self, check: Check, target: Target) -> dict[str, str | None]:
        error = None
        try:
            check(target)
        except Exception as raised:  # noqa: BLE001  whatever a client raises is the finding
            where = traceback.extract_tb(raised.__traceback__)[1:2]
            line = f" (line {where[0].lineno}: {where[0].line})" if where else ""
            error = f"{type(raised).__name__}: {raised}"[:600] + line
        return {
            "client": self._client,
            "version": version(self._package),
            "check": check.__name__,
            "error": error,
        }
