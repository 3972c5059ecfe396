"""The console of a run: its lines, its live view, its hints, and that it never ends a run."""

from __future__ import annotations

import io
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from slime.core.masking import Masker
from slime.observability.console.hints import RewardHints
from slime.observability.console.lines import evaluation_lines, progress_line, rollout_line
from slime.observability.console.live import draw
from slime.observability.console.run_console import STAGE_S, Output, RunConsole
from slime.observability.console.text import PLAIN_WIDTH, clock, duration, number, short_count, sparkline
from slime.observability.console.view import View
from slime.observability.logs import log_to_file
from slime.observability.phases import PHASES
from slime.observability.progress import SampleProgress, WorkProgress

TIMES = {f"time/{name}": 0.0 for name in (*PHASES, "idle")} | {"time/step": 10.0}
RECORD = TIMES | {
    "rollout/reward": 0.375,
    "rollout/response_length": 211.4,
    "rollout/response_length_max": 512.0,
    "rollout/staleness": 0.5,
    "rollout/tokens_per_second": 3123.0,
    "train/loss": -1e-9,
    "train/grad_norm": 0.126,
    "train/logprob_gap_mean": 2.7e-7,
    "memory/training_peak_gb": 4.1,
    "time/generation": 6.1,
    "time/training": 3.5,
    "time/weight_sync": 0.31,
    "time/idle": 0.09,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def plain(stream: io.StringIO) -> RunConsole:
    return RunConsole(Output(file=stream, highlight=False))


def in_terminal(stream: Terminal, width: int) -> RunConsole:
    return RunConsole(Output(file=stream, highlight=False, force_terminal=True, width=width, height=24))


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


# ---- lines


def test_a_rollouts_line_counts_from_zero() -> None:
    numbers = "reward 0.375 length 211 loss 0.0000 grad 0.126 gap 3e-07"
    assert rollout_line(0, RECORD, 110) == f"rollout 0: {numbers} | 10.0 s gen 61% train 35% sync 3%", (
        "no sign of a rounded zero, and no phase under 3 %"
    )


def test_long_lines_lose_whole_parts() -> None:
    shares = dict.fromkeys([f"time/{name}" for name in (*PHASES, "idle")], 1.25)
    huge = RECORD | shares | {"train/grad_norm": 123456.7, "rollout/response_length": 131072.0, "train/loss": math.nan}
    for rollout_id in (0, 1234567):
        whole = rollout_line(rollout_id, huge, 400).split()
        for width in range(20, 200):
            line = rollout_line(rollout_id, huge, width)
            assert len(line) <= max(width, len(f"rollout {rollout_id}: | 10.0 s")), line
            assert set(line.split()) <= set(whole), "no word is cut"
    assert len(rollout_line(7, huge)) <= PLAIN_WIDTH < len(rollout_line(7, huge, 400))


def test_smallest_phases_are_left_out_first() -> None:
    times = TIMES | {"time/generation": 3.0, "time/training": 6.0, "time/evaluation": 1.0}
    assert rollout_line(3, times, 48).endswith("gen 30% train 60% eval 10%")
    assert rollout_line(3, times, 40).endswith("gen 30% train 60%")
    assert rollout_line(3, times, 30).endswith("10.0 s train 60%")


def test_numbers_have_fixed_digits() -> None:
    assert [number(value, ".3f") for value in (0.52, 0.525, -0.0001, -0.0, -0.5)] == [
        "0.520",
        "0.525",
        "0.000",
        "0.000",
        "-0.500",
    ]
    assert number(float("nan"), ".3f") == "nan"
    assert number(-12345678.9, ".3f") == "-1.23e+07"
    assert [short_count(value) for value in (0, 999, 3123, 12345, 999_950, 1.2e6)] == [
        "0",
        "999",
        "3.1k",
        "12k",
        "1.0M",
        "1.2M",
    ]
    assert [duration(s) for s in (0.04, 59.9, 59.99, 200, 7500)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [clock(s) for s in (-1, 7.4, 61, 3725, 300_000)] == ["0:00", "0:07", "1:01", "1:02:05", "3 d 11 h"]


def test_a_sparkline_shows_the_range() -> None:
    assert sparkline([0, 0.5, 1], 10) == "▁▅█" or sparkline([0, 0.5, 1], 10) == "▁▄█"
    assert sparkline([-2, -2], 10) == "▁▁"
    assert sparkline([0, math.nan, 1], 10) == "▁ █"
    assert sparkline(range(100), 5) == sparkline(range(95, 100), 5)
    assert sparkline([0, 1], 10, ascii_only=True).isascii()


def test_an_evaluation_shows_what_failed() -> None:
    record = {"eval/a/reward": 0.25, "eval/a/reward_stderr": 0.1, "eval/a/failed": 0.0, "eval/a/reward_judged": 0.25}
    assert evaluation_lines(1, record) == ["eval a after 1 rollout: reward 0.250 ± 0.100"]
    [line] = evaluation_lines(4, record | {"eval/a/failed": 0.5, "eval/a/reward_judged": 0.5})
    assert line == "eval a after 4 rollouts: reward 0.250 ± 0.100  failed 0.500  reward_judged 0.500"


def test_an_evaluation_without_reward_is_an_error() -> None:
    lines = evaluation_lines(4, {"eval/a/failed": 1.0, "eval/a/num_prompts": 3.0, "eval/b/reward": 1.0})
    assert (
        lines[0]
        == "ERROR eval a after 4 rollouts has no reward: all responses failed; logs/rollout.log has the reasons"
    )
    assert lines[1] == "eval b after 4 rollouts: reward 1.000"


def test_a_custom_evaluation_needs_no_reward() -> None:
    assert evaluation_lines(4, {"eval/a/accuracy": 0.5}) == ["eval a after 4 rollouts: accuracy 0.500"]


def test_evaluation_lines_fit() -> None:
    record = {f"eval/a/reward.part{i}": i / 7 for i in range(40)} | {"eval/a/reward": 0.5}
    [line] = evaluation_lines(4, record)
    assert line.startswith("eval a after 4 rollouts: reward 0.500  reward.part0 0.000") and len(line) <= PLAIN_WIDTH


# ---- the live view


def busy(now: float) -> View:
    """Return a run in the middle of generating rollout 12 of 5000, with everything that can be shown."""
    view = View(5000, 10, faults=3)
    for rollout_id in (10, 11):
        view = view.with_rollout(rollout_id, now - 100).with_phase("generation", f"rollout {rollout_id}", now - 100)
        view = view.with_phase("training", f"rollout {rollout_id}", now - 60).with_rollout_done(RECORD, now - 40)
    for reward in (0.1, 0.3, 0.2):
        view = view.with_evaluation({"aime": reward, "a data set with a very long name 数学": reward, "c": 0, "d": 1})
    view = view.with_rollout(12, now - 20).with_phase("generation", "rollout 12", now - 20)
    samples = SampleProgress(total=16384, generated=8192, judged=100, tokens=3_000_000, seconds=20.0, dropped=17)
    return with_work(view, WorkProgress(12, samples))


def with_work(view: View, work: WorkProgress) -> View:
    console = plain(io.StringIO())
    console._view = view
    console.progress(work)
    console.close()
    return console._view


@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(*, ascii_only: bool) -> None:
    now = time.monotonic()
    for width in (1, 20, 40, 80, 160, 300):
        lines = draw(busy(now), width, now, ascii_only=ascii_only)
        assert all(cell_len(line.plain) <= width for line in lines), width
        assert len(lines) <= 7
    assert any(cell_len(line.plain) > 40 for line in draw(busy(now), 80, now)), "control: there is something to cut"


@pytest.mark.parametrize("width", [80, 160])
def test_bar_count_and_time_left_come_first(width: int) -> None:
    now = time.monotonic()
    run, phase, *rest = [line.plain for line in draw(busy(now), width, now)]
    assert re.search(r"^rollout 12 +━*─+ +12/5000 +3 d 11 h left", run), run
    assert re.search(r"^generating +━+─+ +8192/16384 +0:20 left", phase), phase
    assert re.search(r"^reward +0.375 ▁+$", rest[0]), rest
    assert rest[-1].startswith("faults 3  length 211.4 (longest 512)  staleness 0.5  3123 tokens/s")
    assert ("17 groups dropped" in phase) == (width == 160), "what does not fit is left out"


def test_time_left_comes_from_past_rollouts() -> None:
    view = View(4, 0).with_rollout(0, 100.0).with_phase("generation", "rollout 0", 100.0)
    assert view.run_left(105.0) is view.rollout_left(105.0) is view.phase_left(105.0) is None
    for at in (100.0, 200.0):  # the first rollout warms up, and is not averaged
        slow = 100.0 if at == 100.0 else 0.0
        view = view.with_rollout(0, at).with_phase("generation", "rollout 0", at)
        view = view.with_phase("training", "rollout 0", at + 30 + slow).with_rollout_done(TIMES, at + 50 + slow)
    view = view.with_rollout(2, 1000.0).with_phase("generation", "rollout 2", 1000.0)
    assert (view.phase_left(1010.0), view.rollout_left(1010.0), view.run_left(1010.0)) == (20.0, 40.0, 90.0)
    half = WorkProgress(2, SampleProgress(total=8, generated=4, judged=4, tokens=0, seconds=25.0))
    assert with_work(view, half).phase_left(1025.0) == 15.0, "in the middle between its speed (25) and the past (5)"
    assert with_work(view, half).phase_left(1035.0) == 25.0, "it takes longer than before, so its speed counts"
    other = WorkProgress(3, half.rollout)
    assert with_work(view, other).phase_left(1025.0) == 5.0, "control: those of another rollout say nothing"
    assert with_work(view, other).ahead is half.rollout


def test_progress_lines_fit() -> None:
    now = time.monotonic()
    line = progress_line(busy(now), now)
    assert line is not None and len(line) <= PLAIN_WIDTH
    assert line.startswith("rollout 12: generating  8192/16384 samples  150k tokens/s  100 judged  17 groups dropped")
    assert progress_line(View(3, 0), now) is None
    evaluating = View(3, 0).with_phase("evaluation", "evaluation after 2 rollouts", now - 65)
    assert progress_line(evaluating, now) == "evaluation after 2 rollouts:  for 1:05"


# ---- hints


def test_equal_groups_are_told_without_a_flood() -> None:
    hints = RewardHints(4)
    record = {"rollout/reward": 0.5, "rollout/reward_std": 0.5, "rollout/zero_std_groups": 4}
    said = [line for number in range(100) for line in hints.of(number, record)]
    assert said[0] == "rollout 0: all 4 groups have equal rewards: nothing to learn"
    assert said[1] == "rollout 1: all 4 groups have equal rewards: nothing to learn (2 of 2 rollouts so far)"
    assert len(said) == 7
    assert RewardHints(4).of(0, record | {"rollout/zero_std_groups": 3}) == [], "control: one group differs"
    assert RewardHints(4).of(0, TIMES) == []


def test_one_reward_for_everything_is_told() -> None:
    flat = {"rollout/reward": 0.0, "rollout/reward_std": 0.0, "rollout/zero_std_groups": 1}
    hints = RewardHints(4)
    said = [hints.of(number, flat) for number in range(6)]
    assert said[:2] == [[], []] and said[3:5] == [[], []]
    assert said[2] == ["WARNING all samples of 3 rollouts have the reward 0: look at labels, rewards and answers"]
    assert len(said[5]) == 1
    varied = RewardHints(4)
    assert not [
        varied.of(n, flat | {"rollout/reward": n % 2}) for n in range(6) if varied.of(n, flat | {"rollout/reward": n})
    ]


# ---- the console


@pytest.fixture
def driver_log(tmp_path: Path) -> Iterator[Path]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield log_to_file(tmp_path, "driver", Masker(["secret-key"]))
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level


def a_short_run(console: RunConsole) -> None:
    with console.stage("Ray"):
        console.note("busy")
    console.begin(total=2, done=0, hints=RewardHints(4), faults=0)
    console.begin_rollout(0)
    with console.phase("generation", "rollout 0"):
        console.progress(WorkProgress(0, SampleProgress(16, 4, 4, 100, 1.0)))
        console.say("WARNING " + 20 * "a long sentence in the middle of a phase, ")
    console.evaluation(1, {"eval/a/reward": 0.25})
    console.say("FAULT engine 0 [red]x[/red] with secret-key")
    console.rollout(0, RECORD | {"rollout/reward_std": 0.0, "rollout/zero_std_groups": 4})
    console.say("next: slime plot " + "long/" * 40, whole=True)
    console.close()


def test_plain_logs_and_the_driver_log_agree(out: io.StringIO, driver_log: Path) -> None:
    a_short_run(plain(out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "Ray … 0.0 s"
    assert lines.pop(1).startswith("WARNING a long sentence")
    assert lines[1] == "FAULT engine 0 [red]x[/red] with secret-key"
    assert lines[2].startswith("rollout 0: reward 0.375")
    assert lines[3] == "rollout 0: all 4 groups have equal rewards: nothing to learn"
    assert lines[4] == "eval a after 1 rollout: reward 0.250", "after the rollout's own line"
    logged = driver_log.read_text()
    said = [line.partition("slime.console: ")[2] for line in logged.splitlines()]
    assert [said[0], *said[2:]] == [line.replace("secret-key", "***") for line in lines]


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminals_output_stays_in_its_width(width: int, driver_log: Path) -> None:
    stream = Terminal()
    a_short_run(in_terminal(stream, width))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", shown) if "slime plot" not in line]
    assert max(map(cell_len, lines)) <= width
    assert "rollout 0" in shown and "generating" in shown
    assert "next: slime plot " + "long/" * 40 in shown, "a command is never broken"
    assert "\x1b" not in driver_log.read_text()


def test_a_stage_that_fails_is_not_done(out: io.StringIO) -> None:
    console = plain(out)
    with pytest.raises(ValueError, match="no weights"), console.stage("trainers"):
        raise ValueError("no weights")
    with pytest.raises(ValueError, match="bad step"), console.phase("training", "rollout 0"):
        raise ValueError("bad step")
    console.tick(time.monotonic() + 1000)
    console.close()
    assert out.getvalue() == ""


def test_long_stages_and_phases_are_reported(out: io.StringIO) -> None:
    console = plain(out)
    with console.stage("engines"):
        begin = console._said_at
        console.note("engine 0 loads weights")
        for second in range(60):
            console.tick(begin + second)
    with console.phase("training", "rollout 7"):
        begin = console._said_at
        for second in range(100):
            console.tick(begin + second)
    console.close()
    assert STAGE_S == 20
    lines = out.getvalue().splitlines()
    assert lines[:2] == [f"engines … {at} s so far: engine 0 loads weights" for at in (20, 40)]
    assert lines[3:] == [f"rollout 7: training  for {at}" for at in ("0:30", "1:00", "1:30")]


class Gone(io.StringIO):
    """The pipe of a reader that has ended, as `slime train | head` leaves it."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_lost_console_does_not_end_the_run(driver_log: Path) -> None:
    a_short_run(plain(Gone()))
    logged = driver_log.read_text()
    assert logged.count("the console cannot be written to any more") == 1
    assert "rollout 0: reward 0.375" in logged


def test_other_encodings_get_ascii() -> None:
    raw = io.BytesIO()
    console = RunConsole(Output(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), highlight=False))
    with console.stage("Ray 数"):
        pass
    console.close()
    assert raw.getvalue() == b"Ray ? ... 0.0 s\n"


def test_a_view_that_fails_ends_no_run(driver_log: Path) -> None:
    stream = Terminal()
    console = in_terminal(stream, 80)
    console._view = None  # pyright: ignore[reportAttributeAccessIssue]
    console.say("still here")
    console._view = View(0, 0)
    console.close()
    assert "still here" in stream.getvalue()
    assert driver_log.read_text().count("the live view cannot be drawn") == 1
