"""The constants that decide how much memory a run takes.

- Used by: the trainer and the embedded engine, which allocate by them; `plan`, whose memory model counts with them.
- Invariant: each of them is written here alone, so that a plan counts what a run takes.
"""

from __future__ import annotations

COLOCATED_MEM_FRACTION = 0.7
"""The fraction of a GPU's memory for SGLang's weights and KV cache with --colocate. The rest is for the parts of the
trainer that stay (CUDA context, NCCL), its weights and two buckets during the weight sync, and SGLang's own activations
and CUDA graphs."""
KEPT_LOGITS = 5 * 2**30
"""The bytes of logits that a GPU keeps for the backward pass: all of 16,384 tokens over 152k entries in bf16.

Further logits are computed again in the backward pass."""
EMBEDDED_RUNNING_REQUESTS = 256
"""The number of requests that the embedded engine runs at once, unless --sglang-max-running-requests is given."""
EMBEDDED_ROW_STEP = 64
"""The length of a row of the embedded engine's KV cache, in tokens, is a multiple of this."""
