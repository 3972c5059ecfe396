"""Training on Megatron-core: one rank's model, its forward passes, its optimizer steps and its checkpoints.

Reading order: `trainer` (one rollout, from a batch to new weights), `share` (a rank's own rows, and what ranks
tell each other), `microbatch` and `packs` (rows of a batch become one packed row of tokens, one ahead of the model),
`step` (Megatron's schedule around a forward pass), `pipeline` (what its stages send), `logprobs`, `advantages`
(advantages and loss weights), `offpolicy`, `routing_replay` and `critic` (options of a rollout), `nan_guard` and
`dump_steps` (checks of a step), `parallel` and `device` (groups and devices), then the folders `model`, `optim`,
`checkpoint`, `offload` and `compat`. `layers` is only a path that users write.

The version of megatron-core is checked here, before anything imports it.
"""

from slime.megatron.compat.hidden_trackers import import_megatron_without_trackers
from slime.megatron.compat.uncompiled import leave_uncompiled_on_cpu
from slime.megatron.compat.version import check_megatron_version

check_megatron_version()
leave_uncompiled_on_cpu()
import_megatron_without_trackers()
