"""Every name inside Megatron, torch and SGLang that slime replaces or relies on without a promise that it stays.

- Used by: `apply` checks the whole table when a trainer starts, before any model is built, and replaces names.
- Invariant: no module of slime.megatron uses a private name that is not here. A version that has renamed one is an
  error at the start, not a wrong number later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of one module or class that slime uses for one reason."""

    target: str
    """The dotted path of the module or class."""
    names: tuple[str, ...]
    why: str
    where: str
    """The module of slime that replaces or uses them."""
    how: Literal["has", "mentions", "elsewhere"] = "has"
    """The check. `has`: the target has the attribute. `mentions`: the module's source contains the name, because
    its code reads or sets it on other objects, or looks for it. `elsewhere`: nothing, because the package need not be
    installed here."""
    cuda_only: bool = False


_OPTIMIZER = "megatron.core.optimizer"
_TRAINING = "slime.megatron"
_IN_PLACE = "PyTorch has no public function that does this to many tensors at once, or in place"
_OLD_TORCH = "the public name is newer than the oldest torch that slime runs with"
_NO_GPU = "Megatron calls it without asking for a device; on a CPU it does nothing, or its work on the CPU"
_ONE_PASS = "the fp32 main weights, and the memory of the model that they are copied to"
_OWN_ADAM = "torch's Adam has one step for each parameter, and Megatron expects one for all"
_ADDED = "marks on a weight by which Megatron's wrapper and layers agree on who has added its gradient to `main_grad`"
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
        names=("self_attn_bda", "mlp_bda"),
        why="a layer with norms after its sub-layers wraps these functions of Megatron's layer",
        where=f"{_TRAINING}.model.layers",
        how="mentions",
    ),
    Names(
        target="torch.ops.aten",
        names=("_flash_attention_forward", "_flash_attention_backward"),
        why="PyTorch's kernel for packs of sequences has no public name",
        where=f"{_TRAINING}.model.flash_attention",
    ),
    # --- gradients
    Names(
        target="megatron.core.distributed.distributed_data_parallel",
        names=("main_grad", "grad_added_to_main_grad", "zero_out_wgrad"),
        why=_ADDED,
        where=f"{_TRAINING}.model.main_gradients",
        how="mentions",
    ),
    Names(
        target="megatron.core.tensor_parallel.layers",
        names=("grad_added_to_main_grad", "zero_out_wgrad"),
        why=_ADDED,
        where=f"{_TRAINING}.model.main_gradients",
        how="mentions",
    ),
    Names(
        target="megatron.core.tensor_parallel.layers.VocabParallelEmbedding",
        names=("__class__",),
        why="an embedding becomes one that adds its gradient to the buffer itself",
        where=f"{_TRAINING}.model.main_gradients",
    ),
    Names(
        target="megatron.core.tensor_parallel.layers",
        names=("num_embeddings_per_partition", "vocab_start_index", "reduce_scatter_embeddings"),
        why="attributes of the embedding that the lookup reads",
        where=f"{_TRAINING}.model.main_gradients",
        how="mentions",
    ),
    Names(target="torch", names=("_index_put_impl_",), why=_IN_PLACE, where=f"{_TRAINING}.model.main_gradients"),
    Names(
        target="megatron.core.tensor_parallel.layers",
        names=("_grad_accum_fusion_available",),
        why="Megatron's linear layers add to the gradient buffer only if this is true",
        where=f"{_TRAINING}.optim.multi_tensor",
    ),
    Names(
        target="megatron.core.tensor_parallel.layers",
        names=("fused_weight_gradient_mlp_cuda",),
        why="Apex's extension, which the linear layers then call",
        where=f"{_TRAINING}.optim.multi_tensor",
        how="mentions",
    ),
    Names(
        target="megatron.core.distributed.param_and_grad_buffer",
        names=("intra_distributed_optimizer_instance_group", "grad_data"),
        why="the buffers' memory and the ranks that share it",
        where=f"{_TRAINING}.dump_steps",
        how="mentions",
    ),
    # --- optimizers
    Names(
        target=_OPTIMIZER,
        names=("DistributedOptimizer",),
        why=_OWN_ADAM,
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer",
        names=("HAVE_APEX_OR_TE",),
        why="with one of them Megatron has its own Adam, and nothing is replaced",
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer",
        names=("state_dict", "load_state_dict"),
        why=_OWN_ADAM,
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer",
        names=("_get_main_param_and_optimizer_states",),
        why="each rank writes and reads its own part of the state, and nothing is gathered",
        where=f"{_TRAINING}.optim.flat_shares",
    ),
    Names(
        target=f"{_OPTIMIZER}.optimizer.ChainedOptimizer",
        names=("_synchronize_steps",),
        why="each of the chained optimizers is saved by itself, as Megatron would do it",
        where=f"{_TRAINING}.optim.optimizer_state",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer",
        names=("gbuf_ranges", "distributed_optimizer_instance_id"),
        why="the ranges of the state that this rank holds",
        where=f"{_TRAINING}.optim.flat_shares",
        how="mentions",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer",
        names=("_get_model_param_range_map", "_copy_main_params_to_model_params"),
        why=f"{_ONE_PASS}; our steps write both, so that Megatron's copy is left out",
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target=f"{_OPTIMIZER}.distrib_optimizer",
        names=("shard_fp32_from_float16_groups", "model_float16_groups", "model_param_gbuf_map"),
        why=_ONE_PASS,
        where=f"{_TRAINING}.optim.adam",
        how="mentions",
    ),
    Names(
        target=f"{_OPTIMIZER}.optimizer.Float16OptimizerWithFloat16Params",
        names=("_copy_main_params_to_model_params",),
        why="our steps have written the model's weights already",
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target=f"{_OPTIMIZER}.optimizer",
        names=("fp32_from_float16_groups", "float16_groups"),
        why=_ONE_PASS,
        where=f"{_TRAINING}.optim.adam",
        how="mentions",
    ),
    Names(
        target=f"{_OPTIMIZER}.optimizer",
        names=("init_state_fn",),
        why="Megatron calls it to create the state that a checkpoint is loaded into",
        where=f"{_TRAINING}.optim.optimizer",
        how="mentions",
    ),
    Names(
        target=f"{_OPTIMIZER}.clip_grads",
        names=("l2_norm_impl", "multi_tensor_scale_impl"),
        why="without TransformerEngine or Apex they work tensor by tensor",
        where=f"{_TRAINING}.optim.multi_tensor",
    ),
    Names(
        target=f"{_OPTIMIZER}.optimizer",
        names=("_multi_tensor_copy_this_to_that",),
        why="without TransformerEngine or Apex it works tensor by tensor",
        where=f"{_TRAINING}.optim.multi_tensor",
    ),
    Names(
        target="torch.optim.adam",
        names=("grad_scale", "found_inf"),
        why="attributes by which the fused Adam scales gradients as it reads them, or takes no step",
        where=f"{_TRAINING}.optim.multi_tensor",
        how="mentions",
    ),
    Names(
        target="torch",
        names=("_foreach_norm", "_foreach_mul_", "_foreach_copy_"),
        why=_IN_PLACE,
        where=f"{_TRAINING}.optim.multi_tensor",
    ),
    Names(
        target="torch",
        names=("_foreach_add_", "_foreach_sub_"),
        why=_IN_PLACE,
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(target="torch", names=("_fused_adamw_",), why=_IN_PLACE, where=f"{_TRAINING}.optim.cpu_offload"),
    Names(
        target="torch.optim.AdamW",
        names=("__class__",),
        why="the Adam that Megatron has built becomes one of ours, with its settings and its place",
        where=f"{_TRAINING}.optim.adam",
    ),
    Names(
        target="torch.Tensor",
        names=("__class__",),
        why="a main weight in host memory takes a gradient on the device",
        where=f"{_TRAINING}.optim.cpu_offload",
    ),
    Names(
        target="torch._C",
        names=("_disabled_torch_function_impl",),
        why="a computation with such a weight gives a plain tensor",
        where=f"{_TRAINING}.optim.cpu_offload",
    ),
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
