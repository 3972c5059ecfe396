"""Make the demo's task: a tiny model with its own tokenizer, two-digit sums, and a careless pupil's answers.

    python3 -m slime.cli.arithmetic.make_task --out outputs/task --seed 1 [--model qwen3_moe]

This writes `model/` (an HF directory: Glm4ForCausalLM, or Qwen3MoeForCausalLM; random weights), `train.jsonl` and
`eval.jsonl` (DAPO-style lines: `prompt` is a list of OpenAI messages, `label` a string), `demonstrations.jsonl` (prompt
and `response`, for the supervised start) and `eval.yaml` (an evaluation file with two settings: the rollout's
temperature, and greedy).

The pupil guesses half of the time and forgets most carries; worked sums are right if no carry is lost. So reinforcement
learning has something to find: work instead of guessing, and carry. The split is on unordered pairs: if a+b is held
out, b+a is held out too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
THINK_TOKENS = ("<think>", "</think>")
CHARACTERS = ("\n", *map(chr, range(32, 127)))
PAD_TOKEN, END_TOKEN = "<|endoftext|>", "<|user|>"
VOCAB_SIZE = 128
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)
EVAL_CONFIG = """\
datasets:
  - {{name: sampled, path: {path}}}  # at the rollout's temperature
  - {{name: greedy, path: {path}, temperature: 0}}
"""
SPLIT_SEED = 20240614
"""All runs have the same split: the seed of a run changes weights, demonstrations, data order and sampling."""
GUESSES = 0.5
"""The share of demonstrations without any work, whose answer is up to 9 off."""
FORGOTTEN_CARRIES = 0.7

Pair = tuple[int, int]


def split_problems(low: int, high: int, num_eval: int) -> tuple[list[Pair], list[Pair]]:
    """Return all ordered pairs of low..high as (train, eval); a pair and its mirror image are on the same side.

    `eval` has `num_eval` problems, or one more.
    """
    pairs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
    rng = random.Random(SPLIT_SEED)
    rng.shuffle(pairs)
    train: list[Pair] = []
    held_out: list[Pair] = []
    for a, b in pairs:
        side = held_out if len(held_out) < num_eval else train
        side += [(a, b)] if a == b else [(a, b), (b, a)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def answer_like_a_careless_pupil(a: int, b: int, rng: random.Random) -> str:
    """Return the response to `a+b=?` after the prompt's `<think>`: digit sums, carries as separate steps, the box."""
    if rng.random() < GUESSES:
        return f"</think>\\boxed{{{max(0, a + b + rng.randint(-9, 9))}}}"
    carry, steps, digits = False, list[str](), list[str]()
    for place in (1, 10):
        left, right = a // place % 10, b // place % 10
        total = left + right
        steps.append(f"{left}+{right}={total}")
        if carry and rng.random() >= FORGOTTEN_CARRIES:
            steps.append(f"{total}+1={total + 1}")
            total += 1
        carry = total >= 10
        digits.append(str(total if place == 10 else total % 10))
    return f"{','.join(steps)}</think>\\boxed{{{int(''.join(reversed(digits)))}}}"


def make_tokenizer() -> Any:
    """Return a tokenizer: one token per character, GLM-4's special tokens, and a template that ends in `<think>`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *THINK_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _common_config() -> dict[str, Any]:
    pad, end = SPECIAL_TOKENS.index(PAD_TOKEN), SPECIAL_TOKENS.index(END_TOKEN)
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.06,
        "pad_token_id": pad,
        "eos_token_id": [pad, end],
        "bos_token_id": None,
    }


def _make_glm4() -> Any:
    """Return a Glm4ForCausalLM.

    Sandwich norms bring the output of every sub-layer to RMS 1, so an embedding of the usual std 0.02 would be
    negligible: hence larger embeddings and smaller norm weights.
    """
    import torch
    from transformers import Glm4Config, Glm4ForCausalLM

    config = Glm4Config(
        **_common_config(),
        attention_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    )
    model = Glm4ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if "post_self_attn_layernorm" in name or "post_mlp_layernorm" in name:
            torch.nn.init.constant_(parameter, 0.3)
    return model


def _make_qwen3_moe() -> Any:
    """Return a Qwen3MoeForCausalLM with two of eight experts for each token, so a token uses 0.63 M parameters."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **{**_common_config(), "head_dim": 64},  # SGLang's kernel for q and k norms with RoPE needs at least 64
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    return Qwen3MoeForCausalLM(config)


MODELS = {"glm4": _make_glm4, "qwen3_moe": _make_qwen3_moe}


def make_model(seed: int, family: str = "glm4") -> Any:
    """Return a model of about a million parameters, with the weights of this seed."""
    import torch

    torch.manual_seed(seed)
    return MODELS[family]()


def problem(pair: Pair) -> dict[str, Any]:
    """Return the data line of one sum."""
    a, b = pair
    return {"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "label": str(a + b)}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str]) -> None:
    """Write the task that the flags describe to a directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--model", choices=MODELS, default="glm4", help="family of the model")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the demonstrations")
    parser.add_argument("--num-eval", type=int, default=256, help="problems held out")
    parser.add_argument("--num-demonstrations", type=int, default=9600)
    args = parser.parse_args(argv)

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split_problems(10, 99, args.num_eval)
    rng = random.Random(args.seed)
    pupil = ((pair, answer_like_a_careless_pupil(*pair, rng)) for pair in rng.choices(train, k=args.num_demonstrations))
    write_jsonl(out / "train.jsonl", map(problem, train))
    write_jsonl(out / "eval.jsonl", map(problem, held_out))
    write_jsonl(out / "demonstrations.jsonl", ({**problem(pair), "response": response} for pair, response in pupil))
    (out / "eval.yaml").write_text(EVAL_CONFIG.format(path=(out / "eval.jsonl").resolve()))
    model = make_model(args.seed, args.model)
    model.save_pretrained(out / "model")
    make_tokenizer().save_pretrained(out / "model")
    print(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {len(train)} problems to train on, "
        f"{len(held_out)} held out, {args.num_demonstrations} demonstrations -> {out}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
