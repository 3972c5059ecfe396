#!/usr/bin/env python3
"""Make an HF directory with random weights, for any supported architecture, without a download.

Use it to test memory, speed and scripts at real size.

    python tools/make_random_checkpoint.py --from-args scripts/models/qwen3-0.6B.sh --out outputs/qwen3-0.6B-random
    python tools/make_random_checkpoint.py --config SOME_MODEL/config.json --num-layers 8 --out outputs/eight-layers

This writes config.json, generation_config.json, safetensors, and a byte-level tokenizer with a chat template whose ids
are inside the vocabulary. Matrices are normal(0, 0.02), norms 1, biases 0. Weights are made one tensor at a time, on a
GPU if there is one, and held one shard at a time. The same seed on the same kind of device gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.parse import load_args
from slime.core.architecture import Architecture
from slime.models.families import FAMILIES
from slime.models.hf_files import write_hf

STD = 0.02
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PAD_TOKEN, END_TOKEN = "<|endoftext|>", "<|user|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(model_max_length: int) -> Any:
    """Return a tokenizer with one token for each byte, and the special tokens: every text has ids, all below 261."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def shape_of_script(script: Path, num_layers: int | None) -> Architecture:
    """Return the architecture described by MODEL_ARGS in a script such as scripts/models/qwen3-0.6B.sh."""
    command = 'source "$1" && printf "%s\\0" "${MODEL_ARGS[@]}"'
    done = subprocess.run(["bash", "-euc", command, "bash", str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"--from-args {script}: bash cannot read MODEL_ARGS from it: {done.stderr.strip()}")
    words = done.stdout.split("\0")[:-1] + ([] if num_layers is None else ["--num-layers", str(num_layers)])
    args, problems = load_args([*words, "--dry-run"], training=False)
    if args.architecture is None:
        raise ValueError("\n".join([f"--from-args {script} describes no model:", *map(str, problems)]))
    return args.architecture


def shape_of_config(config: Path, num_layers: int | None) -> Architecture:
    """Return the architecture described by a config.json, or by the one in a directory.

    Raises:
        ValueError: it is a file with another name.
    """
    if not config.is_dir() and config.name != "config.json":
        raise ValueError(f"--config {config}: is neither a directory nor called config.json; name one of the two")
    values = read_hf_config(config if config.is_dir() else config.parent)
    return hf_architecture(values if num_layers is None else {**values, "num_hidden_layers": num_layers})


def hf_config(arch: Architecture) -> Any:
    """Return the transformers config for `arch`.

    Raises:
        ValueError: the vocabulary is too small for the tokenizer, or the family cannot have this shape.
    """
    import transformers

    tokens = len(SPECIAL_TOKENS) + 256
    if arch.vocab_size < tokens:
        raise ValueError(f"a vocabulary of {arch.vocab_size} has no room for the tokenizer's {tokens} bytes and roles")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **asdict(arch.rope_scaling)}
    family = FAMILIES[arch.family]
    if family.partial_rotary:
        rope["partial_rotary_factor"] = arch.rotary_percent
    config = getattr(transformers, f"{family.transformers_class}Config")(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.norm_epsilon,
        tie_word_embeddings=arch.tied_embeddings,
        rope_parameters=rope,
        pad_token_id=SPECIAL_TOKENS.index(PAD_TOKEN),
        eos_token_id=[SPECIAL_TOKENS.index(PAD_TOKEN), SPECIAL_TOKENS.index(END_TOKEN)],
        bos_token_id=None,
        **{key: getattr(arch, name) for name, key in family.hf_keys.items()},
        **family.write(arch),
    )
    read_back = hf_architecture(config.to_dict())
    if read_back != arch:
        raise ValueError(f"{type(config).__name__} cannot express all of {arch}: it reads back as {read_back}")
    return config


def random_tensors(config: Any, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model's own state_dict; a tied output layer is the embedding, and is left out."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for index, (name, meta) in enumerate(model.state_dict().items()):
        if name == tied:
            continue
        if name.endswith("norm.weight"):
            yield name, torch.ones(meta.shape, dtype=dtype)
        elif name.endswith("bias"):
            yield name, torch.zeros(meta.shape, dtype=dtype)
        else:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            for own, size in in_file(name, meta.shape):
                yield own, torch.empty(size, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)


def in_file(name: str, size: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """Yield the names and sizes that a tensor has in files, where each expert has its own; transformers fuses them."""
    head, _, kind = name.rpartition(".experts.")
    if not head:
        yield name, size
        return
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for expert in range(size[0]):
        for part in parts:
            yield f"{head}.experts.{expert}.{part}.weight", torch.Size([size[1] // len(parts), size[2]])


def make_checkpoint(arch: Architecture, out: Path, *, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the directory; an earlier one is replaced.

    Raises:
        ValueError: `out` is something else than an HF directory, or no model of this shape can be made.
    """
    config = hf_config(arch)
    config.architectures = [f"{FAMILIES[arch.family].transformers_class}ForCausalLM"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".side_files_", dir=out.parent) as directory:
        side = Path(directory)
        make_tokenizer(arch.max_position_embeddings).save_pretrained(side)
        config.save_pretrained(side)
        ids = {"pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id}
        (side / "generation_config.json").write_text(json.dumps({"do_sample": True, **ids}, indent=2) + "\n")
        write_hf(out, random_tensors(config, seed, dtype), side, dtype)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-args", type=Path, help="a script that sets MODEL_ARGS")
    source.add_argument("--config", type=Path, help="a config.json, or the directory that has it")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; an HF directory there is replaced")
    parser.add_argument("--num-layers", type=int, help="the number of layers, instead of the source's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    if args.num_layers is not None and args.num_layers < 1:
        raise ValueError(f"--num-layers {args.num_layers}: a model has at least one layer; give 1 or more")

    start = time.monotonic()
    if args.from_args is not None:
        arch = shape_of_script(args.from_args, args.num_layers)
    else:
        arch = shape_of_config(args.config, args.num_layers)
    make_checkpoint(arch, args.out, seed=args.seed, dtype=DTYPES[args.dtype])
    millions = arch.num_parameters() / 1e6
    seconds = time.monotonic() - start
    print(f"{arch.family}, {arch.num_layers} layers, {millions:,.1f} M parameters, {seconds:.1f} s -> {args.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"make_random_checkpoint.py: {error}")
