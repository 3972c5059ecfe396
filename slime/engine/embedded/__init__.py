"""The embedded engine: a small server on the CPU that answers as SGLang does, for tests and machines without a GPU.

Reading order: `server` (HTTP handlers), `exchange` and `request` (from JSON to a request and back), `scheduler`
(continuous batching), `model`, `attention`, `mlp` and `cache` (the forward pass), `sampler` (drawing tokens),
`fixed_shapes` (deterministic mode), `weights`, `weight_handlers`, `memory` and `device_handlers` (new weights, memory).
"""
