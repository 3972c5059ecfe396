"""The names that other trainers have for slime's flags, and their features that slime does not have.

- Used by: `parse`, for a flag that slime does not know.
- Invariant: a name in SYNONYMS is no flag here, and its value is one with the same meaning and unit: a name that counts
  samples has no synonym that counts prompts.

The names are those of TRL, Hugging Face's Trainer, verl and OpenRLHF, without dashes at the front and with dashes
inside. verl's are keys with dots (`actor_rollout_ref.rollout.n`); the table has their ends (`rollout.n`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        # the model
        "model": "--hf-checkpoint",
        "model-name": "--hf-checkpoint",
        "model-path": "--hf-checkpoint",
        "model-name-or-path": "--hf-checkpoint",
        "pretrain": "--hf-checkpoint",
        "model.path": "--hf-checkpoint",
        "ref-model": "--ref-load",
        "ref-pretrain": "--ref-load",
        "output-dir": "--save",
        "save-path": "--save",
        "default-local-dir": "--save",
        "resume-from-checkpoint": "--load",
        "load-checkpoint": "--load",
        "save-steps": "--save-interval",
        "save-freq": "--save-interval",
        "save-total-limit": "--keep-last-checkpoints",
        "max-ckpt-num": "--keep-last-checkpoints",
        # data
        "dataset": "--prompt-data",
        "dataset-name": "--prompt-data",
        "train-files": "--prompt-data",
        "data.train-files": "--prompt-data",
        "val-files": "--eval-prompt-data",
        "data.val-files": "--eval-prompt-data",
        "eval-dataset": "--eval-prompt-data",
        "prompt-key": "--input-key",
        "eval-steps": "--eval-interval",
        "test-freq": "--eval-interval",
        # rollouts
        "data.train-batch-size": "--rollout-batch-size",
        "steps-per-generation": "--num-steps-per-rollout",
        "max-model-len": "--rollout-max-context-len",
        "vllm-max-model-length": "--rollout-max-context-len",
        "num-generations": "--n-samples-per-prompt",
        "rollout.n": "--n-samples-per-prompt",
        "max-completion-length": "--rollout-max-response-len",
        "max-new-tokens": "--rollout-max-response-len",
        "generate-max-len": "--rollout-max-response-len",
        "max-response-length": "--rollout-max-response-len",
        "temperature": "--rollout-temperature",
        "top-p": "--rollout-top-p",
        "top-k": "--rollout-top-k",
        "num-train-epochs": "--num-epoch",
        "num-episodes": "--num-epoch",
        "total-epochs": "--num-epoch",
        "max-steps": "--num-rollout",
        "total-training-steps": "--num-rollout",
        "reward-funcs": "--custom-rm-path",
        "custom-reward-function.path": "--custom-rm-path",
        # algorithm
        "adv-estimator": "--advantage-estimator",
        "beta": "--kl-loss-coef",
        "init-kl-coef": "--kl-coef",
        "epsilon": "--eps-clip",
        "epsilon-low": "--eps-clip",
        "cliprange": "--eps-clip",
        "clip-ratio": "--eps-clip",
        "clip-ratio-low": "--eps-clip",
        "epsilon-high": "--eps-clip-high",
        "clip-ratio-high": "--eps-clip-high",
        "entropy-coeff": "--entropy-coef",
        "mask-truncated-completions": "--mask-truncated-samples",
        # optimizer
        "learning-rate": "--lr",
        "actor-learning-rate": "--lr",
        "critic-learning-rate": "--critic-lr",
        "optim.lr": "--lr",
        "optim": "--optimizer",
        "max-grad-norm": "--clip-grad",
        "max-norm": "--clip-grad",
        "warmup-steps": "--lr-warmup-iters",
        "lr-warmup-steps": "--lr-warmup-iters",
        "lr-scheduler-type": "--lr-decay-style",
        "lr-scheduler": "--lr-decay-style",
        "per-device-train-batch-size": "--micro-batch-size",
        "micro-train-batch-size": "--micro-batch-size",
        "ppo-micro-batch-size-per-gpu": "--micro-batch-size",
        "ppo-max-token-len-per-gpu": "--max-tokens-per-gpu",
        "gradient-checkpointing": "--recompute-granularity",
        # devices
        "n-gpus-per-node": "--actor-num-gpus-per-node",
        "nnodes": "--actor-num-nodes",
        "vllm-tensor-parallel-size": "--rollout-num-gpus-per-engine",
        "rollout.tensor-model-parallel-size": "--rollout-num-gpus-per-engine",
        "vllm-gpu-memory-utilization": "--sglang-mem-fraction-static",
        "gpu-memory-utilization": "--sglang-mem-fraction-static",
        "colocate-all-models": "--colocate",
        "hybrid-engine": "--colocate",
        # reports
        "report-to": "--trackers",
        "experiment-name": "--run-name",
        "project-name": "--wandb-project",
    }
)
"""Map from another trainer's name to slime's flag."""


_LORA = "LoRA is not part of this version", "leave it out: all weights are trained"
_IMAGES = "models of images and videos are not part of this version", "use a model of text"
_PAIRS = "learning from pairs of answers is not part of this version", "use a reward, or --loss-type sft_loss"
_JUDGE = "a reward model inside the run is not part of this version", "serve it, with --rm-type remote_rm --rm-url URL"
_SHARDS = "slime trains with Megatron-core", "use --use-distributed-optimizer or a parallel size (--help parallel)"
_QUANTIZED = "training of quantized weights is not part of this version", "leave it out"
_UNCUT = "a prompt is never cut", "limit prompt and response together with --rollout-max-context-len"
_ENGINE = "every rollout is generated by engines", "leave it out, or choose the engines with --rollout-engine"
_ALWAYS = "a run without --save saves, too, in a directory of its own", "--save-interval 0 saves no checkpoint"
_FOLLOWS = "it follows from --global-batch-size and --micro-batch-size", "leave it out"

ABSENT: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("lora", "qlora", "peft", "dora"), _LORA),
        **dict.fromkeys(("vlm", "vision", "image", "images", "video", "videos", "multimodal"), _IMAGES),
        **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo", "chosen-key", "rejected-key"), _PAIRS),
        **dict.fromkeys(("reward-model", "reward-pretrain", "reward-model-path", "reward-model-name-or-path"), _JUDGE),
        **dict.fromkeys(("deepspeed", "zero-stage", "fsdp", "fsdp2", "fsdp-config"), _SHARDS),
        **dict.fromkeys(("load-in-4bit", "load-in-8bit", "bnb"), _QUANTIZED),
        **dict.fromkeys(("max-prompt-length", "prompt-max-len"), _UNCUT),
        **dict.fromkeys(("use-vllm", "vllm-mode"), _ENGINE),
        "gradient-accumulation-steps": _FOLLOWS,
        "no-save": _ALWAYS,
    }
)
"""Map from a name, or one word of it (`lora` for `--lora-rank`), to the rule and the remedy."""


def _ends(spelling: str) -> list[str]:
    """Return the name in the tables' form, and its ends after each dot, the longest first."""
    parts = spelling.lstrip("-").lower().replace("_", "-").split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def synonym(spelling: str) -> str | None:
    """Return slime's flag for another trainer's name, such as `--learning_rate`; None if there is none.

    Of a key with dots, the longest end in the table counts: for `actor_rollout_ref.actor.optim.lr`, `optim.lr`.
    """
    return next((SYNONYMS[end] for end in _ends(spelling) if end in SYNONYMS), None)


def absent(name: str) -> tuple[str, str] | None:
    """Return the rule and the remedy if a flag or a value has the name of a feature that slime does not have."""
    ends = _ends(name)
    words = [word for word in re.split(r"[.-]", ends[0]) if word]
    return next((ABSENT[name] for name in (*ends, *words) if name in ABSENT), None)


def misspelt(spelling: str, known: Mapping[str, object]) -> str | None:
    """Return the known flag from which `spelling` differs by one slip in eight letters at most; None if there is none.

    The search takes milliseconds for a flag of usual length.
    """
    name = spelling.replace("_", "-")
    for candidate in get_close_matches(name, known, n=3, cutoff=0.7):
        if _slips(name, candidate) <= max(1, len(candidate) // 8):
            return candidate
    return None


def shortened(spelling: str, known: Mapping[str, object]) -> str | None:
    """Return the known flag that `spelling` shortens: without a usual prefix, or as the beginning of one flag alone."""
    name = spelling.replace("_", "-")
    prefixes = ("--rollout-", "--use-", "--sglang-", "--router-")
    whole = [prefix + name[2:] for prefix in prefixes if prefix + name[2:] in known]
    longer = [flag for flag in known if flag.startswith(f"{name}-")]
    return whole[0] if whole else longer[0] if len(longer) == 1 else None


def _slips(one: str, other: str) -> int:
    """Return the edit distance: letters to add, leave out, replace, or swap with the next, until both are equal."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, theirs in enumerate(other, 1):
            steps = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != theirs))
            if i > 1 and j > 1 and letter == other[j - 2] and theirs == one[i - 2]:
                steps = min(steps, before[j - 2] + 1)
            row.append(steps)
        before, last = last, row
    return last[-1]
