"""`Args`: the values of all flags, resolved once and frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.engine_kinds import ENGINE_KINDS, EngineFacts
from slime.config.experiment_trackers import TRACKERS
from slime.config.flags.algo_options import AlgoOptions, CriticOptions
from slime.config.flags.megatron_options import (
    ArchitectureOptions,
    MegatronRunOptions,
    OptimizerOptions,
    ParallelOptions,
)
from slime.config.flags.options import (
    CheckpointOptions,
    ClusterOptions,
    DebugOptions,
    LoggingOptions,
    TrainOptions,
)
from slime.config.flags.rollout_options import EvalOptions, HookOptions, RolloutOptions
from slime.config.flags.simulate_options import SimulateOptions
from slime.config.reward_types import needs_url
from slime.config.weight_transports import TRANSPORTS
from slime.core.architecture import Architecture
from slime.core.user_code import split_path

T = TypeVar("T")

INPUT_KEY = "prompt"
"""The default key of the prompt in a data row."""
GROUP_SIZE = 8
"""The default number of responses to a prompt for estimators that compare them, as in TRL."""
DEFAULT_KL_CLAMP = 10.0
"""The default bound of low_var_kl in the loss, as in verl and OpenRLHF."""


REWARD_SUM = "sum"
"""The default --reward-key of several reward functions: their weighted sum is stored under it."""
SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
"""The rollout function that takes its responses from the data, for supervised fine-tuning."""


class FrozenMapping(Mapping[str, Any]):
    """A read-only mapping that can be sent to another process, unlike MappingProxyType."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"FrozenMapping({self._items!r})"


@dataclass(frozen=True, kw_only=True)
class Args(
    ClusterOptions,
    CheckpointOptions,
    RolloutOptions,
    HookOptions,
    EvalOptions,
    TrainOptions,
    AlgoOptions,
    CriticOptions,
    LoggingOptions,
    DebugOptions,
    SimulateOptions,
    ArchitectureOptions,
    ParallelOptions,
    OptimizerOptions,
    MegatronRunOptions,
):
    """All flags, flat: `args.rollout_batch_size`, `args.tensor_model_parallel_size`.

    The three mappings hold flags that are passed through by name, if they were given.
    """

    megatron_extra: Mapping[str, Any] = field(default_factory=FrozenMapping)
    """The fields of megatron-core's configs that slime does not read itself."""
    sglang: Mapping[str, Any] = field(default_factory=FrozenMapping)
    """The fields of SGLang's ServerArgs, from `--sglang-*`."""
    router: Mapping[str, Any] = field(default_factory=FrozenMapping)
    """The router's flags, from `--router-*`."""
    architecture: Architecture | None = None
    """The model's architecture, from config.json and MODEL_ARGS; None only if neither could be read."""
    rollouts_ahead: int = 0
    """The number of rollouts generated ahead of the one in training: 0 with train.py, 1 with train_async.py.

    The program sets it; it is not a flag."""

    @property
    def resolved(self) -> Resolved:
        """Return the values that only `resolve` and the rules make certain, with types without None."""
        return Resolved(self)

    @property
    def actor_world_size(self) -> int:
        """Return the number of training ranks."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def data_parallel_size(self) -> int:
        """Return the number of data-parallel ranks, without context-parallel ranks."""
        return self.actor_world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def expert_tensor_size(self) -> int:
        """Return the ranks that share one expert's matrices; if unset the tensor-parallel size, as in Megatron."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def needs_reference(self) -> bool:
        """Return whether the reference model runs at all."""
        has_kl = (self.use_kl_loss and self.kl_loss_coef > 0) or self.kl_coef > 0 or self.log_ref_kl
        return self.distills or (self.loss_type != "sft_loss" and has_kl)

    @property
    def supervised(self) -> bool:
        """Return whether the run is supervised fine-tuning: its responses come from the data."""
        return self.loss_type == "sft_loss" and self.rollout_function_path == SFT_ROLLOUT

    @property
    def loss_on(self) -> Literal["all_assistant", "last_assistant"] | None:
        """Return the assistant's messages that supervised fine-tuning learns from; None for any other run."""
        return self.sft_loss_on if self.supervised else None

    @property
    def validates(self) -> bool:
        """Return whether evaluation is the loss on examples, which trainers compute: SFT without engines."""
        replays = self.debug_train_only or self.debug_rollout_only
        return self.supervised and not self.num_engines and not replays

    @property
    def distills(self) -> bool:
        """Return whether the policy learns from a teacher's log-probs instead of rewards."""
        estimates = self.loss_type != "sft_loss" and self.custom_advantage_function_path is None
        return estimates and ESTIMATOR_FACTS[self.advantage_estimator].distills

    @property
    def kl_loss_clamp(self) -> float | None:
        """Return the bound of a token's KL in the loss; None: no bound."""
        if self.kl_clamp is None:
            return DEFAULT_KL_CLAMP if self.kl_loss_type == "low_var_kl" else None
        return self.kl_clamp or None

    @property
    def kl_reward_clamp(self) -> float | None:
        """Return the bound of a token's KL in the reward; None: no bound."""
        return self.kl_clamp or None

    @property
    def may_be_offpolicy(self) -> bool:
        """Return whether training may see tokens from an older policy."""
        replayed = self.load_debug_rollout_data is not None
        converts = self.custom_convert_samples_to_train_data_path is not None
        own = not self.has_usual_rollout or self.has_own_data_source or converts
        return self.partial_rollout or self.rollouts_ahead > 0 or replayed or own

    @property
    def has_usual_rollout(self) -> bool:
        """Return whether slime's own function generates rollouts: neither a user's function nor that of SFT."""
        return self.rollout_function_path == HookOptions.rollout_function_path

    @property
    def has_own_data_source(self) -> bool:
        """Return whether prompts come from the user's own class; only that class knows how many there are."""
        return self.data_source_path != HookOptions.data_source_path

    @property
    def needs_kl_first(self) -> bool:
        """Return whether advantages contain a KL to the reference, so that it is needed before the first step."""
        return self.distills or (self.loss_type != "sft_loss" and self.kl_coef > 0)

    @property
    def uses_critic(self) -> bool:
        """Return whether a critic is trained with the policy."""
        estimates = self.loss_type != "sft_loss" and self.custom_advantage_function_path is None
        return estimates and ESTIMATOR_FACTS[self.advantage_estimator].needs_values

    @property
    def compares_group(self) -> bool:
        """Return whether advantages compare the samples of a prompt, so that a single sample teaches nothing."""
        own = self.custom_advantage_function_path is not None or self.loss_type == "sft_loss"
        return not own and ESTIMATOR_FACTS[self.advantage_estimator].compares_group

    @property
    def saves(self) -> bool:
        """Return whether the run writes checkpoints."""
        return self.save_interval != 0 and self.num_rollout != 0 and not self.debug_rollout_only

    @property
    def needs_directory(self) -> bool:
        """Return whether the run makes a directory of its own, for files that no flag gives a place."""
        return self.save is None and (self.saves or self.log_dir is None)

    @property
    def num_engines(self) -> int:
        """Return the number of engines; 0 if the run generates nothing."""
        return (self.rollout_num_gpus or 0) // self.rollout_num_gpus_per_engine

    @property
    def engine(self) -> EngineFacts:
        """Return the facts about the kind of engine that --rollout-engine names."""
        return ENGINE_KINDS[self.rollout_engine]

    @property
    def starts_engines(self) -> bool:
        """Return whether the run starts its own engines."""
        return self.num_engines > 0 and not self.rollout_external_engines

    @property
    def num_weight_owners(self) -> int:
        """Return the number of trainers that hold a part of the weights which is sent to engines from there."""
        return self.pipeline_model_parallel_size * self.expert_model_parallel_size

    @property
    def engines_on_cpu(self) -> bool:
        """Return whether the run's own engines certainly compute on CPUs; external ones are like the trainer."""
        return self.engine.on_cpu and not self.rollout_external_engines

    @property
    def engines_may_use_gpus(self) -> bool:
        """Return whether the run's own engines compute on GPUs, or may do so on another machine."""
        return not self.engine.on_cpu and not self.rollout_external_engines

    @property
    def gpus_per_engine(self) -> int:
        """Return the number of GPUs of one engine; 0 if it computes on a CPU."""
        return self.rollout_num_gpus_per_engine if self.engine.on_gpus else 0

    @property
    def engines_take_keys(self) -> bool:
        """Return whether the run's engines can have an API key; SGLang accepts none with several tokenizer workers."""
        return not self.engine.reads("tokenizer_worker_num") or (self.sglang.get("tokenizer_worker_num") or 1) == 1

    @property
    def fp32_fault(self) -> tuple[str, str] | None:
        """Return the rule and the remedy if the run's engines would have to compute in fp32 but cannot."""
        dtype = self.sglang.get("dtype") or ("bfloat16" if self.bf16 else "float32")
        in_fp32 = self.starts_engines and dtype in ("float", "float32")
        return self.engine.fp32_fault if in_fp32 else None

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Return the names of the run's trackers, in the order of their table."""
        on = {name for name, row in TRACKERS.items() if row.switch is not None and vars(self)[row.switch]}
        return tuple(name for name in TRACKERS if name in on.union(self.trackers))

    @property
    def reward_paths(self) -> tuple[str, ...]:
        """Return the paths of --custom-rm-path, which holds a single text if there is only one."""
        given = self.custom_rm_path
        return () if given is None else (given,) if isinstance(given, str) else given

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Return the name of each function of --custom-rm-path; several functions have their values under these names.

        >>> Args(custom_rm_path=("rewards.py:right", "rewards.short")).reward_names
        ('right', 'short')
        """
        return tuple(split_path(path)[1] for path in self.reward_paths)

    @property
    def may_ask_judge(self) -> bool:
        """Return whether a judge at --rm-url may score samples, by a flag, a set in --eval-config or a data row."""
        types = (self.rm_type, self.eval_rm_type)
        return None in types or self.eval_config is not None or any(needs_url(name) for name in types)

    @property
    def writes_weight_files(self) -> bool:
        """Return whether weights are written to files, by the disk transport or by the check of the first sync."""
        sends = bool(self.num_engines) and not self.debug_rollout_only
        return sends and (self.transport_writes_files or self.check_weight_sync)

    @property
    def transport_writes_files(self) -> bool:
        """Return whether the weight transport writes weights to files."""
        row = TRANSPORTS.get(self.update_weight_transport)
        return row is not None and row.writes_files


@dataclass(frozen=True)
class Resolved:
    """The flags that are None until `resolve` fills them in or the rules require them, by the same names.

    Reading one that is still None raises RuntimeError: these Args did not come from `load_args`.
    """

    _args: Args

    @property
    def input_key(self) -> str:
        return INPUT_KEY if self._args.input_key is None else self._args.input_key

    @property
    def n_samples_per_prompt(self) -> int:
        if self._args.n_samples_per_prompt is None:
            return GROUP_SIZE if self._args.compares_group else 1
        return self._args.n_samples_per_prompt

    @property
    def num_steps_per_rollout(self) -> int:
        return self._value(self._args.num_steps_per_rollout, "num_steps_per_rollout")

    @property
    def global_batch_size(self) -> int:
        return self._value(self._args.global_batch_size, "global_batch_size")

    @property
    def over_sampling_batch_size(self) -> int:
        return self._value(self._args.over_sampling_batch_size, "over_sampling_batch_size")

    @property
    def log_probs_chunk_size(self) -> int:
        return self._value(self._args.log_probs_chunk_size, "log_probs_chunk_size")

    @property
    def eps_clip_high(self) -> float:
        return self._args.eps_clip if self._args.eps_clip_high is None else self._args.eps_clip_high

    @property
    def critic_lr(self) -> float:
        return self._value(self._args.critic_lr, "critic_lr")

    @property
    def log_dir(self) -> str:
        return self._value(self._args.log_dir, "log_dir")

    @property
    def tensorboard_dir(self) -> str:
        return self._value(self._args.tensorboard_dir, "tensorboard_dir")

    @property
    def update_weight_disk_dir(self) -> str:
        return self._value(self._args.update_weight_disk_dir, "update_weight_disk_dir")

    @property
    def hf_checkpoint(self) -> str:
        return self._value(self._args.hf_checkpoint, "hf_checkpoint")

    @property
    def architecture(self) -> Architecture:
        return self._value(self._args.architecture, "architecture")

    @property
    def num_epoch(self) -> int:
        return self._value(self._args.num_epoch, "num_epoch")

    @property
    def rm_url(self) -> str:
        return self._value(self._args.rm_url, "rm_url")

    @property
    def load_debug_rollout_data(self) -> str:
        return self._value(self._args.load_debug_rollout_data, "load_debug_rollout_data")

    @staticmethod
    def _value(value: T | None, name: str) -> T:
        if value is None:
            raise RuntimeError(
                f"args.{name} has no value: these arguments did not come from slime.config.parse.load_args"
            )
        return value


SECTIONS: tuple[type[Any], ...] = Args.__bases__
"""All sections of flags, in the order of --help."""
