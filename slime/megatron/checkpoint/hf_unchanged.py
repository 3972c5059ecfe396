"""A run resumes a checkpoint only with the tokenizer, chat template and config.json that it was trained with.

- Used by: `trainer` saves their identity with each checkpoint, and compares it before it loads one.
- Invariant: the saved identity is that of the files at the start of the run, which its engines and rollouts read, too.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.megatron.checkpoint.files import FoundCheckpoint
from slime.megatron.checkpoint.manifest import read_state
from slime.models.hf_identity import changes, hf_identity

HF_FILES = "hf_files"
"""The key in a checkpoint's state."""


class HFFiles:
    """The identity of the files in --hf-checkpoint on this rank's machine. `state` is JSON-able, for the checkpoint."""

    def __init__(self, args: Args) -> None:
        self._directory = args.hf_checkpoint
        self.state = {HF_FILES: None if self._directory is None else hf_identity(self._directory)}

    def refuse_others(self, found: FoundCheckpoint) -> None:
        """Raise a ValueError if the checkpoint was trained with other files; it names them and the remedy."""
        then, now = read_state(found.path)["state"].get(HF_FILES), self.state[HF_FILES]
        changed = [] if then is None or now is None else changes(then, now)
        if changed:
            raise ValueError(
                f"--hf-checkpoint {self._directory}: not what {found.path} was trained with ({'; '.join(changed)}); "
                "restore the files, or begin a new run with these weights: --finetune and another --save"
            )
