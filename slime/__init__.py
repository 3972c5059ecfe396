"""slime: reinforcement-learning post-training of language models with Megatron-core, SGLang and Ray."""

__version__ = "0.1.0"
