"""Optional packages: an import that fails names the extra of this project that installs the package."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import MissingPackageError

EXTRAS = {"jsonschema": "bench", "matplotlib": "plots", "openai": "demo", "peft": "bench", "sacrebleu": "chrf"}
"""From each optional package to the extra in pyproject.toml that installs it."""


@contextmanager
def optional_imports() -> Iterator[None]:
    """Turn a failed import of an optional package within the block into a MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackageError(
            f"The package {package!r} is not installed. Install it with: pip install 'relora[{EXTRAS[package]}]'"
        ) from error
