"""The rules that keep the tree as ARCHITECTURE.md draws it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.core.plugins import HOOKS, check_signature, hook_path, load

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slime"
FLOORS = {
    "core": 0,
    "algo": 0,
    "models": 1,
    "config": 2,
    "observability": 2,
    "sandbox": 2,
    "rollout": 3,
    "megatron": 3,
    "engine": 3,
    "plan": 3,
    "sync": 4,
    "cluster": 5,
    "simulate": 5,
    "cli": 6,
}
SIDEWAYS = {("rollout", "slime.engine.client"), ("rollout", "slime.engine.protocol")}
ONLY_IN = {
    "ray": {"cluster"},
    "megatron": {"megatron"},
    "aiohttp": {"engine", "rollout"},  # rollout: as a client, of a judge behind HTTP
    "fastapi": {"engine"},
    "uvicorn": {"engine"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def other_tests() -> list[Path]:
    """Return the files of the tests except this one, whose controls break the rules."""
    return sorted({*(ROOT / "tests").rglob("*.py")} - {Path(__file__)})


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module named in an import, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module


def floor_violations(folder: str, names: Iterator[str]) -> list[str]:
    """Return the imports of a module in `folder` that do not point down."""
    wrong = []
    for name in names:
        parts = name.split(".")
        if parts[0] != "slime" or len(parts) < 2 or parts[1] == folder or (folder, name) in SIDEWAYS:
            continue
        if FLOORS[parts[1]] >= FLOORS[folder]:
            wrong.append(f"{folder} imports {name}")
    return wrong


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        folder = path.relative_to(PACKAGE).parts[0]
        if folder in FLOORS:
            wrong += floor_violations(folder, imports(parsed(path)))
    assert wrong == []


def test_the_floor_check_notices() -> None:
    source = "import slime.cluster.cluster\nfrom slime.plan.fit import x\nfrom slime.core.sample import Sample\n"
    assert len(floor_violations("config", imports(ast.parse(source)))) == 2
    assert floor_violations("rollout", iter(["slime.engine.client"])) == []
    assert floor_violations("simulate", iter(["slime.plan.fit", "slime.rollout.collect"])) == []
    assert floor_violations("simulate", iter(["slime.cluster.cluster"])) != []
    assert floor_violations("rollout", iter(["slime.engine.launch"])) != []


def test_run_time_code_imports_no_rules() -> None:
    """Questions about arguments are properties of Args, or functions of `config.parse`."""
    wrong = []
    for path in modules():
        if path.relative_to(PACKAGE).parts[0] != "config":
            found = [name for name in imports(parsed(path)) if name.startswith("slime.config.rules")]
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in found]
    assert wrong == []


def test_heavy_packages_stay_in_their_folders() -> None:
    wrong = []
    for path in modules():
        folder = path.relative_to(PACKAGE).parts[0]
        for name in imports(parsed(path)):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is not None and folder not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_files_and_functions_are_short() -> None:
    wrong = []
    for path in modules():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name} has {size} lines")
    assert wrong == []


def test_every_module_has_a_docstring() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules()
        if path.name != "__init__.py" and not ast.get_docstring(parsed(path))
    ]
    assert wrong == []


RIDDLES = re.compile(r'^\s*r?"""(?:Of|The same|Those|Whose|What|Which|Who)\b|\b(?:beside|anew)\b', re.MULTILINE)
"""Beginnings of a docstring that make no sense alone in an editor's hover, and words that nobody in the field uses."""


def test_docstrings_are_plain_sentences() -> None:
    texts = [*modules(), *documents(), *other_tests()]
    assert [f"{path}: {found[0]}" for path in texts for found in RIDDLES.finditer(path.read_text())] == []
    assert RIDDLES.search('    """Of a router."""')  # control
    assert not RIDDLES.search('    """Return whether besides Ofelia someone is there."""')


LONG_NAME = re.compile(r"\bdef (test(?:_[a-z0-9]+){9,})\(")


def test_test_names_have_at_most_eight_words() -> None:
    assert [name for path in other_tests() for name in LONG_NAME.findall(path.read_text())] == []
    assert LONG_NAME.search("def test_one_two_three_four_five_six_seven_eight_nine(x: int)")  # control
    assert not LONG_NAME.search("def test_one_two_three_four_five_six_seven_eight(x: int)")


def unknown_in_reading_order(package: Path, docstring: str) -> list[str]:
    """Return the modules that the reading order of a package names and that are neither in it nor below it."""
    order = docstring.partition("Reading order:")[2].partition("\n\n")[0]
    modules_here = {path.parent.name if path.name == "__init__.py" else path.stem for path in package.rglob("*.py")}
    return sorted(set(re.findall(r"`([a-z_]+)`", order)) - modules_here)


def test_reading_orders_name_modules_that_exist() -> None:
    unknown = {}
    for path in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(parsed(path)) or ""
        unknown[str(path.relative_to(ROOT))] = unknown_in_reading_order(path.parent, docstring)
    assert {name: found for name, found in unknown.items() if found} == {}
    assert unknown_in_reading_order(PACKAGE / "sync", "Reading order: `open`, `told`.\n\n`x`") == ["told"]  # control


def test_arguments_are_read_by_name() -> None:
    pattern = re.compile(r"\b(getattr|setattr|hasattr)\(\s*(self\.)?_?args\b")
    assert [str(path) for path in modules() if pattern.search(path.read_text())] == []


def test_no_silent_except() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body)
    ]
    assert wrong == []


def test_the_lower_floors_import_light() -> None:
    code = (
        "import pkgutil, importlib, sys\n"
        "import slime.core, slime.algo, slime.config, slime.sandbox\n"
        "for package in (slime.core, slime.algo, slime.config, slime.sandbox):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print({'ray', 'megatron', 'sglang', 'transformers'} & {name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_the_lower_floors_are_typed_strictly() -> None:
    """Whole folders are strict, and no file in them weakens that."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    lower = {f"slime/{folder}" for folder, floor in FLOORS.items() if floor <= 1}
    assert lower <= set(settings["strict"])
    assert "slime" in settings["include"]
    softened = re.compile(r"#\s*pyright:(?!\s*(?:strict|ignore\[))|#\s*type:\s*ignore(?!\[)")
    assert softened.search("# pyright: basic") and softened.search("x = 1  # type: ignore")
    assert not softened.search("x = 1  # pyright: ignore[reportUnknownMemberType]")
    files = [path for path in modules() if f"slime/{path.relative_to(PACKAGE).parts[0]}" in lower]
    assert [str(path.relative_to(ROOT)) for path in files if softened.search(path.read_text())] == []


def documents() -> list[Path]:
    """Return the texts and scripts whose flags and paths have to be real."""
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/**/*.sh")]


DOTTED = re.compile(r"\bslime(?:\.[a-zA-Z_][a-zA-Z_0-9]*){2,}")


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_paths_import(path: Path) -> None:
    wrong: list[str] = []
    for dotted in sorted(set(DOTTED.findall(path.read_text()))):
        module = ROOT.joinpath(*dotted.split("."))
        if not module.with_suffix(".py").is_file() and not module.is_dir():
            try:
                load(dotted)
            except ValueError as error:
                wrong.append(f"{dotted}: {error}")
    assert wrong == []


HOOK_DEFAULTS = {name: hook_path(asdict(Args())[name]) for name in HOOKS}


@pytest.mark.parametrize("name", [name for name, default in HOOK_DEFAULTS.items() if default is not None])
def test_default_hooks_keep_their_contract(name: str) -> None:
    assert check_signature(HOOKS[name], load(HOOK_DEFAULTS[name])) is None


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_given_in_a_test(name: str) -> None:
    """A hook without a default has no contract except the calls that arrive in tests."""
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert [path for path in tests if re.search(rf"\b{name}\b", path.read_text())] != []


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_with_the_wrong_parameters_is_noticed(name: str) -> None:
    hook = HOOKS[name]

    class OneTooMany:
        def __init__(self, *, unknown: int) -> None: ...

    def one_too_many(*, unknown: int) -> None: ...

    assert check_signature(hook, OneTooMany if hook.is_class else one_too_many) is not None
