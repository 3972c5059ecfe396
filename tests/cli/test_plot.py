"""Curves and tables from a metrics.jsonl, by the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slime.cli.plot import main

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
