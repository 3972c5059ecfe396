"""A short form of examples/sft_chat: a whole run that learns from conversations, with a validation loss."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.observability.best_checkpoint import FILE
from tests.cluster.runs import ROOT, environment, events, train

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

EXAMPLE = ROOT / "examples/sft_chat"


def losses_by_huggingface(model: Path, data: Path) -> list[float]:
    """Return the mean loss of the digits that the assistant says and of the tokens that end its turns.

    The tokens are found by a pattern in the template's text: one digit after <|assistant|> and a line end. An answer
    ends with the token of the next role, and the last one with the end-of-sequence token. Two wrong means follow, with
    the mask moved by one token either way.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    shifts = (0, -1, 1)
    losses: dict[int, list[torch.Tensor]] = {shift: [] for shift in shifts}
    for line in data.read_text().splitlines():
        messages = [{key: m[key] for key in ("role", "content")} for m in json.loads(line)["messages"]]
        text = tokenizer.apply_chat_template(messages, tokenize=False) + tokenizer.eos_token
        pieces = re.split(r"((?<=<\|assistant\|>\n)[0-9]<\|user\|>)", text)
        ids, trained = list[int](), list[int]()
        for number, piece in enumerate(pieces):
            found = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += found
            trained += [number % 2] * len(found)
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        for shift in shifts:
            losses[shift].append(each[torch.tensor(trained).roll(shift)[1:].bool()])
    return [torch.cat(losses[shift]).mean().item() for shift in shifts]


def test_a_run_on_conversations(tmp_path: Path) -> None:
    task, save = tmp_path / "task", tmp_path / "sft"
    make = ("--out", str(task), "--num-train", "96", "--num-held-out", "5")
    subprocess.run([sys.executable, EXAMPLE / "make_conversations.py", *make], check=True, cwd=ROOT, env=environment())
    held_out = task / "held_out.jsonl"
    output = train(
        [
            *("--config", str(EXAMPLE / "sft.yaml"), "--hf-checkpoint", str(task / "model")),
            *("--ref-load", str(task / "model"), "--save", str(save), "--save-hf", str(save / "hf")),
            *("--prompt-data", str(task / "train.jsonl"), "--eval-prompt-data", "held-out", str(held_out)),
            *("--num-rollout", "3", "--rollout-batch-size", "32", "--num-steps-per-rollout", "4"),
            *("--actor-num-gpus-per-node", "1", "--eval-interval", "2", "--save-interval", "2"),
            *("--keep-best-checkpoint", "eval/held-out/loss", "--lr-warmup-iters", "2"),
        ],
        tmp_path / "log.txt",
    )
    losses = events(save, "eval/held-out/loss")
    assert list(losses) == [0, 2, 3], "before the first rollout, at the interval, and after the last"
    assert losses[3] < losses[2] < losses[0]
    for step, model in ((0, task / "model"), (3, save / "hf")):
        expected, *shifted = losses_by_huggingface(model, held_out)
        assert losses[step] == pytest.approx(expected, rel=1e-5)
        assert all(losses[step] != pytest.approx(wrong, rel=1e-2) for wrong in shifted), "control"
    assert set(events(save, "eval/held-out/trained_tokens").values()) == {5 * 6 * 2}
    assert all(count < events(save, "rollout/tokens")[step] for step, count in
               events(save, "rollout/trained_tokens").items())  # fmt: skip
    assert json.loads((save / FILE).read_text())["checkpoint"] == "iter_0000002"
    assert f"eval held-out after 3 rollouts: loss {losses[3]:.4f}" in output
