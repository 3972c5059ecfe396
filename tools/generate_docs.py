"""Fill the generated blocks of docs/: tables of flags and of hooks, made from their declarations.

    python tools/generate_docs.py

A page is written by hand, around blocks that this tool fills:

    <!-- generated: flags ClusterOptions -->     one section of slime's flags
    <!-- generated: passed sglang -->            the flags passed on to megatron, sglang or router
    <!-- generated: hook custom_rm_path -->      one hook, and the code of its example
    <!-- generated: pages flags -->              the pages of a folder (`.`: of docs/ itself), with their titles
    <!-- end -->

Run it again after a flag or a hook has changed. tests/test_docs.py compares, and requires a block for every new
section.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from slime.config.args import SECTIONS, Args
from slime.config.flags.table import SET_BY_SLIME, FlagSpec, all_flags
from slime.config.problem import show
from slime.config.rules.megatron_fields import (
    DECIDED,
    HARMLESS,
    HARMLESS_VALUES,
    JUDGED_ELSEWHERE,
    OFFLOAD_OF_MEGATRON,
)
from slime.config.rules.not_built import NOT_BUILT, NOT_BUILT_MEGATRON
from slime.core.plugins import HOOKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _takes(spec: FlagSpec) -> str:
    """Return what follows the flag on the command line."""
    if spec.kind == "bool":
        return "switch"
    what = " ".join(f"`{choice}`" for choice in spec.choices) or _cell(spec.metavar or spec.kind)
    if not spec.choices and spec.bounds:
        what += "".join(f", {limit}" for limit in spec.limits)
    several = spec.num_values is not None and spec.num_values[0] != spec.num_values[1]
    return f"{what} ..." if several else what


def _default(spec: FlagSpec) -> str:
    if spec.kind == "bool" and not (spec.optional and spec.default is None):
        return "on" if spec.default else "off"
    return "" if spec.default in (None, (), []) else f"`{show(spec.default)}`"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _spellings(spec: FlagSpec) -> str:
    own = f"`{spec.flag}`" if spec.on else ""
    off = [name for name in spec.off if name != "--no-" + spec.flag.removeprefix("--")]
    return " ".join([own, *(f"`{name}`" for name in [*spec.on[1:], *off])]).strip()


def flags_block(section: str) -> str:
    """Return the table of one section of slime's own flags."""
    names = {cls.__name__: cls for cls in SECTIONS}
    fields = set(names[section].__dataclass_fields__)
    rows: list[list[str]] = []
    for spec in all_flags():
        if spec.source == "slime" and spec.name in fields:
            text = _cell(spec.help)
            if spec.name in NOT_BUILT:
                text += f" *Not part of this version: {NOT_BUILT[spec.name][1]}.*"
            rows.append([_spellings(spec), _takes(spec), _default(spec), text])
    return _table(("flag", "takes", "default", "meaning"), rows)


def _passed_on(spec: FlagSpec) -> str:
    """Return whether another program's flag may be given here."""
    reason = SET_BY_SLIME.get((spec.source, spec.name))
    if reason is not None:
        return f"refused: {_cell(reason)}"
    if spec.source != "megatron":
        return "passed on"
    if spec.name in DECIDED:
        return f"slime sets it to `{show(DECIDED[spec.name]) or DECIDED[spec.name]}`"
    if spec.name in NOT_BUILT_MEGATRON:
        return f"not part of this version: {_cell(NOT_BUILT_MEGATRON[spec.name])}"
    if spec.name.startswith(("moe_", "overlap_moe_")):
        return "for mixtures of experts; what MODEL_ARGS need, or refused"
    if spec.name.startswith(JUDGED_ELSEWHERE):
        return "TransformerEngine's: without effect on Megatron's local layers, or refused"
    if spec.name in OFFLOAD_OF_MEGATRON:
        return "without effect: `--optimizer-cpu-offload` moves all of the state"
    if spec.name in HARMLESS:
        return "passed on"
    if spec.name in HARMLESS_VALUES:
        return f"its default, or `{HARMLESS_VALUES[spec.name]}`"
    return "its default alone"


def passed_block(source: str) -> str:
    """Return the table of the flags that are passed on to another program by name."""
    rows = [
        [_spellings(spec), _takes(spec), _default(spec), _passed_on(spec), _cell(spec.help)]
        for spec in all_flags()
        if spec.source == source
    ]
    return _table(("flag", "takes", "default", "here", "meaning, in its own words"), rows)


def hook_block(name: str) -> str:
    """Return signature, result and time of one hook, then the code of its example without imports."""
    hook = HOOKS[name]
    file, code = _example(hook.example)
    kind = "class" if hook.is_class else "function, plain or async" if hook.may_be_async else "function"
    default = vars(Args())[name]
    facts = [
        ("what", kind),
        ("called as", f"`({', '.join(hook.parameters)})`"),
        ("with --group-rm", f"`({', '.join(hook.group_parameters)})`" if hook.group_parameters else ""),
        ("returns", _cell(hook.returns)),
        ("when", _cell(hook.called)),
        ("must have", ", ".join(f"`{member}`" for member in hook.members)),
        ("default", f"`{default}`" if default else "none"),
        ("example", f"[`{hook.example}`](../{file})"),
    ]
    table = _table(("", ""), ([name, text] for name, text in facts if text))
    return f"{table}\n```python\n{code}\n```\n"


def _example(path: str) -> tuple[str, str]:
    """Return file and source of the function or class at a dotted path; the file is parsed, not imported."""
    module, _, name = path.rpartition(".")
    file = module.replace(".", "/") + ".py"
    text = (DOCS.parent / file).read_text(encoding="utf-8")
    nodes = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    [code] = [ast.get_source_segment(text, node) for node in nodes if node.name == name]
    assert code is not None, "the node was parsed from this text"
    return file, code


def pages_block(folder: str) -> str:
    """Return links to the pages of a folder, with their titles."""
    rows: list[list[str]] = []
    for path in sorted((DOCS / folder).glob("*.md")):
        if path.name != "README.md":
            title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            rows.append([f"[{path.stem}]({path.relative_to(DOCS).as_posix()})", _cell(title)])
    return _table(("page", "what it has"), rows)


BLOCKS = {"flags": flags_block, "passed": passed_block, "hook": hook_block, "pages": pages_block}


def wanted_blocks() -> Iterable[str]:
    """Yield every block that some page must contain."""
    yield from (f"flags {section.__name__}" for section in SECTIONS)
    yield from (f"passed {source}" for source in ("megatron", "sglang", "router"))
    yield from (f"hook {name}" for name in HOOKS)
    yield from ("pages .", "pages flags")


def filled(text: str) -> str:
    """Return a page's text with its blocks generated again.

    Raises:
        ValueError: a block has an unknown name.
    """

    def fill(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(" ")
        if match[2] not in set(wanted_blocks()):
            raise ValueError(f"<!-- generated: {match[2]} -->: there is no such block; {__file__} lists them")
        return f"{match[1]}\n{BLOCKS[kind](name)}\n{match[3]}"

    return BLOCK.sub(fill, text)


def pages() -> Mapping[Path, str]:
    """Return every page of docs/ as it is now."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def main() -> None:
    for path, text in pages().items():
        new = filled(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: updated")


if __name__ == "__main__":
    main()
