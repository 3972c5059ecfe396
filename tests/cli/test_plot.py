"""Curves and tables from a metrics.jsonl, by the command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slime.cli.plot import draw, main, run_names

PLOT_RUN = Path(__file__).parents[2] / "tools" / "plot_run.py"


def write_metrics(path: Path) -> None:
    """Write three rollouts and the evaluations before and after them, as a run does."""
    with path.open("w") as file:

        def write(step: int, **metrics: float) -> None:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

        for step in range(4):
            if step:
                write(step, **{"rollout/reward": 0.2 * step, "rollout/response_length": 20.0 + step})
                write(step, **{"time/generation": 1.0, "time/training": 2.0, "time/idle": 0.5, "time/step": 3.5})
            if step in (0, 3):
                write(step, **{"eval/sampled/reward": 0.3 + 0.2 * step, "eval/sampled/reward_stderr": 0.02})
                write(step, **{"eval/greedy/reward": 0.25 + 0.22 * step})


def test_png_and_tables(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl")
    done = subprocess.run(
        [sys.executable, PLOT_RUN, tmp_path / "metrics.jsonl"], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for text in ("0.300 ± 0.020", "0.900 ± 0.020", "0.910", "mean of 3 steps"):
        assert text in done.stdout
    shares = {
        cells[0]: cells[-1]
        for line in done.stdout.splitlines()
        if (cells := line.replace("│", " ").split()) and "%" in line
    }
    assert shares == {"generation": "28.6%", "training": "57.1%", "idle": "14.3%", "sum": "100.0%", "wall": "100.0%"}


def test_missing_time_in_phases_is_visible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "time/training": 2.0, "time/step": 4.0}) + "\n")
    main([str(path)])
    assert "sum of phases │ 2.000          │ 50.0%" in capsys.readouterr().out


def events(*metrics: dict[str, float]) -> list[dict[str, float]]:
    return [{"step": step, **values} for step, values in enumerate(metrics, 1)]


def panels(runs: dict[str, Any]) -> dict[str, Any]:
    """Return the panels that are drawn, by title."""
    import matplotlib.pyplot as plt

    figure = draw(runs, "x")
    plt.close(figure)
    return {place.get_title(): place for place in figure.axes}


def drawn(place: Any, label: str) -> list[float]:
    [line] = [line for line in place.get_lines() if line.get_label() == label]
    return list(line.get_ydata())


def test_only_what_there_is_gets_a_panel() -> None:
    sft = events(*({"train/loss": 3.0 / at, "train/grad_norm": 1.0, "rollout/truncated": 0.0} for at in (1, 2, 3)))
    sft.append({"step": 3, "eval/val/loss": 0.7})
    found = panels({"sft": sft})
    assert set(found) == {"Loss", "Gradient norm"}
    assert drawn(found["Loss"], "loss") == [3.0, 1.5, 1.0]
    assert drawn(found["Loss"], "eval val loss") == [0.7]
    only = panels({"eval": [{"step": 0, "eval/a/reward": -3.0, "eval/a/reward/style": 0.5, "eval/a/truncated": 0.5}]})
    assert set(only) == {"Held-out reward (± standard error)", "Entries of the reward", "Share of truncated responses"}
    with pytest.raises(ValueError, match="no event has a metric that is drawn"):
        draw({"empty": [{"step": 1, "sync/gb": 1.0}]}, "x")


@pytest.mark.parametrize("rewards", [(-120.0, -60.0), (-1.0, 1.0), (0.0, 1.0), (5e6, 7e6)])
def test_every_range_of_rewards_is_in_sight(rewards: tuple[float, float]) -> None:
    first, last = rewards
    found = panels({"run": events({"rollout/reward": first, "eval/a/reward": last}, {"rollout/reward": last})})
    for title in ("Training reward", "Held-out reward (± standard error)"):
        low, high = found[title].get_ylim()
        values = [value for line in found[title].get_lines() for value in line.get_ydata()]
        assert low < min(values) <= max(values) < high, title


def test_faults_of_numerics_are_in_sight() -> None:
    run = events(
        *(
            {
                "train/logprob_gap_mean": 1e-7,
                "train/entropy": 1.0,
                "train/kl_loss": 0.1,
                "train/clip_fraction": share,
                "rollout/zero_std_groups": 1,
                "train/staleness": 0.0,
            }
            for share in (0.0, 0.1)
        )
    )
    run.append({"step": 3, "train/entropy": math.nan})
    found = panels({"run": run})
    assert set(found) == {
        "|trainer − engine log-prob|",
        "Entropy, nats a token (1 not finite)",
        "KL",
        "Share of clipped tokens",
        "Groups without a signal",
    }
    assert found["|trainer − engine log-prob|"].get_yscale() == "log"


def test_infinite_and_single_values_are_drawn(tmp_path: Path) -> None:
    lines = [{"step": 1, "train/loss": math.inf, "rollout/reward": math.nan, "time/step": 2.0, "time/idle": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_two_runs_share_their_panels(tmp_path: Path) -> None:
    found = panels({"a": events({"rollout/reward": 1.0}), "b": events({"rollout/reward": 2.0, "time/step": 3.0})})
    labels = [line.get_label() for line in found["Training reward"].get_lines()]
    assert labels == ["a: reward", "b: reward"]
    first, second = (line.get_color() for line in found["Training reward"].get_lines())
    assert first != second
    assert "Wall time of a step, seconds" in found
    paths = [Path("runs/a/rl/metrics.jsonl"), Path("runs/b/rl/metrics.jsonl")]
    assert run_names(paths) == ["a/rl", "b/rl"]
    assert len(set(run_names([paths[0], paths[0]]))) == 2
