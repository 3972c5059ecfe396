"""The private names around gradients and optimizers that slime replaces or relies on.

- Used by: `patches`, whose table has them among all others.
- Invariant: as for `patches`.
"""

from __future__ import annotations

from slime.megatron.compat.names import Names

_OPTIMIZER = "megatron.core.optimizer"
_TRAINING = "slime.megatron"
_IN_PLACE = "PyTorch has no public function that does this to many tensors at once, or in place"
_ONE_PASS = "the fp32 main weights, and the memory of the model that they are copied to"
_OWN_ADAM = "torch's Adam has one step for each parameter, and Megatron expects one for all"
_ADDED = "marks on a weight by which Megatron's wrapper and layers agree on who has added its gradient to `main_grad`"

OPTIMIZER_NAMES: tuple[Names, ...] = (
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
)
