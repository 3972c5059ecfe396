"""Which SGLang is installed, and whether it has every flag that it will be given.

Path: the driver (where SGLang is installed there) and every engine's owner ask before anything is loaded. Invariant:
SGLang is never imported here, it is read: importing it takes half a minute and wants a GPU.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from slime.config.args import Args
from slime.config.flags.renamed import names_by_version
from slime.config.flags.table import all_flags

OLDEST, NEWEST = (0, 5, 16), (0, 5, 23)
"""Whose protocol, log lines and flags are known."""
REMEDY = "pip install 'slime[gpu]'"


def installed_version() -> str | None:
    """SGLang's version here; None: it is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_installed(args: Args) -> str:
    """The version of the SGLang that is installed here, which has every flag of this run.

    Raises:
        ValueError: none is installed, one that is not known, or one that lacks a flag; all such flags at once.
    """
    version = installed_version()
    spec = importlib.util.find_spec("sglang")
    if version is None or spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"--rollout-engine {args.rollout_engine}: SGLang is not installed here: {REMEDY}, or add "
            "--rollout-engine embedded, a slow engine for a CPU"
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not OLDEST <= numbers <= NEWEST:
        known = " to ".join(".".join(map(str, end)) for end in (OLDEST, NEWEST))
        raise ValueError(f"SGLang {version} is installed; versions {known} can be driven: {REMEDY}")
    known = known_spellings()
    problems = list(_unknown(args, version, known))
    if problems:
        raise ValueError("\n".join(problems))
    return version


def _unknown(args: Args, version: str, known: frozenset[str]) -> Iterable[str]:
    spellings = {spec.name: names_by_version(spec) for spec in all_flags() if spec.source == "sglang"}
    for name in args.sglang:
        ours = spellings[name]
        if known.isdisjoint(own_spelling(spelling) for spelling in ours):
            near = difflib.get_close_matches(own_spelling(ours[0]), known, n=1, cutoff=0.6)
            hint = f", the nearest is --sglang-{near[0].removeprefix('--')}" if near else ""
            yield f"{ours[0]}: SGLang {version}, which is installed, has no such flag{hint}; leave it out"


def own_spelling(spelling: str) -> str:
    """--sglang-tp-size -> --tp-size, as SGLang spells it."""
    return "--" + spelling.removeprefix("--sglang-")


def known_spellings() -> frozenset[str]:
    """Every flag of the SGLang that is installed here; none where none is installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    return installed_spellings(str(Path(next(iter(spec.submodule_search_locations))) / "srt"))


@cache
def installed_spellings(srt: str) -> frozenset[str]:
    """Every flag of the SGLang whose package sglang.srt is the directory `srt`, as it spells it."""
    root = Path(srt)
    files = [root / "server_args.py", *sorted((root / "arg_groups").rglob("*.py"))]
    return frozenset(word for file in files if file.is_file() for word in _spellings(ast.parse(file.read_bytes())))


def _spellings(module: ast.Module) -> Iterator[str]:
    """Flag names in `name: A[type, Arg(cli_name=..., aliases=[...])]`, and in add_argument("--name", ...)."""
    for node in ast.walk(module):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from _of_field(node.target.id, node.annotation)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield from (word for word in map(_text, node.args) if word is not None and word.startswith("--"))


def _of_field(name: str, annotation: ast.expr) -> Iterator[str]:
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return
    described = annotation.slice.elts[1] if isinstance(annotation.slice, ast.Tuple) else None
    words = {word.arg: word.value for word in described.keywords} if isinstance(described, ast.Call) else {}
    if "no_cli" in words:
        return
    spelled = _text(words["cli_name"]) if "cli_name" in words else None
    yield spelled or "--" + name.replace("_", "-")
    aliases = words.get("aliases")
    if isinstance(aliases, ast.List):
        yield from (word for word in map(_text, aliases.elts) if word is not None)


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
