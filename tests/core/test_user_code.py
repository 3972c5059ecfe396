"""User code by its path: modules, files, the current folder, and errors that name what was searched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.core.user_code import is_file_path, load, place_of, split_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make an empty folder the current one, and forget afterwards what was imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("float", "not a dotted path: it must be package.module.name, or path/to/file.py:name"),
        ("examples.hooks.2", "not a dotted path"),
        ("a." + "b" * 1000, "it has more than 1000 characters"),
        ("examples.none.x", "importing examples.none failed: ModuleNotFoundError"),
        ("examples.hooks.training.none", "module examples.hooks.training has no 'none'"),
        ("none/here.py:f", r"there is no file none/here\.py \(searched in "),
        ("/none/here.py:f", r"there is no file /none/here\.py$"),
        ("here.py", "names no function of a file: write path/to/file.py:name"),
        ("here.py:", "names no function of a file"),
        ("here.py:a.b", "names no function of a file"),
    ],
)
def test_paths_that_cannot_be_loaded(folder: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path)


def test_the_parts_of_a_path() -> None:
    assert split_path("a.b.f") == ("a.b", "f")
    assert split_path("a/b.py:f") == ("a/b.py", "f")
    assert is_file_path("b.py") and not is_file_path("a.b.py_f")


def test_files_and_modules_of_the_current_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "own_user_code.py").write_text("import near_user_code\ndef f(): return near_user_code.NUMBER\n")
    (folder / "near_user_code.py").write_text("NUMBER = 5\n")
    (folder / "sub" / "below_user_code.py").write_text("def f(): return 7\n")
    assert load("own_user_code.f")() == 5
    assert load("own_user_code.py:f") is load("own_user_code.f"), "one module, whatever the path"
    assert load(f"{folder}/own_user_code.py:f") is load("own_user_code.f")
    assert load("sub.below_user_code.f")() == 7
    assert load("sub/below_user_code.py:f") is load("sub.below_user_code.f")


def test_a_file_may_have_any_name(folder: Path) -> None:
    """Installed modules go first; a file that is named is the one that is loaded."""
    (folder / "json.py").write_text("def f(): return 1\n")
    (folder / "my-reward.v2.py").write_text("def f(): return 2\n")
    (folder / "other").mkdir()
    (folder / "other" / "json.py").write_text("def f(): return 3\n")
    assert [load(path)() for path in ("json.py:f", "my-reward.v2.py:f", "other/json.py:f")] == [1, 2, 3]
    assert load("json.dumps")({}) == "{}", "control: the installed module is still itself"


def test_a_file_of_a_package_imports_its_neighbours(folder: Path) -> None:
    package = folder / "deep" / "pack_user_code"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "values.py").write_text("NUMBER = 9\n")
    (package / "hooks.py").write_text("from .values import NUMBER\ndef f(): return NUMBER\n")
    assert load("deep/pack_user_code/hooks.py:f")() == 9


def test_a_missing_module_names_searched_folders(folder: Path) -> None:
    with pytest.raises(ValueError, match="No module named 'gone_user_code'") as missing:
        load("gone_user_code.f")
    assert str(folder) in str(missing.value)
    assert "site-packages" not in str(missing.value)
    (folder / "needs_user_code.py").write_text("import gone_user_code\ndef f(): ...\n")
    with pytest.raises(ValueError, match=r"No module named 'gone_user_code' \(.*needs_user_code.py:1 in <module>\)$"):
        load("needs_user_code.f")


def test_errors_name_their_place(folder: Path) -> None:
    (folder / "broken_user_code.py").write_text("def g():\n    return {}['unit']\n\ndef f():\n    return g()\n")
    with pytest.raises(KeyError) as raised:
        load("broken_user_code.py:f")()
    assert place_of(raised.value) == f"{folder}/broken_user_code.py:2 in g"
