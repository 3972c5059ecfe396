"""Write slime/config/flags/{megatron,sglang,router}_flags.json: the flags that slime passes on, as data.

    python tools/generate_flag_tables.py megatron router
    python tools/generate_flag_tables.py sglang --sglang-wheel sglang-0.5.21-*.whl

Megatron's flags come from megatron-core's dataclasses (its wheel has no argument parser), the router's from its own
parser, SGLang's from the annotations in its wheel, which are parsed with `ast` (so no GPU is needed). Run it again when
a pin moves. One row is `{name, kind, on, [off, help, default, choices, num_values, one_is_scalar, suffixes]}`, the
fields of `slime.config.flags.table.FlagSpec`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.metadata
import inspect
import json
import re
import types
import typing
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from slime.config.args import SECTIONS

CONFIG = Path(__file__).resolve().parents[1] / "slime" / "config" / "flags"
Row = dict[str, Any]

KINDS = {bool: "bool", int: "int", float: "float", str: "str"}

# Megatron fields that slime sets, from its own flags or from the environment.
SET_BY_SLIME = {
    "add_bias_linear": "disable_bias_linear",
    "apply_rope_fusion": "no_rope_fusion",
    "deterministic_mode": "deterministic",
    "gated_linear_unit": "swiglu",
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "layernorm_epsilon": "norm_epsilon",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "num_moe_experts": "num_experts",
    "variable_seq_lengths": "packing",
    "virtual_pipeline_model_parallel_size": "num_layers_per_virtual_pipeline_stage",
}

# Megatron's spellings that are not the field's name with dashes: (on, off).
SPELLINGS: dict[str, tuple[list[str], list[str]]] = {
    "average_in_collective": (["--ddp-average-in-collective"], ["--no-ddp-average-in-collective"]),
    "bias_activation_fusion": ([], ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"]),
    "bucket_size": (["--ddp-bucket-size"], []),
    "num_layers_in_first_pipeline_stage": (["--decoder-first-pipeline-num-layers"], []),
    "pad_buckets_for_high_nccl_busbw": (["--ddp-pad-buckets-for-high-nccl-busbw"], []),
    "tp_comm_bulk_dgrad": ([], ["--disable-tp-comm-bulk-dgrad"]),
    "tp_comm_bulk_wgrad": ([], ["--disable-tp-comm-bulk-wgrad"]),
    "tp_comm_overlap_ag": ([], ["--disable-tp-comm-overlap-ag"]),
    "tp_comm_overlap_rs": ([], ["--disable-tp-comm-overlap-rs"]),
}


def one_line(text: str | None) -> str:
    """Return the first sentence of a help text, at most 160 characters."""
    flat = " ".join((text or "").split()).replace("**", "").replace("``", "`")
    sentence = re.split(r"(?<=[.!?])\s", flat, maxsplit=1)[0]
    return sentence if len(sentence) <= 160 else sentence[:157] + "..."


def plain_default(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else None


def tidy(row: Row) -> Row:
    """Return the row without empty entries, with keys in a fixed order."""
    order = ("name", "kind", "suffixes", "on", "off", "num_values", "one_is_scalar", "choices", "default", "help")
    return {key: row[key] for key in order if row.get(key) not in (None, "", [], ())}


def boolean_spellings(dashed: str) -> tuple[list[str], list[str]]:
    return [f"--{dashed}"], [f"--no-{dashed}"]


# --- Megatron ---------------------------------------------------------------------------------------------------


def field_type(hint: Any) -> Row | None:
    """Return kind (and shape) of a Megatron field with the type `hint`; None if no flag can give such a value."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        lists = [member for member in members if typing.get_origin(member) is list]
        scalars = [member for member in members if member in KINDS]
        if len(members) == 1:
            return field_type(members[0])
        if int in scalars and lists:
            return {"kind": "layers"}
        if scalars and lists:
            return {"kind": KINDS[scalars[0]], "num_values": [1, None], "one_is_scalar": True}
        return {"kind": "str"} if str in scalars else None
    if typing.get_origin(hint) is typing.Literal:
        return {"kind": "str", "choices": list(typing.get_args(hint))}
    if typing.get_origin(hint) is list:
        return {"kind": KINDS[typing.get_args(hint)[0]], "num_values": [1, None]}
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return {"kind": KINDS[items[0]], "num_values": [len(items), len(items)]}
    return {"kind": KINDS[hint]} if hint in KINDS else None


def docstrings(cls: type) -> dict[str, str]:
    """Return, for each field, the string literal below it, over all base classes."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(base)).body[0]).body
        for statement, below in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[statement.target.id] = str(below.value.value)
    return found


def megatron_rows() -> Iterator[Row]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    seen = {item.name for section in SECTIONS for item in dataclasses.fields(section)} | set(SET_BY_SLIME)
    for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        hints, helps = typing.get_type_hints(cls), docstrings(cls)
        for item in dataclasses.fields(cls):
            shape = field_type(hints[item.name])
            if item.name in seen or item.name.startswith("_") or shape is None:
                continue
            seen.add(item.name)
            dashed = item.name.replace("_", "-")
            on, off = boolean_spellings(dashed) if shape["kind"] == "bool" else ([f"--{dashed}"], [])
            more_on, more_off = SPELLINGS.get(item.name, ([], []))
            own_names = item.metadata.get("argparse_meta", {}).get("arg_names", [])
            if shape["kind"] == "bool" and item.default is True:  # Megatron's flag turns it off
                more_off = [*more_off, *own_names]
            else:
                more_on = [*more_on, *own_names]
            yield tidy(
                {"name": item.name, **shape, "on": on + more_on, "off": off + more_off}
                | {"default": plain_default(item.default), "help": one_line(helps.get(item.name))}
            )


# --- router -----------------------------------------------------------------------------------------------------


def router_rows() -> Iterator[Row]:
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(add_help=False)
    RouterArgs.add_cli_args(parser, use_router_prefix=True, exclude_host_port=True)
    for action in parser._actions:  # argparse has no public list of its actions
        flags = [name for name in action.option_strings if name.startswith("--router-")]
        if not flags:
            continue
        is_bool = isinstance(action, argparse._StoreTrueAction)
        several = action.nargs in ("*", "+")
        yield tidy(
            {
                "name": flags[0].removeprefix("--router-").replace("-", "_"),
                "kind": "bool" if is_bool else KINDS.get(action.type, "str"),  # type: ignore[arg-type]
                "on": flags,
                "off": ["--router-no-" + flags[0].removeprefix("--router-")] if is_bool else [],
                "num_values": [0 if action.nargs == "*" else 1, None] if several else None,
                "choices": sorted(str(choice) for choice in action.choices or ()),
                "default": plain_default(action.default),
                "help": one_line(action.help),
            }
        )


# --- SGLang -----------------------------------------------------------------------------------------------------


def literal(node: ast.expr | None) -> Any:
    """Return the value of a constant expression, or None if it is not constant."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def words_of(node: ast.expr | None) -> str | None:
    """Return a help text: a constant, or the constant at the beginning of a composed string."""
    while isinstance(node, ast.BinOp | ast.JoinedStr):
        node = node.left if isinstance(node, ast.BinOp) else next(iter(node.values), None)
    return literal(node)


KEYWORDS = {"help", "choices", "aliases", "cli_name", "type_parser", "nargs", "required", "action", "action_kwargs"}
KEYWORDS |= {"const", "no_cli", "resolvable", "fallback", "type", "default", "dest", "new_flag"}
"""Keywords of `Arg(...)` and `add_argument(...)` in SGLang's source; another word may change what a flag means."""
ACTIONS = {"store_true", "argparse.BooleanOptionalAction", "LoRAPathAction", "DeprecatedStoreTrueAction"}

FROM_WORDS = {"Union[set[str], List[str]]": "List[str]", "Union[str, Dict]": "str"}
"""Union types of which SGLang's parser makes only one form."""


def sglang_shape(text: str, metadata: dict[str, ast.expr]) -> Row:
    """Return kind and shape from the text of a type, `T` of `A[T, Arg(...)]`, and the Arg's keywords.

    Choices that SGLang computes when it starts are unknown here: any value passes, and SGLang checks it.

    Raises:
        ValueError: they cannot be read.
    """
    if unknown := sorted(set(metadata) - KEYWORDS):
        raise ValueError(f"it has {', '.join(unknown)}")
    action = ast.unparse(metadata["action"]).strip("'\"") if "action" in metadata else None
    if action is not None and action not in ACTIONS:
        raise ValueError(f"its action is {action}")
    if (wrapped := re.fullmatch(r"Optional\[(.*)\]", text)) is not None:
        text = wrapped[1]
    text = FROM_WORDS.get(text, text)
    if "type_parser" in metadata and ast.unparse(metadata["type_parser"]) == "human_readable_int":
        return {"kind": "int", "suffixes": True}
    if "type_parser" in metadata:  # SGLang parses such values itself, from one word
        return {"kind": "str"}
    choices = literal(metadata.get("choices"))
    if text.startswith("Literal["):
        choices = choices or [each for each in ast.literal_eval(text.removeprefix("Literal")) if each is not None]
        text = "str"
    nargs = literal(metadata.get("nargs"))
    several = "List[" in text or nargs in ("*", "+")
    inner = re.fullmatch(r"[Ll]ist\[(\w+)\]|(\w+)", text)
    kinds = {"bool": "bool", "int": "int", "float": "float", "str": "str"}
    kind = kinds.get((inner[1] or inner[2]) if inner is not None else "")
    if kind is None and action != "LoRAPathAction":
        raise ValueError(f"its type is {text}")
    row: Row = {"kind": kind or "str", "choices": [str(choice) for choice in choices] if choices else []}
    return row | ({"num_values": [0 if nargs == "*" else 1, None]} if several else {})


def passed_on(spelled: list[str]) -> list[str]:
    """Return SGLang's spellings with slime's prefix."""
    return ["--sglang-" + text.removeprefix("--") for text in spelled]


def sglang_row(item: ast.AnnAssign, by_hand: set[str]) -> Row | None:
    """Return the row of one field `name: A[T, help or Arg(...)] = default`; None if it has no flag.

    Args:
        by_hand: flags that SGLang adds one by one, for fields that are marked as having none.

    Raises:
        ValueError: the field has a flag that cannot be read.
    """
    annotation = item.annotation
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("A", "Annotated")):
        return None
    name = ast.unparse(item.target)
    try:
        hint, described, *_ = typing.cast(ast.Tuple, annotation.slice).elts
        if isinstance(described, ast.Call) and ast.unparse(described.func) != "Arg":
            return None  # SGLang derives this value
        if isinstance(described, ast.Call) and (described.args or any(word.arg is None for word in described.keywords)):
            raise ValueError("its Arg has arguments without a name")
        metadata = (
            {str(word.arg): word.value for word in described.keywords}
            if isinstance(described, ast.Call)
            else {"help": described}
        )
        spelled = literal(metadata.get("cli_name")) or "--" + name.replace("_", "-")
        if literal(metadata.get("no_cli")) and spelled not in by_hand:
            return None
        shape = sglang_shape(ast.unparse(hint), metadata)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"SGLang's field {name}, line {item.lineno}, cannot be read: {error}") from error
    optional_action = "BooleanOptionalAction" in ast.unparse(metadata["action"]) if "action" in metadata else False
    return tidy(
        {"name": name, **shape, "on": passed_on([spelled, *(literal(metadata.get("aliases")) or [])])}
        | {"help": one_line(words_of(metadata.get("help")))}
        | {"off": ["--sglang-no-" + spelled.removeprefix("--")] if optional_action else []}
        | {"default": plain_default(literal(item.value))}
    )


def sglang_call_row(call: ast.Call) -> Row:
    """Return the row of `parser.add_argument("--name", ...)`, by which SGLang adds a flag with computed choices.

    Raises:
        ValueError: it cannot be read.
    """
    spelled = [literal(word) for word in call.args]
    metadata = {str(word.arg): word.value for word in call.keywords}
    if not spelled or not all(isinstance(word, str) and word.startswith("--") for word in spelled):
        raise ValueError(f"SGLang's add_argument, line {call.lineno}, cannot be read: {ast.unparse(call)[:100]}")
    switch = "action" in metadata and "StoreTrue" in ast.unparse(metadata["action"]).title().replace("_", "")
    try:
        shape = sglang_shape("bool" if switch else ast.unparse(metadata.get("type", ast.Name("str"))), metadata)
    except ValueError as error:
        raise ValueError(f"SGLang's {spelled[0]}, line {call.lineno}, cannot be read: {error}") from error
    name = literal(metadata.get("dest")) or str(spelled[0]).removeprefix("--").replace("-", "_")
    return tidy({"name": name, **shape, "on": passed_on(spelled), "help": one_line(words_of(metadata.get("help")))})


def sglang_rows(wheel: Path) -> Iterator[Row]:
    """Return one row for each flag of SGLang's own parser.

    Raises:
        ValueError: a flag cannot be read.
    """
    with zipfile.ZipFile(wheel) as archive:
        parser = ast.parse(archive.read("sglang/srt/server_args.py"))
        calls = [node for node in ast.walk(parser) if isinstance(node, ast.Call)]
        added = [call for call in calls if ast.unparse(call.func).endswith(".add_argument")]
        by_hand = {literal(word) for call in added for word in call.args}
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"sglang/srt/arg_groups/fields/\w+\.py", n))
        seen: set[str] = set()
        for name in names:
            for statement in ast.walk(ast.parse(archive.read(name))):
                if isinstance(statement, ast.AnnAssign) and (row := sglang_row(statement, by_hand)) is not None:
                    seen.update(row["on"])
                    yield row
        yield from (row for row in map(sglang_call_row, added) if seen.isdisjoint(row["on"]))


def table_text(made_from: str, rows: Iterator[Row]) -> str:
    """Return the text of the file, one row per line, so that a diff is easy to read."""
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{"made_from": {json.dumps(made_from)}, "flags": [\n{lines}\n]}}\n'


def table(source: str, wheel: Path | None = None) -> str:
    """Return the text of `<source>_flags.json`, made from the installed package (SGLang: from the wheel)."""
    if source == "megatron":
        return table_text(f"megatron-core {importlib.metadata.version('megatron-core')}", megatron_rows())
    if source == "router":
        return table_text(f"sglang-router {importlib.metadata.version('sglang-router')}", router_rows())
    if wheel is None:
        raise ValueError("--sglang-wheel: sglang's table is made from its wheel; `pip download sglang --no-deps` it")
    return table_text(" ".join(wheel.name.split("-")[:2]), sglang_rows(wheel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", choices=["megatron", "router", "sglang"])
    parser.add_argument("--sglang-wheel", type=Path)
    options = parser.parse_args()
    for source in options.sources:
        path = CONFIG / f"{source}_flags.json"
        path.write_text(table(source, options.sglang_wheel), encoding="utf-8")
        print(f"{path}: {path.read_text(encoding='utf-8').count(chr(10)) - 2} flags")


if __name__ == "__main__":
    main()
