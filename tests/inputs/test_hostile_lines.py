"""Hostile command lines end in a plan or in one message: some hundreds of those that `make test-inputs` draws."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.inputs.lines import HostileLines, outcome

LINES = 250
PATIENCE = 60.0
"""The time limit of one line in seconds; it is long, so that a busy machine does not look like a hang."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> HostileLines:
    return HostileLines(tmp_path_factory.mktemp("hostile"))


def test_the_line_before_the_changes_is_valid(lines: HostileLines) -> None:
    assert outcome(lines.base, PATIENCE).kind == "plan"


def test_hostile_lines_give_a_plan_or_message(lines: HostileLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lines.folder)
    ends = {seed: outcome(lines.line(seed), PATIENCE) for seed in range(LINES)}
    assert {seed: end for seed, end in ends.items() if not end.good} == {}
    assert {end.kind for end in ends.values()} == {"plan", "message"}


def leaves(words: list[str]) -> str:
    raise SystemExit("gone")


def waits(words: list[str]) -> str:
    time.sleep(60)
    return "late"


@pytest.mark.parametrize(
    ("say", "kind"),
    [
        (leaves, "exit"),
        (waits, "hang"),
        (lambda words: str(1 / 0), "traceback"),
        (lambda words: " ", "silence"),
        (lambda words: "a\x1b[31m", "unreadable"),
        (lambda words: "x" * 30_000, "long"),
    ],
)
def test_every_bad_end_is_noticed(lines: HostileLines, say: Callable[[list[str]], str], kind: str) -> None:
    assert outcome(lines.base, limit=0.2, say=say).kind == kind
