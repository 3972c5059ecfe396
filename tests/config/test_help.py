"""The texts of --help: an overview on two screens, one section, or all."""

from __future__ import annotations

import pytest

from slime.config.flags.table import all_flags
from slime.config.help import ALL, format_help, sections
from slime.config.parse import UsageError, load_args

OWN = [spec.flag for spec in all_flags() if spec.source == "slime"]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        load_args(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_overview_names_every_flag_of_slime(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert set(OWN) <= set(text.split())
    assert "--sglang-mem-fraction-static" not in text
    assert len(text.splitlines()) <= 100 and max(map(len, text.splitlines())) <= 120
    assert [name for name in sections() if f"\n{name}: " not in text] == []
    assert shown(capsys, "--lr", "1", "-h") == text


def test_a_section_is_described_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--num-rollout", "3", "--help", "rollout", "--dry-run")
    [about] = [spec for spec in all_flags() if spec.flag == "--rollout-batch-size"]
    assert " ".join(about.help.split()) in " ".join(text.split())
    flags = {word for word in text.split() if word in OWN}
    assert {spec.flag for spec in sections()["rollout"]} <= flags and "--lr" not in flags
    assert text == shown(capsys, "--help=rollout")
    both = shown(capsys, "--help", "rollout", "router")
    assert text.strip() in both and "--router-policy" in both


def test_all_describes_every_flag_that_is_not_refused() -> None:
    words = set(format_help([ALL]).split())
    assert set(OWN) <= words
    assert {"--moe-router-topk", "--sglang-mem-fraction-static", "--router-policy"} <= words
    assert not {"--sglang-tp-size", "--sglang-port"} & words


def test_an_unknown_section_names_the_sections() -> None:
    with pytest.raises(UsageError) as error:
        load_args(["--help", "rolout"])
    assert "--help rolout: no section 'rolout'; the sections are cluster, checkpoint, rollout, " in str(error.value)
    assert "megatron-run, megatron, sglang, router, and all" in str(error.value)
