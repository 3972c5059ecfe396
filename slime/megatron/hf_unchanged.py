"""A checkpoint goes on with the tokenizer, chat template and config.json that it was trained with.

Path: `trainer` saves what they were with each checkpoint, and compares before it loads one. Invariant: what is saved is
what was there when the run started, which its engines and rollouts have read, too.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.megatron.checkpoint_files import FoundCheckpoint
from slime.megatron.checkpoint_manifest import read_state
from slime.models.hf_identity import changes, hf_identity

HF_FILES = "hf_files"
"""Its key in the state of a checkpoint."""


class HFFiles:
    """Those of --hf-checkpoint, on this rank's machine. `state`: for the checkpoint, JSON-able."""

    def __init__(self, args: Args) -> None:
        self._directory = args.hf_checkpoint
        self.state = {HF_FILES: None if self._directory is None else hf_identity(self._directory)}

    def refuse_others(self, found: FoundCheckpoint) -> None:
        """Raise ValueError where the checkpoint was trained with other ones; it says which, and what to do."""
        then, now = read_state(found.path)["state"].get(HF_FILES), self.state[HF_FILES]
        changed = [] if then is None or now is None else changes(then, now)
        if changed:
            raise ValueError(
                f"--hf-checkpoint {self._directory}: not what {found.path} was trained with ({'; '.join(changed)}); "
                "restore the files, or begin a new run with these weights: --finetune and another --save"
            )
