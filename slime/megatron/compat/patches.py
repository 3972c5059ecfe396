"""Every name inside Megatron, torch and SGLang that slime replaces or relies on without a promise that it stays.

- Used by: `apply` checks the whole table when a trainer starts, before any model is built, and replaces names.
- Invariant: no module of slime.megatron uses a private name that is not here. A version that has renamed one is an
  error at the start, not a wrong number later.
"""

from __future__ import annotations

from slime.megatron.compat.names import Names
from slime.megatron.compat.optimizer_patches import OPTIMIZER_NAMES

_TRAINING = "slime.megatron"
_OLD_TORCH = "the public name is newer than the oldest torch that slime runs with"
_NO_GPU = "Megatron calls it without asking for a device; on a CPU it does nothing, or its work on the CPU"
_OPTIONAL = "trackers that it imports if they are installed; they are hidden while it is imported"

TABLE: tuple[Names, ...] = (
    # --- a CPU instead of a GPU
    Names(
        target="torch.cuda",
        names=("current_device", "synchronize", "Stream", "Event", "current_stream", "default_stream", "stream"),
        why=_NO_GPU,
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="torch.distributed.ProcessGroupGloo",
        names=("__init__", "_Options", "create_default_device"),
        why="all groups of a process share one gloo device",
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="torch.distributed.ProcessGroupGloo._Options",
        names=("_devices", "_timeout"),
        why="all groups of a process share one gloo device",
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="megatron.core.tensor_parallel.mappings",
        names=("_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
        why="gloo takes no splits of different sizes",
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="megatron.core.transformer.moe.token_dispatcher",
        names=("maybe_move_tensor_to_cpu",),
        why="it converts to numpy only what comes from a GPU",
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="megatron.core.tensor_parallel.random",
        names=("_get_cuda_rng_state", "_set_cuda_rng_state", "CudaRNGStatesTracker"),
        why="the named random states are those of the CPU generator",
        where=f"{_TRAINING}.compat.cpu_layer",
    ),
    Names(
        target="megatron.core.tensor_parallel.random",
        names=("_is_initialized", "seeds_", "states_"),
        why="attributes of the tracker that the CPU's tracker sets, too",
        where=f"{_TRAINING}.compat.cpu_layer",
        how="mentions",
    ),
    Names(
        target="megatron.core.jit",
        names=("jit_fuser", "noop_decorator", "enable_jit_fuser", "disable_jit_fuser"),
        why="on a CPU a module with these names takes its place, because torch's compiler is slow to load",
        where=f"{_TRAINING}.compat.uncompiled",
        how="mentions",
    ),
    # --- the model
    Names(
        target="megatron.core.models.gpt.GPTModel",
        names=("_postprocess",),
        why="it computes the full logits; PolicyModel ends at the hidden states",
        where=f"{_TRAINING}.model.build",
    ),
    Names(
        target="megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator",
        names=("_communicate_shapes",),
        why="it asks the neighbours for shapes and waits for the device; the plan has them",
        where=f"{_TRAINING}.pipeline",
    ),
    Names(
        target="megatron.core.models.gpt.GPTModel",
        names=("_set_attention_backend",),
        why="it sets TransformerEngine's environment variables, and refuses a second model with another backend",
        where=f"{_TRAINING}.model.build",
    ),
    Names(
        target="megatron.core.transformer.moe.router.TopKRouter",
        names=("routing",),
        why="the routing is implemented here, with replay and auxiliary losses",
        where=f"{_TRAINING}.model.moe",
    ),
    Names(
        target="megatron.core.transformer.moe.moe_utils",
        names=("te_general_gemm",),
        why="it is defined only with TransformerEngine, but the router's matrix product reads it",
        where=f"{_TRAINING}.compat.apply",
        how="mentions",
    ),
    Names(
        target="megatron.core.distributed.distributed_data_parallel",
        names=("allreduce",),
        why="the mark of an expert's weight, whose gradient has groups of its own",
        where=f"{_TRAINING}.model.stacked_experts",
        how="mentions",
    ),
    Names(target="torch", names=("_grouped_mm",), why=_OLD_TORCH, where=f"{_TRAINING}.model.expert_products"),
    Names(
        target="megatron.core.transformer.transformer_layer",
        names=("Unknown MLP type",),
        why="the beginning of a warning for each layer whose MLP is not Megatron's, which a log filter leaves out",
        where=f"{_TRAINING}.compat.apply",
        how="mentions",
    ),
    Names(
        target="megatron.core.transformer.transformer_layer",
        names=("self_attn_bda", "mlp_bda", "bias_dropout_add_exec_handler"),
        why="a sub-layer's output joins the residual stream in one pass with the norms around, where they are called",
        where=f"{_TRAINING}.model.layer",
        how="mentions",
    ),
    Names(
        target="megatron.core.transformer.transformer_layer",
        names=("pre_cross_attn_layernorm", "recompute_pre_mlp_layernorm", "recompute_input_layernorm"),
        why="the norm that reads a sum first, and whether it is recomputed by itself",
        where=f"{_TRAINING}.model.layer",
        how="mentions",
    ),
    Names(
        target="megatron.core.transformer.attention.SelfAttention",
        names=("get_query_key_value_tensors",),
        why="one kernel splits the projection's output, norms and rotates",
        where=f"{_TRAINING}.model.layer",
    ),
    Names(
        target="torch.ops.aten",
        names=("_flash_attention_forward", "_flash_attention_backward"),
        why="PyTorch's kernel for packs of sequences has no public name",
        where=f"{_TRAINING}.model.flash_attention",
    ),
    *OPTIMIZER_NAMES,
    # --- the device
    Names(
        target="torch._C",
        names=("_cuda_clearCublasWorkspaces",),
        why="a small workspace would keep gigabytes of free memory from going back to the device",
        where=f"{_TRAINING}.device",
        cuda_only=True,
    ),
    Names(
        target="torch.utils.deterministic",
        names=("fill_uninitialized_memory",),
        why="it costs time, and nothing reads such memory",
        where=f"{_TRAINING}.device",
    ),
    # --- checkpoints
    Names(
        target="megatron.core.dist_checkpointing.strategies.torch",
        names=(
            "_replace_sharded_keys_with_state_dict_keys",
            "_replace_state_dict_keys_with_sharded_keys",
            "_restore_dict_types",
            "_unwrap_pyt_sharded_tensor",
        ),
        why="the steps of Megatron's own load and save, around files that are checked and unpickled by us",
        where=f"{_TRAINING}.checkpoint.torch_dist",
    ),
    Names(
        target="torch.distributed.checkpoint.default_planner",
        names=("_validate_global_plan",),
        why="each rank plans alone; the shares have to cover every tensor exactly once",
        where=f"{_TRAINING}.checkpoint.torch_dist",
    ),
    Names(
        target="torch.distributed.checkpoint._traverse",
        names=("set_element",),
        why="it puts loaded values into a nested state, as torch's own planner does",
        where=f"{_TRAINING}.checkpoint.torch_dist",
    ),
    Names(
        target="torch.distributed.checkpoint.filesystem",
        names=("_StorageInfo",),
        why="one of the classes that a checkpoint's metadata may contain",
        where=f"{_TRAINING}.checkpoint.safe_pickle",
    ),
    # --- sending weights
    Names(
        target="torch.distributed.distributed_c10d",
        names=("_abort_process_group", "_new_process_group_helper", "_world"),
        why="the group of a trainer and its engines is next to the trainer's own default group, as SGLang makes it",
        where="slime.engine.weight_group",
    ),
    Names(
        target="torch._C._distributed_c10d",
        names=("PrefixStore", "Store", "TCPStore"),
        why="the rendezvous of that group",
        where="slime.engine.weight_group",
    ),
    Names(
        target="sglang.srt.utils.patch_torch",
        names=("monkey_patch_torch_reductions",),
        why="SGLang's own change of torch's handles of GPU memory, which its engines expect",
        where="slime.sync.colocate",
        how="elsewhere",
    ),
    # --- importing Megatron
    Names(
        target="megatron.core.timers",
        names=("wandb", "torch.utils.tensorboard"),
        why=_OPTIONAL,
        where=f"{_TRAINING}.compat.hidden_trackers",
        how="mentions",
    ),
    Names(
        target="megatron.core.inference.contexts.dynamic_context",
        names=("wandb",),
        why=_OPTIONAL,
        where=f"{_TRAINING}.compat.hidden_trackers",
        how="mentions",
    ),
)
