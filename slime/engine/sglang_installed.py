"""Find out which SGLang is installed, and whether it has every flag that it will get.

- Called by: the driver (if SGLang is installed there) and every engine's owner, before anything is loaded.
- Invariant: SGLang's files are read, never imported: an import takes half a minute and needs a GPU.
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
"""The oldest and the newest version whose protocol, log lines and flags are known."""
REMEDY = "pip install 'slime[gpu]'"


def installed_version() -> str | None:
    """Return the version of SGLang on this machine, or None if it is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_installed(args: Args) -> str:
    """Return the version of the SGLang that is installed here, after checking that it has every flag of this run.

    Raises:
        ValueError: none is installed, an unknown version, or one that lacks flags; the error lists all such flags.
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
    """Convert --sglang-tp-size to --tp-size, as SGLang spells it."""
    return "--" + spelling.removeprefix("--sglang-")


def known_spellings() -> frozenset[str]:
    """Return every flag of the SGLang that is installed here; empty if none is."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    return installed_spellings(str(Path(next(iter(spec.submodule_search_locations))) / "srt"))


@cache
def installed_spellings(srt: str) -> frozenset[str]:
    """Return every flag of the SGLang whose package sglang.srt is the directory `srt`, in its own spelling."""
    root = Path(srt)
    files = [root / "server_args.py", *sorted((root / "arg_groups").rglob("*.py"))]
    return frozenset(word for file in files if file.is_file() for word in _spellings(ast.parse(file.read_bytes())))


def _spellings(module: ast.Module) -> Iterator[str]:
    """Find flag names in `name: A[type, Arg(cli_name=..., aliases=[...])]` and in add_argument("--name", ...)."""
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
