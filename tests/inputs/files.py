"""Hostile files and directories, each under the name by which command lines use it.

- Used by: `lines` draws from them.
- Invariant: every call makes the same content, and writes nothing outside the folder.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.config.config_run import GLM4_TINY as CONFIG
from tests.config.config_run import MESSAGE as ROW

TOKENIZER: dict[str, Any] = {
    "model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(20)}, "unk_token": "t0"},
    "added_tokens": [{"id": 20, "content": "<|end|>", "special": True}],
}
SETTINGS: dict[str, Any] = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
DEEP = 100_000

ODD_NUMBERS = (
    "0",
    "-1",
    "1.5",
    "1e999",
    "NaN",
    "-Infinity",
    "true",
    "null",
    '"4"',
    "[]",
    "{}",
    str(10**9),
    str(10**30),
)
ODD_JSON: dict[str, str] = {
    "empty": "",
    "not-json": "{",
    "list": "[]",
    "text": '"config"',
    "number": "7",
    "null": "null",
    "nothing": "{}",
    "deep": "[" * DEEP + "]" * DEEP,
    "deep-objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "twice": '{"model_type": "glm4", "model_type": "llama"}',
    "nul": '{"a": "\\u0000"}',
    "surrogate": '{"model_type": "\\ud800"}',
    "digits": '{"hidden_size": ' + "9" * 5000 + "}",
}


def write_hf(path: Path) -> str:
    """Write a valid HF directory."""
    path.mkdir()
    for name, content in {
        "config.json": CONFIG, "tokenizer.json": TOKENIZER, "tokenizer_config.json": SETTINGS
    }.items():  # fmt: skip
        (path / name).write_text(json.dumps(content))
    return str(path)


def write_prompts(path: Path) -> str:
    """Write a valid data file."""
    path.write_text(json.dumps(ROW) + "\n")
    return str(path)


def hf_directories(folder: Path) -> list[Path]:
    """Write HF directories, each with one fault."""
    made: list[Path] = []

    def add(name: str, config: str | bytes | None, tokenizer: str | None = None, settings: str | None = None) -> Path:
        path = folder / f"hf-{name}"
        path.mkdir()
        if config is not None:
            (path / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
        (path / "tokenizer.json").write_text(json.dumps(TOKENIZER) if tokenizer is None else tokenizer)
        (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS) if settings is None else settings)
        made.append(path)
        return path

    good = json.dumps(CONFIG)
    add("without-config", None)
    add("latin1", b'{"model_type": "\xff"}')
    for name, text in ODD_JSON.items():
        add(f"config-{name}", text)
        add(f"tokenizer-{name}", good, tokenizer=text)
        add(f"settings-{name}", good, settings=text)
        path = add(f"index-{name}", good)
        (path / "model.safetensors.index.json").write_text(text)
        path = add(f"generation-{name}", good)
        (path / "generation_config.json").write_text(text)
    for key in CONFIG:
        for at, value in enumerate(ODD_NUMBERS):
            rest = json.dumps({other: CONFIG[other] for other in CONFIG if other != key})
            add(f"{key}-{at}", f'{{"{key}": {value}, {rest[1:]}')
        add(f"{key}-missing", json.dumps({other: CONFIG[other] for other in CONFIG if other != key}))
    for key in ("rope_theta", "partial_rotary_factor", "rope_type", "factor"):
        for at, value in enumerate(ODD_NUMBERS):
            rope = f'{{"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "{key}": {value}}}'
            rest = json.dumps({other: CONFIG[other] for other in CONFIG if other != "rope_parameters"})
            add(f"rope-{key}-{at}", f'{{"rope_parameters": {rope}, {rest[1:]}')
    for at, value in enumerate(ODD_NUMBERS):
        for key in ("eos_token_id", "hidden_act", "use_sliding_window", "layer_types", "quantization_config"):
            add(f"{key}-{at}", f'{{"{key}": {value}, {good[1:]}')
        moe = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "norm_topk_prob"):
            rest = json.dumps({other: entry for other, entry in moe.items() if other != key})
            add(f"moe-{key}-{at}", f'{{"{key}": {value}, {rest[1:]}')
        add(f"ids-{at}", good, tokenizer=f'{{"model": {{"vocab": {{"a": {value}}}}}, "added_tokens": [{value}]}}')
        add(
            f"vocab-{at}", good, tokenizer=f'{{"model": {{"vocab": [{value}, [{value}, 1]]}}, "added_tokens": {value}}}'
        )
        add(f"model-{at}", good, tokenizer=f'{{"model": {value}}}')
        add(f"eos-{at}", good, settings=f'{{"eos_token": {value}, "chat_template": {value}}}')
        path = add(f"map-{at}", good)
        (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {value}}}')
        path = add(f"maps-{at}", good)
        (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {value}}}}}')
        path = add(f"offsets-{at}", good)
        header = f'{{"a": {{"data_offsets": [0, {value}]}}, "b": {value}}}'.encode()
        (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name, target in (("outside", "../../../etc/passwd"), ("nul", "a\0b"), ("long", "x" * 5000)):
        path = add(f"map-{name}", good)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    deep = ("[" * DEEP + "]" * DEEP).encode()
    path = add("header-deep", good)
    (path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    path = add("header-huge", good)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write((2**40).to_bytes(8, "little"))
        stream.truncate(2**41)
    path = add("config-huge", None)
    with (path / "config.json").open("wb") as stream:
        stream.truncate(2**40)
    for name, file in (("config", "config.json"), ("tokenizer", "tokenizer.json"), ("weights", "model.safetensors")):
        path = add(f"fifo-{name}", good)
        (path / file).unlink(missing_ok=True)
        os.mkfifo(path / file)
        path = add(f"directory-{name}", good)
        (path / file).unlink(missing_ok=True)
        (path / file).mkdir()
        path = add(f"zero-{name}", good)
        (path / file).unlink(missing_ok=True)
        (path / file).symlink_to("/dev/zero")
        path = add(f"loop-{name}", good)
        (path / file).unlink(missing_ok=True)
        (path / file).symlink_to(file)
        path = add(f"memory-{name}", good)
        (path / file).unlink(missing_ok=True)
        (path / file).symlink_to("/proc/self/mem")
    return made


def _line(**more: str) -> bytes:
    """Return a row of a data file; the values are JSON texts."""
    fields = {"prompt": '"1 + 1"', "label": '"2"'} | more
    return ("{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n").encode()


def odd_values() -> dict[str, str]:
    """Return JSON texts for one value of a data line."""
    values = dict(enumerate(ODD_NUMBERS)) | {
        "deep": "[" * DEEP + "]" * DEEP,
        "deep-500": "[" * 500 + "]" * 500,
        "deep-objects": '{"a":' * 900 + "1" + "}" * 900,
        "nul": '"a\\u0000b"',
        "surrogate": '"a\\ud800b"',
        "pair": '"\\ud83d\\ude00"',
        "huge": "9" * 5000,
        "over-64-bits": str(2**64),
        "negative": str(-(2**63) - 1),
        "long": '"' + "x" * 300_000 + '"',
        "empty": '""',
        "blank": '"   "',
        "right-to-left": '"\u202e\u2066"',
        "messages": '[{"role": "user", "content": "x"}]',
        "messages-odd": '[{"role": 7, "content": {"a": [null]}}]',
        "messages-none": '[{"role": null}]',
        "messages-null": '[{"role": "user", "content": null}]',
        "messages-prefill": '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]',
        "messages-call": '[{"role": "assistant", "content": null, "tool_calls": [{"a": 1}]}]',
        "messages-calls": '[{"role": "assistant", "tool_calls": 7}, {"role": "tool", "content": [null, 7, []]}]',
        "messages-parts": '[{"role": "critic", "content": [{"type": "text", "text": "x"}]}]',
        "messages-image": '[{"role": "user", "content": [{"type": "image_url", "text": {"a": 1}}]}]',
        "parts": '[{"type": "text", "text": 7}, {"type": ["text"]}, {}]',
        "unclosed": '"a',
        "rm": '{"rm_type": ["x"]}',
        "rm-object": '{"rm_type": {"a": 1}}',
        "rm-text": '{"rm_type": "\\u0007"}',
    }
    return {str(name): value for name, value in values.items()}


def prompt_files(folder: Path) -> list[Path]:
    """Write data files, each with one fault, or unusual but valid."""
    good = json.dumps(ROW).encode() + b"\n"
    contents: dict[str, bytes] = {
        "empty": b"",
        "blank": b"\n\n \n",
        "bom": b"\xef\xbb\xbf" + good,
        "utf16": b"\xff\xfe" + good.decode().encode("utf-16-le"),
        "crlf": good.replace(b"\n", b"\r\n"),
        "no-newline": good.rstrip(),
        "nul-bytes": b"\0" * 1000 + b"\n",
        "zeros": b"\0" * 3_000_000,
        "latin1": b'{"prompt": "\xe9", "label": "1"}\n',
        "gzip": gzip.compress(good * 100)[:-10],
        "zstd": b"\x28\xb5\x2f\xfd" + b"\n{" * 100,
        "zip": b"PK\x03\x04" + b"\n{" * 100,
        "parquet-as-jsonl": b"PAR1" + b"\n{" * 100,
        "brackets": b"[" * 3_000_000,
        "twice": b'{"prompt": "a", "prompt": "b", "label": "1"}\n',
        "keys": b'{"": "a", "pr\\u006fmpt": "b", "label": "1"}\n',
        "pretty": json.dumps(ROW, indent=2).encode(),
        "array": json.dumps([ROW]).encode(),
    }
    for name, value in odd_values().items():
        for key in ("prompt", "label", "metadata", "tools", "unused"):
            contents[f"{key}-{name}"] = _line(**{key: value})
        contents[f"deeper-{name}"] = _line(metadata=f'{{"a": [{value}]}}')
        contents[f"content-{name}"] = _line(prompt=f'[{{"role": "user", "content": {value}}}]')
    made = [folder / f"prompts-{name}.jsonl" for name in contents]
    for path, content in zip(made, contents.values(), strict=True):
        path.write_bytes(content)
    return [*made, *_parquet_files(folder)]


def _parquet_files(folder: Path) -> list[Path]:
    text = pyarrow.array(["1 + 1"])
    columns: dict[str, pyarrow.Array] = {
        "text": text,
        "null": pyarrow.array([None], pyarrow.string()),
        "binary": pyarrow.array([b"\xff\x00"]),
        "decimal": pyarrow.array(["1.5"]).cast(pyarrow.decimal128(38, 10)),
        "timestamp": pyarrow.array([2**62], pyarrow.timestamp("ms")),
        "nanoseconds": pyarrow.array([2**62 + 1], pyarrow.timestamp("ns")),
        "date": pyarrow.array([2**31 - 1], pyarrow.date32()),
        "duration": pyarrow.array([1], pyarrow.duration("ms")),
        "nan": pyarrow.array([float("nan")]),
        "inf": pyarrow.array([float("inf")]),
        "uint64": pyarrow.array([2**64 - 1], pyarrow.uint64()),
        "nested": pyarrow.array([[[[["a"]]]]]),
        "struct": pyarrow.array([{"role": "user", "content": None}]),
        "map": pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "nul": pyarrow.array(["a\0b"]),
        "not-utf8": pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers()),
    }
    made: list[Path] = []
    for key in ("prompt", "label", "metadata", "tools"):
        for name, column in columns.items():
            table = {"prompt": text, "label": text} | {key: column}
            path = folder / f"prompts-{key}-{name}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(table), path)
            made.append(path)
    whole = made[0].read_bytes()
    for name, content in {
        "empty": b"",
        "short": whole[:-20],
        "middle": whole[:10] + b"\xff" * 40 + whole[50:],
        "footer": whole[:-60] + b"\xff" * 40 + whole[-20:],
        "text": b'{"prompt": "a"}',
        "magic": b"PAR1" * 3,
    }.items():
        path = folder / f"prompts-broken-{name}.parquet"
        path.write_bytes(content)
        made.append(path)
    return made


def yaml_files(folder: Path) -> list[Path]:
    """Write YAML configuration files, each with one fault, or unusual but valid."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    merges = "a: &a {lr: 1}\n" + "".join(
        f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    contents: dict[str, str | bytes] = {
        "empty": "",
        "list": "- lr",
        "text": "lr",
        "number": "7",
        "two": "lr: 1\n---\nlr: 2\n",
        "python": "lr: !!python/object/apply:os.system ['true']\n",
        "python-key": "!!python/name:os.system : 1\n",
        "binary": "save: !!binary aGVsbG8=\n",
        "set": "rollout_stop: !!set {a, b}\n",
        "omap": "rollout_stop: !!omap [a: 1, b: 2]\n",
        "tag": "lr: !mine 1\n",
        "bomb": bomb,
        "bomb-used": bomb + "rollout_stop: *i\n",
        "bomb-value": bomb + "lr: *i\n",
        "merges": merges + "<<: *i\n",
        "merge": "<<: {lr: 1}\n",
        "itself": "rollout_stop: &a [*a]\n",
        "itself-key": "&a {lr: *a}\n",
        "twice": "lr: 1\nlr: 2\n",
        "twice-spelt": "save_interval: 1\nsave-interval: 2\n",
        "twice-quoted": "lr: 1\n'lr': 2\n",
        "twice-merged": "<<: {save-interval: 1}\nsave_interval: 2\n",
        "twice-off": "balance_data: true\nno_balance_data: true\n",
        "keys": "1: 2\ntrue: 3\nnull: 4\n2020-01-01: 5\n1.5: 6\n? [a, b]\n: 7\n",
        "key-mapping": "? {a: b}\n: 1\n",
        "dates": "save: 2020-01-01\nlr: 2001-12-14t21:59:43.10-05:00\n",
        "octal": "num_rollout: 010\nlabel_key: 0123\n",
        "sexagesimal": "num_rollout: 1:30\n",
        "hex": "num_rollout: 0x10\n",
        "booleans": "save: yes\nrm_type: on\nbalance_data: off\n",
        "infinite": "lr: .inf\nweight_decay: .nan\n",
        "nulls": "".join(f"{name}: null\n" for name in ("lr", "save", "num_rollout", "rollout_stop", "balance_data")),
        "objects": "lr: {a: 1}\nsave: {b: [1]}\nrollout_stop: [{}]\nrollout_stop_token_ids: [[1]]\n",
        "empty-lists": "rollout_stop: []\neval_prompt_data: []\nspec: []\nmoe_layer_freq: []\n",
        "layers": "moe_layer_freq: [true, a]\n",
        "layers-deep": "moe_layer_freq: " + "[" * 50 + "]" * 50,
        "deep": "lr: " + "[" * 20_000 + "]" * 20_000,
        "deep-objects": "".join(" " * at + "a:\n" for at in range(1500)),
        "nul": 'save: "a\\0b"\n',
        "surrogate": 'save: "a\\ud800"\n"\\ud800": 1\n',
        "control": 'save: "a\\e[31m"\n',
        "long": "save: " + "x" * 100_000 + "\n",
        "long-key": "x" * 100_000 + ": 1\n",
        "many": "".join(f"unknown_flag_{at}: 1\n" for at in range(3000)),
        "digits": "num_rollout: " + "9" * 5000 + "\n",
        "float-digits": "lr: 1e" + "9" * 5000 + "\n",
        "latin1": b"save: \xff\n",
        "utf16": "lr: 1\n".encode("utf-16"),
        "bom": b"\xef\xbb\xbflr: 1e-6\n",
        "crlf": b"lr: 1e-6\r\n",
        "tabs": "lr:\t1\n\tsave: a\n",
        "bad": "lr: [",
        "alias": "lr: *nothing\n",
        "nested-config": "config: other.yaml\n",
        "help": "help: true\n",
        "big": "#" * 2_000_000,
        "datasets": "datasets: [{name: a, path: b}]\n",
    }
    made = [folder / f"config-{name}.yaml" for name in contents]
    for path, content in zip(made, contents.values(), strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return made


def eval_files(folder: Path, prompts: list[Path]) -> list[Path]:
    """Write files for --eval-config."""
    entries = [
        "[]", "{}", "x", "[x]", "[[]]", "[{}]", "null", "[null]", "[{name: a}]", "[{name: [a], path: {b: c}}]",
        "[{name: null, path: null}]", f"[{{name: a, path: {prompts[0]}, temperature: {{a: 1}}}}]",
        f"[{{name: a, path: {prompts[0]}, eval_temperature: 1, temperature: 2}}]",
        f"[{{name: {'x' * 5000}, path: {prompts[0]}}}]", f"[{{name: \"a\\u0007/../b\", path: {prompts[0]}}}]",
        f"[{{name: \"\\ud800\", path: {prompts[0]}}}]", f"[{{1: 2, null: 3, name: a, path: {prompts[0]}}}]",
        f"[{{name: a, path: {prompts[0]}, n_samples_per_eval_prompt: {10**30}}}]",
        f"[{{name: a, path: {prompts[0]}, rm_type: [x], label_key: 7}}]",
        "[{name: 1.0, path: 2020-01-01, top_k: 1e3}]", "[{name: a, name: b, path: c}]",
        f"[{{name: a, path: {prompts[0]}, top_p: 1, top-p: 1}}]", f"[{{name: a, path: {prompts[0]}, top-p: .inf}}]",
        f"[{{name: a, path: {prompts[0]}, eval-failed-as: 7, failed_as: wrong}}]",
        f"[{{name: a, path: \"{prompts[0]}@[{'9' * 5000}:]\"}}]",
    ]  # fmt: skip
    contents = [f"datasets: {entry}\n" for entry in entries] + ["datasets: [{name: a, path: b}]\nother: 1\n"]
    contents += ["defaults: &d {temperature: 0}\ndatasets: [{<<: *d, name: a, path: b}]\n"]
    made = [folder / f"eval-{at}.yaml" for at in range(len(contents))]
    for path, content in zip(made, contents, strict=True):
        path.write_text(content)
    return made


HOOKS = {
    "raises": "raise RuntimeError('on import;\\nof: its own')",
    "exits": "import sys; sys.exit(3)",
    "leaves": "raise SystemExit",
    "asserts": "assert False",
    "generator": "raise GeneratorExit",
    "syntax": "def (",
    "prints": "print('hello')\ndef f(args, sample): return 1.0",
    "latin1": b"# \xff\n",
    "nul": b"a = 1\0\n",
    "deep": "a = " + "(" * 500 + ")" * 500,
    "attribute": "def __getattr__(name): raise RuntimeError(name)",
    "hostile": (
        "class Meta(type):\n"
        "    def __call__(cls, *a): raise RuntimeError\n"
        "    @property\n"
        "    def __signature__(cls): raise RuntimeError('signature')\n"
        "    def __repr__(cls): raise RuntimeError('repr')\n"
        "class f(metaclass=Meta): pass\n"
        "class G:\n"
        "    def __repr__(self): raise RuntimeError('repr')\n"
        "g = G()\n"
        "def wrong(): pass\n"
        "async def later(args, sample): pass\n"
        "number = 7\n"
        "def f2(*, args): pass\n"
    ),
    "warns": "import warnings; warnings.warn('odd')\nf = 1",
    "recursion": "def f(): return f()\nf()",
    "itself": "import hostile_itself\nhostile_itself.nothing",
}


def hook_paths(folder: Path) -> list[str]:
    """Return dotted paths for hooks, and write their modules into `folder`."""
    for name, text in HOOKS.items():
        (folder / f"hostile_{name}.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    paths = [f"hostile_{name}.f" for name in HOOKS]
    paths += [f"hostile_hostile.{name}" for name in ("f", "g", "wrong", "later", "number", "f2", "no")]
    return [
        *paths, "..", ".", "...", ".x", "a.", "a.b.", "a..b", "", " ", "x", "print", "builtins.print", "builtins.type",
        "builtins.dict", "builtins.None", "builtins.__build_class__", "os.path", "os.", "sys.exit", "a/b.c", "../x.y",
        "os.path.join.x", "é.ü", "a b.c", "json.loads;", "x" * 5000, "x" * 300 + ".y", ".".join("a" * 3000), "1.2",
        "a\nb.c", "\x1b[31m.x", "hostile_raises.f; rm", "slime.rollout.nothing", "slime.nothing.f", "slime..f",
        "slime.core.plugins.HOOKS", "slime.rollout.collect.generate_rollout", "__main__.f", "lambda.x",
        "hostile\udcff.f",
    ]  # fmt: skip


def special_paths(folder: Path) -> list[str]:
    """Return paths that are no file or directory that a run may read or write."""
    plain = folder / "a-file"
    plain.write_text("x")
    loop = folder / "a-loop"
    loop.symlink_to(loop)
    fifo = folder / "a-fifo.jsonl"
    os.mkfifo(fifo)
    directory = folder / "a-directory.jsonl"
    directory.mkdir()
    huge = folder / "a-huge.jsonl"
    with huge.open("wb") as stream:
        stream.truncate(2**40)
    endless = folder / "a-zero.jsonl"
    endless.symlink_to("/dev/zero")
    return [
        *map(str, (folder, plain, loop, fifo, directory, huge, endless)),
        f"{plain}/below", f"{folder}/{'n' * 300}", f"{folder}/{'ü' * 200}", "/".join(["d" * 200] * 30), "/dev/zero",
        "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/environ", "/proc/kmsg", "/proc/self/fd/0", "/dev/stdin",
        "/dev/tty", "/sys/kernel/x", "", " ", ".", "..", "/", "~", "-", "a\nb", "nowhere.jsonl", f"{folder}/nowhere",
        f"{folder}/\udcff\udcfe", "{rollout_id}", "{x}", "{", "{0.__class__}", "{rollout_id:>999999999}",
        "{rollout_id!r:{rollout_id}}", "%s", "http://x/y", "a.jsonl@[", "a.jsonl@[1:2:3]", f"{plain}@[:]",
    ]  # fmt: skip
