"""Flags of rollouts, of the hooks in them, and of evaluation.

- Used by: `config.args`, as three of its sections, like those in `options`.
- Invariant: no default of these flags is written anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags.flag import JsonObject, Needs, flag
from slime.config.reward_types import BOXED_PREFIX, REWARD_TYPES

_FILTER = Needs(
    ("dynamic_sampling_filter_path",),
    why="without --dynamic-sampling-filter-path no group is dropped by a filter",
)
_TEMPLATE = ("apply_chat_template", "eval_config")
_WITHOUT_TEMPLATE = "without --apply-chat-template"
_EVALUATION = Needs(("eval_prompt_data", "eval_config"), why="nothing is evaluated", remedy="add --eval-prompt-data")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Prompts, sampling and rewards."""

    prompt_data: str | tuple[str, ...] | None = flag(
        None,
        "Training prompts, jsonl or parquet: one file or several, or patterns such as 'data/*.jsonl'. "
        "path@[a:b] takes a slice.",
        metavar="PATH ...",
    )
    input_key: str | None = flag(
        None,
        "Key of the prompt in a data row. a.b is b inside of a. Unset: the first of prompt, messages, question and "
        "problem that the first row has.",
    )
    label_key: str | None = flag(
        None,
        "Key of the label that the reward compares with. Unset: for rewards that need one and for --custom-rm-path, "
        "the first of label, answer, solution, ground_truth and reward_model.ground_truth that the first row has.",
    )
    metadata_key: str = flag("metadata", "Key of an object that is kept as sample.metadata.")
    tool_key: str | None = flag(None, "Key of the list of tools that is passed to the chat template.")
    apply_chat_template: bool | None = flag(
        None,
        "The tokenizer's chat template renders the prompts: OpenAI messages, or the text of one user message. Unset: "
        "yes if the first row's prompt is messages.",
    )
    system_prompt: str | None = flag(
        None,
        "System message of the prompts that have none.",
        metavar="TEXT",
        needs=Needs(_TEMPLATE, why=f"{_WITHOUT_TEMPLATE} a prompt has no messages"),
    )
    apply_chat_template_kwargs: JsonObject | None = flag(
        None,
        'Variables for the chat template, as JSON: {"enable_thinking": false}.',
        metavar="JSON",
        needs=Needs(_TEMPLATE, why=f"{_WITHOUT_TEMPLATE} no template is rendered"),
    )
    prompt_data_weights: tuple[float, ...] = flag(
        (),
        "How often an epoch has each row of each word of --prompt-data: 2 is twice; with 0.25, every epoch has another "
        "quarter of the rows. Unset: once.",
        ge=0.0001,
        le=1000,
        needs=Needs(("prompt_data",), why="it weighs the files of --prompt-data"),
    )
    rollout_shuffle: bool = flag(False, "Shuffle the prompts again in each epoch, seeded by (--rollout-seed, epoch).")
    rollout_seed: int = flag(42, "Seed of the data order and of sampling.", ge=0)
    rm_type: str | None = flag(None, f"{', '.join(REWARD_TYPES)}, with or without {BOXED_PREFIX}.")
    custom_rm_path: str | tuple[str, ...] | None = flag(
        None,
        "Dotted path to your own reward function, async or plain, or to several, whose weighted sum is the reward.",
        metavar="PATH ...",
    )
    reward_weights: tuple[float, ...] = flag(
        (),
        "The weight of each function of --custom-rm-path in the sum; 0 only records its values. Unset: 1 each.",
        ge=-1e6,
        le=1e6,
        needs=Needs(("custom_rm_path",), why="it weighs the functions of --custom-rm-path"),
    )
    group_rm: bool = flag(
        False,
        "Pass a whole group at once to the function of --custom-rm-path.",
        needs=Needs(
            ("custom_rm_path",),
            why="built-in rewards judge each sample by itself; it belongs to --custom-rm-path",
            when_on=True,
        ),
    )
    rm_url: str | None = flag(
        None,
        "URL of --rm-type remote_rm. It receives POST {prompt, response, label, metadata, row} and returns a number.",
        secret="url",
    )
    rm_num_workers: int = flag(
        2,
        "Worker processes that compute rewards outside the event loop, for each function of --custom-rm-path.",
        ge=1,
        le=4096,
    )
    rm_timeout: float = flag(
        10.0,
        "Seconds that one call of the reward function may take (with --group-rm: one call for a group). A longer call "
        "counts as failed.",
        gt=0,
        le=1e8,
    )
    sandbox: Literal["namespaces", "rlimits"] = flag(
        "namespaces",
        "How code that the model wrote is isolated. namespaces: no network, and none of the machine's files. rlimits: "
        "weaker, for machines without namespaces (docs/security.md).",
    )
    rm_concurrency: int = flag(
        256,
        "Reward calls in flight at once for remote_rm and for an async --custom-rm-path.",
        ge=1,
        le=1048576,
    )
    rm_worker_memory: float = flag(
        4.0,
        "GB of memory by which a reward worker may grow. A worker that has grown more is replaced between two calls. "
        "One that has grown twice as much is killed, and the sample whose reward it computed fails.",
        gt=0,
        le=1e6,
    )
    max_reward_failures: float = flag(
        0.5,
        "Fraction of a rollout's samples whose reward may fail. Each failure costs its own sample and is counted. "
        "Above this fraction the run ends and reports the reasons. 1: it never ends for this.",
        ge=0,
        le=1,
    )
    max_generation_failures: float = flag(
        0.5,
        "Fraction of a rollout's samples whose --custom-generate-function-path may fail. Each failure costs its own "
        "sample and is counted. Above this fraction the run ends and reports the last one. 1: it never ends for this.",
        ge=0,
        le=1,
        needs=Needs(
            ("custom_generate_function_path",),
            why="engines alone generate the samples",
            remedy="add --custom-generate-function-path",
        ),
    )
    reward_key: str | None = flag(
        None,
        "The entry to train on if a reward function returns a dict. With several functions, their sum is stored under "
        "this name too. Unset: sum for several functions.",
    )
    num_rollout: int | None = flag(None, "Number of rollouts to run; 0 evaluates and stops.", ge=0)
    num_epoch: int | None = flag(
        None,
        "Passes over the prompts, rounded up to whole rollouts; replaces --num-rollout. Unset, and without it: 1.",
        ge=1,
    )
    rollout_batch_size: int = flag(32, "Prompts in one rollout.", ge=1)
    n_samples_per_prompt: int | None = flag(
        None,
        "Responses per prompt: the group that grpo and others compare. Unset: 8 for estimators that compare the "
        "responses of a group, otherwise 1.",
        ge=1,
    )
    rollout_temperature: float = flag(1.0, "Sampling temperature. Training divides its logits by it, too.", ge=0)
    rollout_top_p: float = flag(1.0, "Nucleus sampling. Training rollouts refuse a value below 1.", gt=0, le=1)
    rollout_top_k: int = flag(-1, "Top-k sampling; -1 or 0: off. Training rollouts refuse other values.", ge=-1)
    rollout_max_response_len: int = flag(1024, "Most tokens in a response. It is truncated there.", ge=1)
    rollout_max_context_len: int | None = flag(
        None,
        "Largest number of tokens of prompt and response together. Unset: the model's limit minus 2, which SGLang "
        "keeps free. Prompts that leave no room for a response are dropped.",
        ge=1,
    )
    rollout_stop: tuple[str, ...] = flag((), "Texts that end a response.")
    rollout_stop_token_ids: tuple[int, ...] = flag((), "Stop token ids in addition to the model's own.")
    rollout_skip_special_tokens: bool = flag(False, "Leave special tokens out of sample.response.")
    num_steps_per_rollout: int | None = flag(
        None,
        "Optimizer steps per rollout; its samples are split evenly over them. Unset: by --global-batch-size, or 1 if "
        "that is not given.",
        ge=1,
    )
    balance_data: bool = flag(
        False, "Distribute samples so that data-parallel ranks have equal compute, not only equal numbers of samples."
    )
    over_sampling_batch_size: int | None = flag(
        None, "Prompts sampled at first, to make up for dropped groups. Unset: --rollout-batch-size.", ge=1
    )
    refill_granularity: Literal["batch", "group"] = flag(
        "batch",
        "When too few groups are kept: sample another over-sampling batch, or only the missing groups.",
        needs=_FILTER,
    )
    max_empty_waves: int = flag(
        10, "Waves of prompts without a kept group, after which the run ends.", ge=1, needs=_FILTER
    )
    partial_rollout: bool = flag(
        False, "Groups that are unfinished or not needed keep tokens and rewards, and continue in a later rollout."
    )
    partial_rollout_max_tokens: int | None = flag(
        None,
        "Tokens after which a sample is set aside. It continues in a later rollout, or in the same one if the other "
        "samples do not fill that. Belongs to --partial-rollout, and --deterministic requires it there.",
        ge=1,
        needs=Needs(("partial_rollout",), remedy="add --partial-rollout"),
    )
    mask_offpolicy_in_partial_rollout: bool = flag(
        False, "Exclude tokens of an earlier policy from the loss; belongs to --partial-rollout."
    )
    max_staleness: int | None = flag(
        None,
        "Largest number of policy versions by which a token may be older than the weights trained on it. A group in "
        "the data buffer that would exceed it starts again from its prompt.",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class HookOptions:
    """Dotted paths to your own functions. `slime.core.plugins.HOOKS` has their signatures."""

    rollout_function_path: str = flag("slime.rollout.collect.generate_rollout", "Generates the samples of one rollout.")
    eval_function_path: str | None = flag(None, "Runs one evaluation; unset: the built-in one.")
    data_source_path: str = flag("slime.rollout.data_buffer.DataBuffer", "Class that supplies prompts.")
    custom_generate_function_path: str | None = flag(None, "Generates one sample.")
    dynamic_sampling_filter_path: str | None = flag(None, "Keeps or drops a finished group.")
    buffer_filter_path: str | None = flag(None, "Chooses groups from the data buffer.")
    rollout_sample_filter_path: str | None = flag(None, "Marks samples of a complete rollout to exclude from the loss.")
    custom_reward_post_process_path: str | None = flag(None, "Turns raw rewards into training rewards.")
    custom_advantage_function_path: str | None = flag(None, "Computes advantages instead of --advantage-estimator.")
    custom_loss_function_path: str | None = flag(
        None,
        "The loss of --loss-type custom_loss.",
        needs=Needs(
            ("loss_type",),
            value="custom_loss",
            why="it is called only with --loss-type custom_loss",
            remedy="add --loss-type custom_loss",
        ),
    )
    custom_convert_samples_to_train_data_path: str | None = flag(None, "Converts a rollout to a training batch.")
    custom_rollout_log_function_path: str | None = flag(None, "Called with the samples and metrics of each rollout.")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation. Unset sampling flags take the rollout's values."""

    eval_interval: int | None = flag(None, "Evaluate every N rollouts, before the first and after the last.", ge=1)
    eval_prompt_data: tuple[str, ...] = flag((), "One path, or NAME PATH pairs.", metavar="NAME PATH")
    eval_config: str | None = flag(None, "YAML with a list `datasets`: name, path and any eval flags of that set.")
    eval_input_key: str | None = flag(None, "Key of the prompt; unset: --input-key.", needs=_EVALUATION)
    eval_label_key: str | None = flag(None, "Key of the label; unset: --label-key.", needs=_EVALUATION)
    eval_rm_type: str | None = flag(None, "Reward of evaluation; unset: --rm-type.", needs=_EVALUATION)
    n_samples_per_eval_prompt: int = flag(
        1, "Responses per evaluation prompt. Above 1, pass@k is reported.", ge=1, needs=_EVALUATION
    )
    eval_max_response_len: int | None = flag(None, "Largest number of tokens in a response.", ge=1, needs=_EVALUATION)
    eval_temperature: float | None = flag(None, "Sampling temperature; 0: greedy.", ge=0, needs=_EVALUATION)
    eval_top_p: float | None = flag(None, "Nucleus sampling.", gt=0, le=1, needs=_EVALUATION)
    eval_top_k: int | None = flag(None, "Top-k sampling; -1 or 0: off.", ge=-1, needs=_EVALUATION)
    eval_failed_as: Literal["wrong", "excluded"] = flag(
        "wrong",
        "How a response that could not be generated or judged counts. wrong: with the lowest reward of its judge. "
        "excluded: not at all.",
        needs=_EVALUATION,
    )
    skip_eval_before_train: bool = flag(False, "Skip the evaluation before the first rollout.", needs=_EVALUATION)
