"""Replays: a dump that was not sampled as training assumes is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from config_run import Run, write_tokenizer

from slime.config.args import SFT_ROLLOUT
from slime.config.sampling_record import read_record
from slime.core.sample import Sample
from slime.rollout.dump import read_replay, write_dump
from slime.rollout.generate import sampling_record

GROUP = [Sample(index=i, tokens=[1, 2], prompt_length=1, response_length=1, reward=float(i)) for i in range(2)]


def dumped(run: Run, *more: str, count: int = 2) -> list[str]:
    """Write the dumps of a run that generates with these flags, and return the words that replay them."""
    args = run.args("--debug-rollout-only", *more)
    for number in range(count):
        write_dump(run.directory / f"{number}.jsonl", [GROUP], sampling_record(args))
    return ["--debug-train-only", "--load-debug-rollout-data", str(run.directory / "{rollout_id}.jsonl")]


def warnings(run: Run, *words: str) -> list[str]:
    """Return the warnings about the dump."""
    return [text for text in run.warnings(*words) if text.startswith("--load-debug-rollout-data")]


def test_a_dump_records_its_sampling(run: Run) -> None:
    words = dumped(run, "--rollout-temperature", "0.7")
    assert warnings(run, *words, "--rollout-temperature", "0.7") == []
    record = read_record(run.directory / "0.jsonl")
    assert record is not None and record.vocab_size == 128 and record.tokenizer is not None
    assert record.sampling == {"temperature": 0.7, "top_p": 1.0, "top_k": -1.0, "min_p": 0.0}
    args = run.args(*words, "--rollout-temperature", "0.7")
    assert read_replay(args, 1) == ([GROUP], record)


@pytest.mark.parametrize(
    ("dumping", "replaying", "expected"),
    [
        ("--rollout-top-p 0.9", "", ["top-p 0.9 (dump"]),
        ("--rollout-top-k 20", "", ["top-k 20 (dump"]),
        ("--rollout-temperature 0.7", "", ["at temperature 0.7, but --rollout-temperature is 1 (give"]),
        ("--rollout-top-p 0.9", "--rollout-top-p 0.9", ["top-p 0.9 (dump"]),
        (
            "--rollout-top-p 0.9 --rollout-top-k 5 --rollout-temperature 0.7",
            "--rollout-temperature 0.8",
            ["top-p 0.9", "top-k 5", "at temperature 0.7, but --rollout-temperature is 0.8"],
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_another_distribution_is_refused(
    run: Run, dumping: str, replaying: str, expected: list[str], dry: list[str]
) -> None:
    """One message names the first file; a file that appears later is checked when it is loaded."""
    words = [*dumped(run, *dumping.split()), *replaying.split()]
    error = run.error(*words, *dry)
    assert error.startswith(f"--load-debug-rollout-data {run.directory}/{{rollout_id}}.jsonl: ")
    assert f"{run.directory}/0.jsonl and 1 more: it was sampled" in error
    assert [text for text in expected if text not in error] == []
    assert run.errors(*words, "--loss-type", "sft_loss") == []
    late = replace(run.args("--debug-rollout-only"), debug_rollout_only=False, load_debug_rollout_data=words[2])
    with pytest.raises(ValueError, match="was sampled"):
        read_replay(late if not replaying else replace(late, rollout_temperature=0.8), 0)


def test_another_tokenizer_is_refused_with_all_else(run: Run) -> None:
    words = dumped(run, "--rollout-top-p", "0.9")
    other = run.directory / "other"
    other.mkdir()
    (other / "config.json").write_text((run.hf / "config.json").read_text())
    write_tokenizer(other, largest_id=90)
    again = [*words, "--hf-checkpoint", str(other)]
    error = run.error(*again)
    assert "top-p 0.9" in error and f"another tokenizer than that of --hf-checkpoint {other}" in error
    assert "another tokenizer" in run.error(*again, "--loss-type", "sft_loss")
    same = run.directory / "same"
    same.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (same / name).write_text((run.hf / name).read_text())
    (same / "tokenizer.json").write_text(
        "\n" + (run.hf / "tokenizer.json").read_text()
    )  # another file, the same tokens
    assert "another tokenizer" not in run.error(*words, "--hf-checkpoint", str(same))


def test_an_unchecked_dump_gives_a_warning(run: Run) -> None:
    words = dumped(run)
    write_dump(run.directory / "0.jsonl", [GROUP])  # as older versions wrote it
    [warning] = warnings(run, *words)
    assert f"{run.directory}/0.jsonl does not record its sampling" in warning
    assert read_replay(run.args(*words), 0) == ([GROUP], None)
    assert warnings(run, *dumped(run)) == []  # control: here all dumps record it


def test_responses_that_no_policy_sampled(run: Run) -> None:
    sft = ["--loss-type", "sft_loss", "--rollout-function-path", SFT_ROLLOUT, "--rollout-num-gpus", "0"]
    args = run.args(*sft)
    write_dump(run.directory / "0.jsonl", [GROUP], sampling_record(args))
    words = ["--debug-train-only", "--load-debug-rollout-data", str(run.directory / "0.jsonl")]
    assert "no policy sampled them" in run.error(*words)
    assert run.errors(*words, *sft) == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"prompt": "1 + 1"}',
        '{"slime rollout": 2}',
        '{"slime rollout": 1, "sampling": {"temperature": "hot"}, "tokenizer": null, "vocab_size": null}',
        '{"slime rollout": 1, "sampling": {"temperature": 1, "magic": 2}, "tokenizer": null, "vocab_size": null}',
        '{"slime rollout": ' + "[" * 100_000,
    ],
)
def test_a_wrong_first_line(run: Run, line: str) -> None:
    path = Path(run.directory / "0.jsonl")
    path.write_text(line + "\n")
    words = ["--debug-train-only", "--load-debug-rollout-data", str(path)]
    assert f"{path}:1 is not the first line of a rollout dump" in run.error(*words)
