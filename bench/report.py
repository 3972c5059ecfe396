"""Put the tables of outputs/bench/*.json into docs/PERFORMANCE.md and docs/ALGORITHMS.md, each between its markers.

    python -m bench.report            (the last step of make bench)

- Where it sits: after the other modules, which have written the results.
- Invariant: the figures on a page come from files that a benchmark wrote, with the command, the versions and the
  machine of that run. Blocks whose benchmark was not run stay unchanged.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.common import OUTPUTS, ROOT, Goal, Table

PAGES = (ROOT / "docs" / "PERFORMANCE.md", ROOT / "docs" / "ALGORITHMS.md")
BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end measured -->)", re.DOTALL)


def render(result: dict[str, Any]) -> str:
    """Return the block of one benchmark."""
    facts = ", ".join(f"{name} {value}" for name, value in result["facts"].items())
    parts = [f"`{result['command']}`: {facts}."]
    parts += [Table(**table).markdown() for table in result["tables"]]
    goals = [Goal(**goal) for goal in result["goals"]]
    if goals:
        table = Table("Goals", ["ratio", "measured", "goal", ""])
        table.rows = [[g.what, f"{g.ratio:.2f}", f"{g.goal:g}", "met" if g.met else "missed"] for g in goals]
        parts.append(table.markdown())
    return "\n\n".join(parts)


def filled(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the page with the blocks of `results`; other blocks are unchanged."""

    def fill(match: re.Match[str]) -> str:
        result = results.get(match[2])
        return match[0] if result is None else f"{match[1]}\n{render(result)}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}


def main() -> None:
    results = read_results(OUTPUTS)
    if not results:
        sys.exit(f"{OUTPUTS} holds no results: run `make bench` first")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        known = {match[2] for match in BLOCK.finditer(text)}
        page.write_text(filled(text, results), encoding="utf-8")
        print(f"{page}: {', '.join(name for name in results if name in known)}")


if __name__ == "__main__":
    main()
