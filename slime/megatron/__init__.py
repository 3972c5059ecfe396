"""Training on Megatron-core. The version is checked here, before anything imports megatron.core."""

from slime.megatron.lazy_wandb import load_wandb_when_used
from slime.megatron.version import check_megatron_version

check_megatron_version()
load_wandb_when_used()
