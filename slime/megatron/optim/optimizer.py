"""The optimizer over the wrapped model, and its learning-rate schedule, counted in optimizer steps.

- Used by: `trainer` builds it after the model; `step` takes steps through `update`, `save_load` saves and loads it.
- Invariant: the number of steps of a run is known before it starts.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from slime.config.args import Args
from slime.megatron.compat import apply, cpu_layer
from slime.megatron.model import main_gradients
from slime.megatron.model.build import ModelChunks, config_from, params_dtype, uses_bf16
from slime.megatron.optim import adam, cpu_offload, multi_tensor
from slime.megatron.optim.multi_tensor import gradient_norm, scaled_as_read, takes_scale
from slime.megatron.optim.optimizer_state import parts_of


def build_optimizer(args: Args, model: ModelChunks) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimizer over a wrapped model, and its schedule, which counts optimizer steps."""
    config = config_from(
        OptimizerConfig,
        args,
        {
            "optimizer": args.optimizer,
            "lr": args.lr,
            "min_lr": args.min_lr,
            "weight_decay": args.weight_decay,
            "adam_beta1": args.adam_beta1,
            "adam_beta2": args.adam_beta2,
            "adam_eps": args.adam_eps,
            "sgd_momentum": args.sgd_momentum,
            "clip_grad": args.clip_grad,
            "bf16": uses_bf16(args),
            "params_dtype": params_dtype(args),
            "use_distributed_optimizer": bool(args.use_distributed_optimizer),
            "optimizer_cpu_offload": False,  # Megatron's implementation; `cpu_offload` is ours
        },
    )
    with cpu_layer.layer():
        adam.install()
        multi_tensor.install()
        for chunk in model:
            main_gradients.install(chunk)
        optimizer = get_megatron_optimizer(config, list(model))  # pyright: ignore[reportArgumentType]
        for part in parts_of(optimizer):
            _prepare(part, in_host_memory=args.optimizer_cpu_offload)
        return optimizer, _schedule(args, optimizer)


def _prepare(part: MegatronOptimizer, *, in_host_memory: bool) -> None:
    """Prepare PyTorch's optimizers (used without TransformerEngine and Apex): fuse Adam, make SGD loadable."""
    if isinstance(part.optimizer, torch.optim.Adam):
        for group in part.optimizer.param_groups:
            group["fused"] = True  # one pass over the weights; on a CPU it takes a third of the time
        adam.step_in_one_pass(part)
    if in_host_memory and part.optimizer is not None:
        cpu_offload.install(part)
    if isinstance(part.optimizer, torch.optim.SGD):
        apply.replace_on(part, "init_state_fn", _start_sgd)  # Megatron calls it when it loads, but sets none for SGD


def _start_sgd(sgd: torch.optim.SGD, config: OptimizerConfig) -> None:
    """Create the state with which the first step would begin; without momentum there is none."""
    for group in sgd.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not sgd.state[parameter]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _schedule(args: Args, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build Megatron's schedule; a warm-up's first step uses --lr-warmup-init. The rules have checked its lengths."""
    takes_steps = args.num_rollout != 0  # a run that only evaluates has no decay, but Megatron requires a schedule
    style = args.lr_decay_style if takes_steps else "constant"
    decay_steps = args.lr_decay_iters or total_steps(args)
    # as in Megatron, a fraction of the steps need not be a whole number
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay_steps
    if style == "constant":
        decay_steps = max(decay_steps, math.floor(warmup) + 1)  # nothing decays, but Megatron requires a length
    assert warmup < max(decay_steps, 1), "the rule of the warm-up requires a decay that ends after it"
    # the rules require both ends if the style is not constant
    start, end = args.start_weight_decay, args.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=min(args.lr_warmup_init, args.lr),
        max_lr=args.lr,
        min_lr=min(args.min_lr, args.lr),
        lr_warmup_steps=cast(Any, warmup),
        lr_decay_steps=max(decay_steps, 1),
        lr_decay_style=style,
        start_wd=args.weight_decay if start is None else start,
        end_wd=args.weight_decay if end is None else end,
        wd_incr_steps=max(total_steps(args), 1),
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=args.lr_wsd_decay_iters,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
        # on resume the command line wins over the checkpoint, which then provides only the number of steps
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=not args.use_checkpoint_opt_param_scheduler,
    )


def update(optimizer: MegatronOptimizer, wrong: Tensor, largest: float) -> tuple[Tensor | float, Tensor]:
    """Clip the gradients and take the step, unless their norm is not finite or above `largest`.

    These are the parts of Megatron's own `optimizer.step()`, with a check of the norm between them.

    Args:
        wrong: [] 1 if the step is not to be taken.

    Returns:
        The norm, and [] 1 if the step was not taken.
    """
    optimizer.prepare_grads()
    parts, clip = parts_of(optimizer), optimizer.config.clip_grad
    if all(takes_scale(part.optimizer) for part in parts):
        norm = gradient_norm(parts)
        # in float64, as the guard compares it, so that both come to the same result
        left_out = torch.maximum(wrong, (~norm.isfinite() | (norm.double() > largest)).float())
        scale = ((norm + 1.0e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)  # as Megatron clips
        with scaled_as_read([part.optimizer for part in parts], scale, left_out):
            optimizer.step_with_ready_grads()
        return norm, left_out
    norm = float(cast(Any, optimizer.get_grad_norm()))
    if not math.isfinite(norm) or norm > largest or wrong.item():
        return norm, torch.ones_like(wrong)
    if clip > 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grad_by_total_norm_fp32(parameters, clip, norm)
    optimizer.step_with_ready_grads()
    return norm, torch.zeros_like(wrong)


def reload_main_weights(optimizer: MegatronOptimizer) -> None:
    """Give the optimizer the model's weights, after they were loaded: with bf16 it has fp32 copies of them."""
    with cpu_layer.layer():
        optimizer.reload_model_params()


def follow_schedule(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Make a loaded optimizer take its next step by the loaded schedule, which is the flags' or the checkpoint's.

    Megatron also keeps the two ends of the learning rate in the optimizer's groups, and those are always the flags'.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
    scheduler.step(0)


def steps_per_rollout(args: Args) -> int:
    """Return the number of optimizer steps into which one rollout is cut."""
    return args.resolved.num_steps_per_rollout


def total_steps(args: Args) -> int:
    """Return the optimizer steps of the whole run; the policy takes none in the critic-only rollouts."""
    rollouts = (args.num_rollout or 0) - (args.num_critic_only_steps if args.uses_critic else 0)
    return max(rollouts, 0) * steps_per_rollout(args)
