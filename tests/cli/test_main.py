"""The command `slime`: its commands, their help and errors, and what they need from the wheel."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from slime import __version__
from slime.cli.main import COMMANDS, find_command, main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command prints that ends well."""
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, ended.code
    return capsys.readouterr().out


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return str(ended.value.code)


def test_help_lists_the_commands_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
    assert [name for name, command in COMMANDS.items() if f"  {name} " not in text or command.summary not in text] == []
    assert shown(capsys) == shown(capsys, "-h") == text
    assert [
        command.example for name, command in COMMANDS.items() if not command.example.startswith(f"slime {name}")
    ] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--help")
    assert f"slime {'train' if name in ('plan', 'eval', 'train-async') else name}" in text
    assert len(text.splitlines()) <= 100


def test_python_m_slime_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slime", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"slime {__version__}\n"


def test_unknown_commands_are_named() -> None:
    assert refusal("trian", "run.yaml").startswith(
        "slime: trian: no such command; did you mean train? the commands are"
    )
    assert "did you mean" not in refusal("xyzzy")
    assert find_command("train-async").module == "train_async"
    assert refusal("train_async").startswith("slime: train_async: no such command; did you mean train-async?")


def test_errors_are_one_message(tmp_path: Path) -> None:
    assert "No such file" in refusal("plot", str(tmp_path / "metrics.jsonl"))
    assert "there is no config.json" in refusal("convert", "--hf-checkpoint", str(tmp_path))
    assert "--lr fast: must be a number" in refusal("plan", "--lr", "fast")


def test_hooks_in_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_reward_here.py").write_text("def judge(args, sample):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as with a console script

    def warnings(hook: str) -> str:
        text = shown(capsys, "plan", str(ROOT / "examples/run.yaml"), "--custom-rm-path", hook)
        return text.partition("\nWarnings\n")[2]

    assert "my_reward_here" not in warnings("my_reward_here.judge")
    assert "no_such_reward" in warnings("no_such_reward.judge"), "control"


# --- run.yaml ---------------------------------------------------------------------------------------------------


def test_the_example_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["bash", "-c", 'source "$0"; printf "%s\\0" "${MODEL_ARGS[@]}"', ROOT / "scripts/models/qwen2.5-0.5B.sh"]
    model = subprocess.run(sizes, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    text = shown(capsys, "plan", str(ROOT / "examples/run.yaml"), *model, "--rollout-batch-size", "16")
    assert "16 prompts x 8 samples = 128 samples" in text and "GiB" in text
    assert "no effect" not in text
    assert list(tmp_path.iterdir()) == [], "a plan makes no files"


def test_eval_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with a file that gives the length of a run in epochs."""
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "examples/run.yaml").read_text().replace("num-rollout: 200", "num-epoch: 3")
    Path("run.yaml").write_text(example)
    text = shown(capsys, "eval", "run.yaml", "--eval-prompt-data", "held-out", "eval.jsonl", "--dry-run")
    assert "0 rollouts" in text or "evaluates" in text
    assert "nothing to do" in refusal("eval", "run.yaml", "--dry-run")


def test_two_configurations_are_refused() -> None:
    assert "a.yaml: is a configuration file, and --config names another" in refusal("plan", "a.yaml", "--config=b.yaml")


# --- the wheel --------------------------------------------------------------------------------------------------


def left_out_of_the_wheel(files: list[Path]) -> list[Path]:
    """Return the files of slime/ that pyproject.toml ships neither as modules nor as data of a package."""
    data = PROJECT["tool"]["setuptools"]["package-data"]

    def shipped(file: Path) -> bool:
        package = ".".join(file.parent.parts)
        patterns = data.get(package, [])
        return file.suffix == ".py" or any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)

    return [file for file in files if not shipped(file)]


def test_the_wheel_has_all_that_the_commands_need() -> None:
    assert PROJECT["project"]["scripts"] == {"slime": "slime.cli.main:main"}
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["slime*"]
    files = [file.relative_to(ROOT) for file in (ROOT / "slime").rglob("*") if file.is_file()]
    files = [file for file in files if "__pycache__" not in file.parts]
    assert Path("slime/cli/arithmetic/grpo.yaml") in files
    assert left_out_of_the_wheel(files) == []
    assert left_out_of_the_wheel([Path("slime/cli/other.yaml")]) != [], "control"


def test_commands_import_nothing_outside_the_package() -> None:
    for file in (ROOT / "slime").rglob("*.py"):
        assert not any(
            line.startswith(("from tools", "from examples", "import tools")) for line in file.read_text().splitlines()
        )
