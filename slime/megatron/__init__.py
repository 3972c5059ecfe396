"""Training on Megatron-core. The version is checked here, before anything imports megatron.core."""

from slime.megatron.version import check_megatron_version

check_megatron_version()
