"""Training on Megatron-core: one rank's model, its forward passes, its optimizer steps and its checkpoints.

Reading order: `trainer` (one rollout, from a batch to new weights), `microbatch` (rows of a batch become one packed row
of tokens), `step` (Megatron's schedule around a forward pass), `logprobs`, `rollout_columns` (advantages and loss
weights), then `build` and `layers` for the model, `optimizer` and its neighbours, and `checkpoint`.

The version of megatron-core is checked here, before anything imports it.
"""

from slime.megatron.lazy_wandb import load_wandb_when_used
from slime.megatron.uncompiled import leave_uncompiled_on_cpu
from slime.megatron.version import check_megatron_version

check_megatron_version()
load_wandb_when_used()
leave_uncompiled_on_cpu()
