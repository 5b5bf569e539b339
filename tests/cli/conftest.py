"""How tests run the command line."""

from collections.abc import Callable

import pytest

import relora

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `relora ARGUMENTS` in this process; return exit code, standard output and standard error."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["relora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            relora.main()
        output, errors = capfd.readouterr()
        return int(exit_.value.code or 0), output, errors

    return runner
