"""Import user code by its path: `package.module.name`, or `path/to/file.py:name`.

- Used by: `plugins` loads hooks, trackers and transports with `load`, in every process of a run.
- Invariant: the same path gives the same module in every process: the current folder and PYTHONPATH are searched, and
  what is installed goes before the current folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from slime.core.printable import printable

MAX_PATH = 1000
"""Characters of a path."""
_OF_SLIME = str(Path(__file__).parents[1]) + os.sep
FORMS = "package.module.name, or path/to/file.py:name"


def split_path(path: str) -> tuple[str, str]:
    """Return module (or file) and name of a path: `a.b.f` is `a.b` and `f`, `a/b.py:f` is `a/b.py` and `f`."""
    separator = ":" if is_file_path(path) else "."
    module, _, name = path.rpartition(separator)
    return module, name


def is_file_path(path: str) -> bool:
    """Return whether a path names a file instead of a module: `file.py:name`, or `file.py` without a name."""
    return path.rpartition(":")[0].endswith(".py") or path.endswith(".py") or os.sep in path


def load(path: str) -> Any:
    """Return the object at a path, `package.module.name` or `path/to/file.py:name`.

    Raises:
        ValueError: the path has neither form, the module or file does not exist (the text names the folders that were
            searched), or the name is not in it. Whatever the module raises while it is imported, even SystemExit, is
            the cause of the ValueError.
    """
    module_name, name = split_path(path)
    search_current_folder()
    if len(path) > MAX_PATH:
        raise ValueError(f"not a path: it has more than {MAX_PATH} characters")
    if is_file_path(path):
        if not module_name.endswith(".py") or not name.isidentifier():
            raise ValueError("names no function of a file: write path/to/file.py:name")
        module, what = _module_of_file(find_file(module_name)), module_name
    else:
        if not module_name or not all(part.isidentifier() for part in path.split(".")):
            raise ValueError(f"not a dotted path: it must be {FORMS}")
        module, what = _imported(module_name, module_name), f"module {module_name}"
    try:
        return getattr(module, name)
    except Exception as error:
        raise ValueError(f"{what} has no {name!r}") from error


def search_current_folder() -> None:
    """Let imports find modules in the current folder, after everything else that they find."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


@cache
def _installed() -> frozenset[str]:
    """Return the folders of Python's own modules and of installed packages."""
    own = {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return frozenset([*own, *site.getsitepackages(), site.getusersitepackages(), "<frozen ", "<string>"])


def own_folders() -> list[str]:
    """Return the folders that are searched for a user's modules: sys.path without Python's own and installed ones."""
    folders = [os.path.abspath(entry) for entry in sys.path if not entry.endswith(".zip")]
    return [
        folder
        for folder in dict.fromkeys(folders)
        if not any(folder == own or folder.startswith(f"{own}{os.sep}") for own in _installed())
    ]


def find_file(file: str) -> Path:
    """Return the file at an absolute path, or at a relative one in the current folder or a folder of sys.path.

    Raises:
        ValueError: there is none; the text names the folders that were searched.
    """
    expanded = Path(file).expanduser()
    folders = [Path()] if expanded.is_absolute() else [Path.cwd(), *map(Path, own_folders())]
    for folder in folders:
        if (folder / expanded).is_file():
            return (folder / expanded).resolve()
    raise ValueError(f"there is no file {printable(file)}" + ("" if expanded.is_absolute() else _searched()))


def _searched() -> str:
    return f" (searched in {', '.join(own_folders())})"


def _module_of_file(file: Path) -> ModuleType:
    """Import a file under the name that an import from its folder has, so that there is one module of it.

    That name is taken if another module has it already; then the file is a module of its own.
    """
    root, names = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.append(str(root))
    name = ".".join(names)
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(file) and known.__name__ != "__main__":
            return known
    try:
        spec = importlib.util.find_spec(name) if all(part.isidentifier() for part in names) else None
    except Exception:  # noqa: BLE001 (another module has the name of its package)
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file:
        return _imported(name, str(file))
    return _imported_alone(file)


def _imported_alone(file: Path) -> ModuleType:
    """Import a file under a name that no other file has."""
    name = "slime_user_code_" + "".join(part if part.isalnum() else "_" for part in str(file))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit, GeneratorExit) as error:
        del sys.modules[name]
        raise ValueError(_failure(str(file), error)) from error
    return module


def _imported(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit, GeneratorExit) as error:
        is_own = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        raise ValueError(_failure(what, error) + (_searched() if is_own else "")) from error


def _failure(what: str, error: BaseException) -> str:
    text = f"importing {what} failed: {type(error).__name__}: {error}"
    place = place_of(error)
    return text if place is None else f"{text} ({place})"


def place_of(error: BaseException) -> str | None:
    """Return where an error was raised, `file.py:12 in name`: the innermost line of user code, if there is any.

    Lines of slime, of Python and of installed packages count only if there are no others; slime's never do.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OF_SLIME)]
    theirs = [frame for frame in frames if not frame.filename.startswith(tuple(_installed()))]
    for frame in reversed(theirs or frames):
        return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return None


def described(error: BaseException, limit: int = 1000) -> str:
    """Return type and text of an error, also of one whose text cannot be made; at most `limit` characters."""
    try:
        text = str(error)
    except Exception as another:  # noqa: BLE001 (a user's exception may not even have a text)
        text = f"(its text raised a {type(another).__name__})"
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"
