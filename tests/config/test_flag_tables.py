"""The checked-in tables equal the generator's output and contain every required name."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from config_run import ROOT

from slime.config.flags.renamed import REMOVED, RENAMED
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


FIELDS = """
class Serving:
    host: A[str, Arg(help="Where. It listens there.")] = "127.0.0.1"
    hidden: A[int, Arg(no_cli=True)] = 0
    rank: A[int, Derived("set when it runs")]
    disable_graph: A[bool, Arg(no_cli=True)] = False
    fdfo: A[bool, Arg(help="Order.", action=argparse.BooleanOptionalAction)] = True
    backend: A[Literal[None, "nixl"], Arg(help="Which.", choices=["none", "nixl"])] = None
    sizes: A[Optional[List[int]], Arg(help="Several.", aliases=["--lengths"])] = None
    parser: Optional[str] = None
"""
ADDED = """
def add_cli_args(parser):
    parser.add_argument("--parser", type=str, choices=["auto"] + found(), default=None, help=f"Which. {found()}")
    parser.add_argument("--disable-graph", action=DeprecatedStoreTrueAction, new_flag="--graph", help="Old.")
    parser.add_argument("--plain", action="store_true", help="A switch.")
"""


def sglang_wheel(directory: Path, fields: str, added: str) -> Path:
    """Return the files that the generator reads from SGLang's wheel."""
    path = directory / "sglang-0.5.21-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sglang/srt/server_args.py", added)
        archive.writestr("sglang/srt/arg_groups/fields/serving.py", fields)
    return path


def test_flags_that_sglang_adds_at_start_are_listed(tmp_path: Path) -> None:
    table = json.loads(generator().table("sglang", sglang_wheel(tmp_path, FIELDS, ADDED)))
    assert table["made_from"] == "sglang 0.5.21"
    assert table["flags"] == [
        {"name": "host", "kind": "str", "on": ["--sglang-host"], "default": "127.0.0.1", "help": "Where."},
        {"name": "disable_graph", "kind": "bool", "on": ["--sglang-disable-graph"], "default": False},
        {"name": "fdfo", "kind": "bool", "on": ["--sglang-fdfo"], "off": ["--sglang-no-fdfo"], "default": True}
        | {"help": "Order."},
        {"name": "backend", "kind": "str", "on": ["--sglang-backend"], "choices": ["none", "nixl"], "help": "Which."},
        {"name": "sizes", "kind": "int", "on": ["--sglang-sizes", "--sglang-lengths"], "num_values": [1, None]}
        | {"help": "Several."},
        {"name": "parser", "kind": "str", "on": ["--sglang-parser"], "help": "Which."},
        {"name": "plain", "kind": "bool", "on": ["--sglang-plain"], "help": "A switch."},
    ]
    names = {"--sglang-reasoning-parser", "--sglang-tool-call-parser", "--sglang-sampling-backend", "--sglang-config"}
    assert names <= set(spellings())


@pytest.mark.parametrize(
    ("field", "added", "words"),
    [
        ("size: A[Size, Arg(help='x')] = 1", "", "field size, line 1, .*its type is Size"),
        ("size: A[int, Arg(help='x', hue=3)] = 1", "", "field size.*it has hue"),
        ("size: A[int, Arg('x')] = 1", "", "field size.*without a name"),
        ("size: A[bool, Arg(help='x', action=Own)] = 1", "", "field size.*its action is Own"),
        ("size: A[int] = 1", "", "field size.*cannot be read"),
        ("", "parser.add_argument(name, type=int)", "line 1, cannot be read: parser.add_argument"),
        ("", "parser.add_argument('--own', type=own)", "--own, line 1, cannot be read: its type is own"),
        ("", "parser.add_argument('--own', action=Own)", "--own.*its action is Own"),
    ],
)
def test_an_unreadable_flag_is_an_error(tmp_path: Path, field: str, added: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generator().table("sglang", sglang_wheel(tmp_path, field, added))


def test_every_old_name_leads_to_one_flag() -> None:
    assert [old for old in (*RENAMED, *REMOVED) if old in spellings()] == []
    for new in RENAMED.values():
        spec, _ = spellings()[new.flag]
        assert new.value is None or not spec.choices or new.value in spec.choices
        assert not spec.choices or set(new.values.values()) <= set(spec.choices)


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
