"""The rules of docs/architecture.md as tests: which package imports which, and where Ray and Triton may be used."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "cluster": set(),
    "serving": {"kernels", "cluster"},
    "readapt": {"kernels", "cluster"},
    "demo": {"kernels", "cluster", "serving", "readapt"},
    "bench": {"kernels", "cluster", "serving", "readapt", "demo"},
    "cli": {"cluster", "serving", "readapt"},
}
FOLDERS = {  # from the top down: a folder imports only itself and folders below it
    "cluster": ["adapters", "registry", "config", "storage"],
    "serving": ["http", "gateway", "chat", "remote", "engine", "model", "adapters", "memory"],
    "readapt": ["campaign", "ladder", "continual", "extraction", "fusion", "training", "lowrank"],
}
TOP = ["upgrade.py", "relora.py"]  # these compose the packages: relora.py may import upgrade.py and every package
PACKAGES = set(MAY_IMPORT) | {"relora", "upgrade", "tests"}
SOURCES = [
    *sorted(path for package in MAY_IMPORT for path in (ROOT / package).glob("**/*.py")),
    *(ROOT / name for name in TOP),
]

DOCS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            roots.add((node.module or "").split(".")[0])
    return roots


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != ROOT], ids=name_of)
def test_a_package_imports_only_the_packages_below_it(path: Path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = (imported_roots(path) & PACKAGES) - MAY_IMPORT[package] - {package}
    assert not forbidden, f"{name_of(path)} imports {sorted(forbidden)}"


def test_upgrade_imports_neither_the_command_line_nor_demo_and_bench():
    assert not imported_roots(ROOT / "upgrade.py") & {"relora", "tests", "bench", "demo"}


def test_every_module_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py")) == sorted(name[:-3] for name in TOP)


def imported_modules(path: Path) -> set[str]:
    """Return our modules that a file imports, at module level or inside a function."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    names = {name for node in nodes for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))}
    return {name for name in names if name in MODULES}


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
IN_FOLDERS = [path for path in SOURCES if path.relative_to(ROOT).parts[:-1] and len(path.relative_to(ROOT).parts) > 2]


@pytest.mark.parametrize("path", [p for p in IN_FOLDERS if p.relative_to(ROOT).parts[0] in FOLDERS], ids=name_of)
def test_a_folder_imports_only_the_folders_below_it(path: Path):
    package, folder, *_ = path.relative_to(ROOT).parts
    above = FOLDERS[package][: FOLDERS[package].index(folder)]
    upward = [m for m in imported_modules(path) if m.split(".")[0] == package and m.split(".")[1] in (*above, "on_ray")]
    assert not upward, f"{name_of(path)} imports {sorted(upward)}"


def test_no_modules_import_each_other_in_a_circle():
    """Not even with an import inside a function: if two modules need each other, merge them or split off a third."""
    left = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    while left:
        leaves = [name for name, imported in left.items() if not imported & left.keys()]
        assert leaves, f"import cycle among: {sorted(left)}"
        left = {name: imported for name, imported in left.items() if name not in leaves}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ray_is_a_thin_shell(path: Path):
    is_shell = path.name == "on_ray.py"
    assert is_shell or "ray" not in imported_roots(path), f"{name_of(path)} imports ray; only on_ray.py may"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_triton_stays_in_the_kernels(path: Path):
    is_home = name_of(path).startswith("kernels/") and path.name.startswith("triton_")
    assert is_home or "triton" not in imported_roots(path), f"{name_of(path)} imports triton"


MUTATORS = {
    *("add", "append", "appendleft", "clear", "close", "discard", "extend", "get_nowait", "insert", "next", "pop"),
    *("popitem", "popleft", "put", "put_nowait", "remove", "reverse", "send", "setdefault", "sort", "throw", "update"),
    *("unlink", "write", "heappop", "heappush", "insort"),
}


def has_side_effect(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        return name in MUTATORS
    return isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom)


def asserts_with_side_effects(source: str) -> list[str]:
    asserts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [ast.unparse(node) for node in asserts if any(map(has_side_effect, ast.walk(node)))]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_asserts_have_no_side_effects(path: Path):
    """`python -O` drops asserts together with everything in them."""
    assert not asserts_with_side_effects(path.read_text())


@pytest.mark.parametrize("expression", ["queue.pop() is x", "(y := x)", "await x", "not next(x)", "heappop(x) == 1"])
def test_a_side_effect_in_an_assert_is_found(expression: str):
    source = "async def f():\n    assert {}"
    assert asserts_with_side_effects(source.format(expression))
    assert not asserts_with_side_effects(source.format("sum(len(x) for x in y) == x.get(0)"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long(path: Path):
    """A file longer than this should be split. relora.py is a flat list of commands and their options."""
    limit = 420 if path.name == "relora.py" else 320
    assert len(path.read_text().splitlines()) <= limit, f"{name_of(path)} is too long"


def function_lines(path: Path) -> dict[str, int]:
    """Return the length of each function, docstring included."""
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_too_long(path: Path):
    long = {name: lines for name, lines in function_lines(path).items() if lines > 70}
    assert not long, f"{name_of(path)}: {long}"


def test_most_functions_are_short():
    """In the four packages of the product: half have at most 6 lines, nine of ten at most 16."""
    core = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("kernels", "cluster", "serving", "readapt")]
    lines = sorted(n for path in core for n in function_lines(path).values())
    assert statistics.median(lines) <= 6
    assert lines[int(0.9 * len(lines))] <= 16


def test_every_error_is_in_the_tree_of_the_docstring():
    from cluster import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ReloraError)]
    missing = [c.__name__ for c in classes if c.__name__ not in (errors.__doc__ or "")]
    assert len(classes) > 5
    assert not missing, f"missing in the docstring of cluster/errors.py: {missing}"


def test_errors_can_be_pickled():
    import pickle

    from cluster import errors

    for error in (errors.OverloadedError("full", retry_after_s=2.5), errors.ConfigError("bad key")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_the_command_line_is_what_the_docs_promise():
    """Frozen: a changed command changes the docs and this list with it."""
    from relora import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    work = {"assess", "continual", "demo", "extract", "register", "rollout", "serve", "upgrade"}
    look = {"export", "list", "show", "status"}
    steer = {"pause", "promote", "resume", "retry", "rollback", "unregister"}
    assert names == work | look | steer | {"doctor", "gc", "migrate"}
    docs = "\n".join(path.read_text() for path in DOCS)
    undocumented = [name for name in names if f"relora {name}" not in docs and f"make {name}" not in docs]
    assert not undocumented, f"neither README.md nor docs/ mention: {undocumented}"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_docs_wrap_at_120_columns(path: Path):
    """Tables, links and diagrams may be longer."""
    lines = enumerate(path.read_text().splitlines(), start=1)
    long = [number for number, line in lines if len(line) > 120 and not line.lstrip().startswith(("|", "[", "!", "E["))]
    assert not long, f"{name_of(path)}: lines {long}"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_in_docs_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not broken, f"{name_of(path)} links to {broken}"


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [path.parent for package in MAY_IMPORT for path in (ROOT / package).glob("**/__init__.py")]
    assert sorted(listed) == sorted(name_of(folder).replace("/", ".") for folder in found)


def module_level_imports(path: Path) -> set[str]:
    """Return the packages that a file imports at module level; imports for type checks do not count."""
    nodes = ast.parse(path.read_text()).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "demo"], ids=name_of)
def test_optional_packages_are_imported_only_where_they_are_used(path: Path):
    from cluster.extras import EXTRAS

    optional = module_level_imports(path) & set(EXTRAS)
    is_rival = path.relative_to(ROOT).parts[0] == "bench" and optional == {"peft"}
    is_rival |= path.is_relative_to(ROOT / "bench/clients/suites")  # each suite runs in its own process
    assert is_rival or not optional, (
        f"{name_of(path)} imports {sorted(optional)} at module level; import it where it is used"
    )


def test_every_optional_package_is_in_its_extra_and_nowhere_in_the_core():
    from cluster.extras import EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(line.startswith(f"{package}>") for line in extras[extra]), f"{package} is not in {extra}"
        assert not any(line.startswith(package) for line in project["dependencies"])


def test_importing_the_command_line_needs_no_optional_package():
    from cluster.extras import EXTRAS

    code = f"import sys, relora; print([name for name in {sorted(EXTRAS)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_license_is_the_one_that_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_importing_a_package_is_light():
    """`kernels` has the name of an optional package of transformers, which would break if it imported much."""
    heavy = "('torch', 'transformers', 'ray')"
    code = f"import sys, kernels, cluster, serving, readapt; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
