"""The table of private names: the installed packages have them all, and slime uses no others."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch

from slime.config.megatron_version import SUPPORTED_MEGATRON
from slime.megatron.compat import apply
from slime.megatron.compat.apply import install, require_all
from slime.megatron.compat.names import Names
from slime.megatron.compat.patches import TABLE

ROOT = Path(__file__).parent.parent.parent
PLACES = [ROOT / "slime/megatron", ROOT / "slime/sync", ROOT / "slime/engine/weight_group.py"]
CHECKED = [row for row in TABLE if row.how != "elsewhere"]


def test_the_installed_packages_have_every_name() -> None:
    require_all()
    rows = [row for row in TABLE if row.how == "has" and (torch.cuda.is_available() or not row.cuda_only)]
    named = [(resolve_name(row.target), name) for row in rows for name in row.names]
    assert named and [(owner, name) for owner, name in named if not hasattr(owner, name)] == []


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: f"{row.target}:{row.names[0]}")
def test_a_renamed_name_fails_at_the_start(row: Names) -> None:
    if row.cuda_only and not torch.cuda.is_available():
        pytest.skip("the name is required with CUDA only")
    renamed = replace(row, names=("_renamed_upstream",))
    with pytest.raises(RuntimeError, match=f"has no '_renamed_upstream'.*megatron-core {SUPPORTED_MEGATRON}"):
        require_all((renamed,))
    package, _, last = row.target.rpartition(".")
    moved = replace(row, target=f"{package}.{last}_moved" if package else "torch.moved")
    with pytest.raises(RuntimeError, match="moved"):
        require_all((moved,))


def test_a_name_removed_from_megatron_stops_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import GPTModel

    monkeypatch.delattr(GPTModel, "_postprocess")
    with pytest.raises(RuntimeError, match="GPTModel has no '_postprocess'"):
        install()


def test_nothing_outside_the_table_is_replaced() -> None:
    with pytest.raises(RuntimeError, match=r"torch.cuda has no '_gone'"):
        apply.replace("torch.cuda", "_gone", None)
    with pytest.raises(ValueError, match="not enough values"):
        apply.replace("torch.cuda", "is_available", None)
    with pytest.raises(AssertionError, match="not in the table"):
        apply.change_class(torch.optim.SGD([torch.zeros(1)]), torch.optim.Adam)
    with pytest.raises(AssertionError, match="not in the table"):
        apply.replace_on(torch.optim.AdamW([torch.zeros(1)]), "step", None)
    with pytest.raises(RuntimeError, match="AdamW has no '_gone'"):
        apply.replace_on(torch.optim.AdamW([torch.zeros(1)]), "_gone", None)


def test_each_place_uses_its_names() -> None:
    for row in TABLE:
        spec = importlib.util.find_spec(row.where)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text()
        assert row.why and row.names
        assert [name for name in row.names if name not in source and name != "__class__"] == [], row.where


def private_names(tree: ast.AST) -> set[str]:
    """Return private names of other packages' objects that a module reads, sets or imports."""
    found: set[str] = set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("slime"):
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if mine else {node.attr}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def swaps(tree: ast.AST) -> list[int]:
    """Return the lines that set a class, a special method or an attribute by name, without the table."""
    wrong: list[int] = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr in ("__class__", "__init__")
        ):
            wrong.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            wrong.append(node.lineno)
    return wrong


def test_the_table_has_every_private_name_used() -> None:
    known = {name for row in TABLE for name in row.names} | {"_C"}  # torch._C is a target
    for place in PLACES:
        for path in [place] if place.suffix else sorted(place.rglob("*.py")):
            tree = ast.parse(path.read_text())
            assert private_names(tree) - known == set(), path
            if path.name != "apply.py":
                assert swaps(tree) == [], path


def test_a_private_name_outside_the_table_is_noticed() -> None:
    source = "from torch.x import _hidden\npart._copy = None\nself._own = 1\npart.__class__ = A\nsetattr(a, 'b', 1)\n"
    assert private_names(ast.parse(source)) == {"_hidden", "_copy"}
    assert len(swaps(ast.parse(source))) == 2


def test_a_replaced_module_is_read_from_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.jit", ModuleType("megatron.core.jit"))
    [row] = [row for row in TABLE if row.target == "megatron.core.jit"]
    assert not any(hasattr(sys.modules[row.target], name) for name in row.names)
    require_all((row,))
