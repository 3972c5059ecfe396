"""The documentation agrees with the code: generated parts are current, flags exist, commands plan, examples run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.algo.losses import LossInputs, LossOptions, policy_loss
from slime.cli.main import COMMANDS
from slime.config.flags.renamed import RENAMED
from slime.config.flags.table import spellings, taken_back
from slime.config.parse import load_args
from slime.core.plugins import HOOKS
from slime.core.sample import Sample, Status
from slime.rollout.metrics import sample_metrics

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools import generate_docs  # noqa: E402

DOCS = generate_docs.DOCS
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *ROOT.glob("*.md")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- generated parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_generated_parts_are_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert generate_docs.filled(text) == text, "run: python tools/generate_docs.py"


def test_every_block_is_on_one_page() -> None:
    found = [match[2] for text in generate_docs.pages().values() for match in generate_docs.BLOCK.finditer(text)]
    assert sorted(found) == sorted(generate_docs.wanted_blocks()), "each block needs a page; tools/generate_docs.py"


def test_a_stale_page_is_noticed() -> None:
    """Control: a default that is no longer the flag's, and a block that no generator makes."""
    text = (DOCS / "flags" / "rollout.md").read_text(encoding="utf-8")
    stale = text.replace("| int, >= 1 | `32` |", "| int, >= 1 | `31` |")
    assert stale != text
    assert generate_docs.filled(stale) == text
    with pytest.raises(ValueError, match="no such block"):
        generate_docs.filled("<!-- generated: flags Nobody -->\n<!-- end -->")


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


# --- flags and commands -----------------------------------------------------------------------------------------

OTHER_PROGRAMS = frozenset(
    [
        "--address",
        "--working-dir",
        "--head",
        "--local-dir",
        "--repo-type",
        "--port",
        "--help",
        "--no-x",
        "--x",
        "--editable",
        "--generate",
        "--runtime-env-json",
        "--signal",
        "--batch",
        "--kill-after",
        "--security-opt",
    ]
)
"""Flags of ray, hf, pip, pytest, Slurm, timeout and Docker, and placeholders for any flag."""


def flags_of_tools() -> set[str]:
    """Return every flag that a command or a script of the repository declares itself."""
    folders = ("tools/*.py", "slime/cli/**/*.py", "bench/*.py", "examples/**/*.py", "tests/gpu/runner.py")
    files = [file for folder in folders for file in ROOT.glob(folder)]
    return {flag for file in files for flag in re.findall(r"\"(--[a-z][a-z0-9-]*)\"", file.read_text())}


def unknown_flags(text: str) -> list[str]:
    by_hand = generate_docs.BLOCK.sub("", text)
    found = re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w-])", by_hand)
    known = spellings().keys() | set(RENAMED) | flags_of_tools() | OTHER_PROGRAMS
    return [flag for flag in found if flag not in known and taken_back(flag) is None]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_flags_exist(path: Path) -> None:
    assert unknown_flags(path.read_text(encoding="utf-8")) == []
    assert unknown_flags("`--rollout-batch-sizes`") == ["--rollout-batch-sizes"]


def commands() -> Iterator[Any]:
    """Yield each `python3 train.py` command of the flag pages."""
    for path in PAGES:
        for number, block in enumerate(re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)):
            if "train.py" in block:
                yield pytest.param(block, id=f"{name_of(path)}-{number}")


BASE = """--hf-checkpoint model --ref-load model --prompt-data train.jsonl --label-key label --rm-type random
--num-rollout 3 --rollout-batch-size 4 --n-samples-per-prompt 2 --rollout-num-gpus 2 --save out --no-bf16 --dry-run
--num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --kv-channels 32 --vocab-size 512 --max-position-embeddings 16384 --swiglu
--untie-embeddings-and-output-weights --qk-layernorm --normalization RMSNorm --disable-bias-linear"""
"""A valid command line, to which each example is added."""


def commands_of_slime(text: str) -> list[str]:
    """Return the second word of each line `slime COMMAND ...` in the blocks of a page."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [found for block in blocks for found in re.findall(r"^ *slime (\S+)", block, re.MULTILINE)]


def test_commands_of_slime_exist() -> None:
    found = {command for path in TEXTS for command in commands_of_slime(path.read_text(encoding="utf-8"))}
    assert {"train", "plan", "demo", "export"} <= found <= COMMANDS.keys()
    assert commands_of_slime("```bash\n  slime trian x\n```\nslime is") == ["trian"]  # control


@pytest.mark.parametrize("block", list(commands()))
def test_commands_plan(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [command] = [line for line in block.replace("\\\n", " ").splitlines() if "train.py" in line]
    words = [word for word in shlex.split(command) if word != "${MODEL_ARGS[@]}"]
    _, warnings = load_args([*BASE.split(), *words[words.index("train.py") + 1 :]])
    in_vain = [str(warning) for warning in warnings if "no effect" in warning.rule]
    assert [text for text in in_vain if any(text.startswith(word) for word in words)] == []


# --- hooks ------------------------------------------------------------------------------------------------------


def test_every_example_is_shown_and_led_to() -> None:
    """The block of a hook shows the code of the file that it links; tests/core/test_plugins.py loads them all."""
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    for hook in HOOKS.values():
        module, _, name = hook.example.rpartition(".")
        file = module.replace(".", "/") + ".py"
        assert f"[`{hook.example}`](../{file})" in text
        code = re.search(rf"```python\n((?:async def|def|class) {name}\b.*?)\n```", text, re.DOTALL)
        assert code is not None
        assert code[1] in (ROOT / file).read_text(encoding="utf-8")


def samples() -> list[Sample]:
    made = []
    for index, (reward, status) in enumerate([(1.0, Status.COMPLETED), (0.0, Status.TRUNCATED), (None, Status.FAILED)]):
        sample = Sample(group_index=0, index=index, tokens=[1, 2, 3, 4], prompt_length=2, response_length=2)
        sample.response, sample.label, sample.reward, sample.status = "is 51", "51", reward, status
        made.append(sample)
    return made


# --- metrics ----------------------------------------------------------------------------------------------------

METRIC = re.compile(r"f?\"((?:rollout|train|eval|time|sync)/[\w@{}./]+)\"")


def inputs(log_probs_R: torch.Tensor) -> LossInputs:
    """Return loss inputs with every optional column."""
    ones = [torch.ones(len(log_probs_R)) for _ in range(4)]
    return LossInputs(log_probs_R, log_probs_R.detach(), *ones, weighted_R=ones[0] > 0)


def metric_names() -> set[str]:
    """Return the metric names in the code, with `*` for inserted parts, and those that functions compute."""
    names: set[str] = set()
    for path in set((ROOT / "slime").rglob("*.py")) - set(
        (ROOT / "slime" / "cli").rglob("*.py")
    ):  # which only reads them
        names |= {re.sub(r"\{.*?\}", "*", name) for name in METRIC.findall(path.read_text())}
    options = LossOptions(
        surrogate="token",
        eps_clip=0.2,
        eps_clip_high=0.2,
        eps_clip_c=3.0,
        kl_loss_coef=0.1,
        kl_loss_type="k3",
        entropy_coef=0.1,
        offpolicy_correction="tis",
        tis_clip=2.0,
        tis_clip_low=0.0,
    )
    own = policy_loss(inputs(torch.zeros(2)), options)[1].keys()
    names |= {f"train/{'kl_loss' if name == 'kl' else name}" for name in own}
    names |= {f"rollout/{name}" for name in sample_metrics(samples())}
    return {name for name in names if not name.endswith("/")}


def test_every_metric_is_explained() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z]+/[\w@/]+)`", text))
    patterns = [re.sub(r"[A-Z]{2,}|(?<=@)K", ".+", name) for name in documented]

    def is_explained(name: str) -> bool:
        made = name.replace("*", "x")
        return any(re.fullmatch(pattern, made) for pattern in patterns) or bool(re.fullmatch(r"\w+/\*(/\*)?", name))

    names = metric_names()
    assert len(names) > 40
    assert sorted(name for name in names if not is_explained(name)) == []
    assert not is_explained("train/surprise")
