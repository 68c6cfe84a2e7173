"""House rules that can be counted: length of functions, annotations, docstrings, prints, machine paths, ASCII."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.context import ROOT

MAX_LINES = 60
MEDIAN_LINES = 15
CODE = sorted(path for folder in ("pipeline", "jobs", "dags") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [
    *CODE,
    *TESTS,
    *sorted((ROOT / "sql").rglob("*.sql")),
    *sorted((ROOT / "sql").rglob("*.json")),
    *sorted((ROOT / "pipeline").rglob("*.toml")),
    *sorted((ROOT / "pipeline" / "templates").glob("*")),
    *sorted((ROOT / "docker").rglob("*")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *[path for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt", "CHANGELOG.md", ".ci/run") if (path := ROOT / name).is_file()],
]
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Folders of one machine and places packages are fetched from; written so that this file does not contain what it looks for.
MACHINE = re.compile(r"(?<![\w.<>{}/])/(?:root|work|home|Users|mnt|tmp)/")
HOSTS = re.compile(
    r"(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|huggingface\.co|docker\.io|ghcr\.io|quay\.io|repo1?\.maven|--(?:extra-)?index-url|--find-links)\b"
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def trees(paths: list[Path]) -> Iterator[tuple[Path, ast.Module]]:
    for path in paths:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def functions(paths: list[Path]) -> Iterator[tuple[str, Function]]:
    """("file:name", node) of every function and method."""
    for path, tree in trees(paths):
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{relative(path)}:{node.name}", node


def length(node: Function) -> int:
    """Lines from `def` to the last statement, the docstring not counted."""
    documented = node.body[0] if ast.get_docstring(node) else None
    words = documented.end_lineno - documented.lineno + 1 if documented is not None else 0  # type: ignore[operator]
    return node.end_lineno - node.lineno + 1 - words  # type: ignore[operator]


def test_functions_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {name: length(node) for name, node in functions(CODE)}
    median, longest = statistics.median(lengths.values()), max(lengths, key=lengths.__getitem__)
    p90 = statistics.quantiles(lengths.values(), n=10)[8]
    with capsys.disabled():
        print(f"\nlines per function: n={len(lengths)} median={median:.0f} p90={p90:.0f} max={lengths[longest]} ({longest})")  # noqa: T201
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
    assert median <= MEDIAN_LINES


def test_every_function_is_annotated() -> None:
    bare = []
    for name, node in functions(CODE):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        untyped = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
        if untyped or (node.returns is None and node.name != "__init__"):
            bare.append(f"{name} {untyped}")
    assert not bare, "\n".join(bare)


def test_everything_public_is_documented_and_its_first_line_says_something() -> None:
    apology = re.compile(r"^(?:this (?:function|method|class|module)|helper|todo|fixme|see |utility)", re.IGNORECASE)
    wrong = []
    for path, tree in trees(CODE):
        for name, text in public(tree):
            first = (text or "").strip().partition("\n")[0]
            if not first or apology.match(first):
                wrong.append(f"{relative(path)}:{name}: {first!r}")
    assert not wrong, "\n".join(wrong)


def public(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of the module and of its public functions, classes and methods."""
    yield "module", ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                methods = (child for child in node.body if isinstance(child, Function) and not child.name.startswith("_"))
                yield from ((f"{node.name}.{child.name}", ast.get_docstring(child)) for child in methods)


def test_only_the_command_line_prints() -> None:
    printing = {
        f"{relative(path)}:{node.lineno}"
        for path, tree in trees(CODE)
        if relative(path) != "jobs/cli.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")
    }
    assert not printing, "\n".join(sorted(printing))


def test_nothing_is_evaluated_pickled_or_given_to_a_shell() -> None:
    banned = {"eval", "exec", "pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "os.system", "os.popen"}
    found = []
    for path, tree in trees(CODE):
        for node in ast.walk(tree):
            names = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            shell = isinstance(node, ast.Call) and any(
                word.arg == "shell" or (word.arg == "weights_only" and ast.unparse(word.value) == "False") for word in node.keywords
            )
            if shell or banned & set(names):
                found.append(f"{relative(path)}:{node.lineno}")
    assert not found, "\n".join(found)


def test_dag_files_are_short() -> None:
    assert {relative(path): lines for path in CODE if path.parent.name == "dags" and (lines := len(path.read_text().splitlines())) >= 60} == {}


@pytest.mark.parametrize("pattern", [MACHINE, HOSTS], ids=["machine paths", "package hosts"])
def test_no_file_knows_one_machine_or_one_registry(pattern: re.Pattern[str]) -> None:
    found = [
        f"{relative(path)}:{number}: {line.strip()[:120]}"
        for path in TEXTS
        if path.is_file() and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["open('/" + "tmp/x')", "cd /" + "work/main", 'path = "/' + 'home/me/data"'])
def test_the_search_for_machine_paths_finds_them(line: str) -> None:
    assert MACHINE.search(line)
    assert not MACHINE.search("file:///x https://a/b sql/raw/item pipeline/home/x")


def test_code_is_ascii() -> None:
    suffixes = {".py", ".sql", ".toml", ".json"}
    found = [
        f"{relative(path)}:{number}"
        for path in TEXTS
        if path.suffix in suffixes
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if not line.isascii()
    ]
    assert not found, "\n".join(found)


def test_no_test_file_hides_another() -> None:
    """Two functions of one name in a file: pytest would run only the last."""
    twice = []
    for path, tree in trees(TESTS):
        names = [node.name for node in tree.body if isinstance(node, Function)]
        twice += [f"{relative(path)}:{name}" for name in set(names) if names.count(name) > 1]
    assert not twice, "\n".join(twice)
