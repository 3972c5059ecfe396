"""The checked-in tables are what the generator makes, and hold every name that has to be there."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from types import ModuleType

import pytest
from config_run import ROOT

from slime.config.flags.table import all_flags, spellings

APPENDIX = """--swiglu --disable-bias-linear --norm-epsilon --group-query-attention
--untie-embeddings-and-output-weights
--num-experts --use-rotary-position-embeddings --position-embedding-type --rotary-base --rotary-percent
--use-rope-scaling --rotary-scaling-factor --no-rope-fusion --vocab-size --make-vocab-size-divisible-by
--max-position-embeddings --seq-length --spec --post-self-attn-layernorm --post-mlp-layernorm --attention-backend
--lr-decay-style --lr-warmup-iters --lr-decay-iters --min-lr --clip-grad --seed --bf16 --fp16
--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --use-distributed-optimizer --optimizer-cpu-offload
--micro-batch-size --global-batch-size --no-load-optim --no-load-rng --finetune --ckpt-format --ckpt-step
--no-save-optim --decoder-last-pipeline-num-layers --moe-layer-freq"""


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_flag_tables", ROOT / "tools" / "generate_flag_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", ["megatron", "router"])
def test_regenerated(source: str) -> None:
    checked_in = (ROOT / "slime" / "config" / "flags" / f"{source}_flags.json").read_text(encoding="utf-8")
    assert generator().table(source) == checked_in


def test_every_spelling_has_one_meaning() -> None:
    counts = Counter(spelling for spec in all_flags() for spelling in (*spec.on, *spec.off))
    assert [spelling for spelling, count in counts.items() if count > 1] == []


def test_megatron_names_that_are_no_fields() -> None:
    assert [flag for flag in APPENDIX.split() if flag not in spellings()] == []
    assert "--moe-layer-frequency" not in spellings()


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda path: path.name)
def test_flags_in_scripts_exist(path: object) -> None:
    lines = (ROOT / str(path)).read_text().splitlines()
    flags = {match for line in lines for match in re.findall(r"^\s+(?:# )?(--[a-z][a-z0-9-]+)\b", line)}
    arrays = [flag for flag in flags if flag not in spellings()]
    of_tools = {"--input-dir", "--origin-hf-dir", "--output-dir", "--out", "--before", "--after", "--title"}
    assert set(arrays) <= of_tools
