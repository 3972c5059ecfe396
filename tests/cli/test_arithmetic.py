"""The demo's task: a sound split, careless demonstrations, a tokenizer that round-trips, and a true control."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from slime.cli.arithmetic import make_task, shuffled_rewards
from slime.core.plugins import HOOKS, check_signature
from slime.core.sample import Sample


def test_mirrored_pairs_are_on_one_side() -> None:
    train, held_out = make_task.split_problems(10, 99, 256)
    assert len(train) + len(held_out) == 8100 and len(held_out) in (256, 257)
    assert len(set(train) | set(held_out)) == 8100
    twins_apart = [(a, b) for a, b in held_out if (b, a) in set(train)]
    assert twins_apart == []
    assert make_task.split_problems(10, 99, 256) == (train, held_out)
    ordered = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(ordered)
    assert any((b, a) in set(ordered[256:]) for a, b in ordered[:256]), "a split of ordered pairs is noticed"


def test_demonstrations_have_mistakes_only_where_intended() -> None:
    rng = random.Random(0)
    train, _ = make_task.split_problems(10, 99, 256)
    outcomes: Counter[str] = Counter()
    for a, b in rng.choices(train, k=4000):
        work, _, box = make_task.answer_like_a_careless_pupil(a, b, rng).partition("</think>")
        answer = re.fullmatch(r"\\boxed\{(\d+)\}", box)
        assert answer is not None
        right = int(answer[1]) == a + b
        outcomes["right"] += right
        if not work:
            outcomes["guess"] += 1
            outcomes["right guess"] += right
            continue
        assert all(int(x) + int(y) == int(z) for x, y, z in re.findall(r"(\d+)\+(\d+)=(\d+)", work))
        assert right == ((a % 10 + b % 10 >= 10) == (work.count(",") == 2)), "wrong if a carry lacks its step"
    assert outcomes["guess"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert outcomes["right guess"] / outcomes["guess"] == pytest.approx(1 / 19, abs=0.02)
    assert 0.3 < outcomes["right"] / 4000 < 0.42


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task")
    script = Path(__file__).parents[2] / "examples/arithmetic/make_task.py"  # the documented path
    command = [sys.executable, script, "--out", out, "--seed", "3", "--num-demonstrations", "9600"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1.02 M parameters" in done.stdout
    return out


def test_files(task: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    lines = {
        name: [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval", "demonstrations")
    }
    held_out = {line["prompt"][0]["content"] for line in lines["eval"]}
    assert len(lines["demonstrations"]) == 9600 and len(lines["train"]) > 5000 and len(held_out) >= 200
    assert not held_out & {line["prompt"][0]["content"] for line in lines["train"] + lines["demonstrations"]}

    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    messages = [{"role": "user", "content": "47+38=?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "[gMASK]<sop><|user|>\n47+38=?<|assistant|>\n<think>"
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(prompt) == 14 and tokenizer.decode(prompt) == text
    response = "7+8=15,4+3=7,7+1=8</think>\\boxed{85}<|user|>"
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == response and tokens[-1] == tokenizer.eos_token_id
    config = AutoConfig.from_pretrained(task / "model")
    assert config.eos_token_id == [tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert config.vocab_size == 128 > max(tokenizer.get_vocab().values())


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("run-glm4-tiny-sft-cpu.sh", ["60 rollouts", "160 prompts", "10 a rollout, 16 samples each", "over tokens"]),
        ("run-glm4-tiny-cpu.sh", ["32 prompts x 8 samples = 256 samples", "clip 0.2/0.28", "engine 1", "deepscaler"]),
    ],
)
def test_the_demos_scripts_plan(task: Path, tmp_path: Path, script: str, expected: list[str]) -> None:
    def plan(*extra: str) -> subprocess.CompletedProcess[str]:
        paths = {"TASK_DIR": task, "HF_DIR": task / "model", "REF_DIR": task / "model", "SAVE_DIR": tmp_path / "save"}
        env = {**os.environ, **{name: str(path) for name, path in paths.items()}}
        python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", SCRIPTS / script, "--dry-run", *extra], capture_output=True, text=True, env=env | python
        )

    done = plan()
    assert done.returncode == 0, done.stderr
    assert [text for text in expected if text not in done.stdout] == []
    assert not (tmp_path / "save").exists()
    assert plan("--rotary-base", "20000").returncode != 0, "the model's own config.json has 10000"


def test_the_control_shuffles_the_rewards() -> None:
    assert check_signature(HOOKS["custom_reward_post_process_path"], shuffled_rewards.shuffle) is None
    args = SimpleNamespace(rollout_seed=1, reward_key=None)
    samples = [Sample(index=256 + i, reward=float(i % 3 == 0)) for i in range(256)]
    samples[7].reward = None
    rewards = shuffled_rewards.shuffle(args, samples)
    own = [float("nan") if sample.reward is None else sample.reward_value() for sample in samples]
    assert [row for row, reward in enumerate(rewards) if reward != reward] == [7], "a failed reward is not moved"
    assert sorted(rewards[:7] + rewards[8:]) == sorted(own[:7] + own[8:])
    agreement = sum(a == b for a, b in zip(rewards, own, strict=True)) / 256
    assert agreement < 0.7, "independent rewards of mean 1/3 agree in 5/9 of the samples"
    assert shuffled_rewards.shuffle(args, samples)[:50] == pytest.approx(rewards[:50], nan_ok=True)
    later = [Sample(index=512 + i, reward=sample.reward) for i, sample in enumerate(samples)]
    assert shuffled_rewards.shuffle(args, later) != pytest.approx(rewards, nan_ok=True)
