"""The embedded engine: a small server on the CPU that answers as SGLang does, for tests and machines without a GPU.

Reading order: `settings` (the command line), `server` and `answers` (HTTP handlers), `exchange`, `request` and `text`
(from JSON to a request and back), `scheduler` (continuous batching), `model`, `attention`, `mlp` and `cache` (the
forward pass), `sampler` (drawing tokens), `fixed_shapes` (deterministic mode), `weights`, `weight_handlers`, `memory`
and `device_handlers` (new weights, memory), and `in_process` (the engine without HTTP).
"""
