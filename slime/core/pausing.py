"""The ways in which an engine treats requests in flight when it stops for new weights.

- Used by: --update-weight-pause, the weight sync, and the messages to engines.
- Invariant: the names are written only here.

"abort" answers requests at once, with the tokens that they have. "in_place" keeps them waiting with their KV cache.
"retract" keeps them waiting too, and prefills them again afterwards.
"""

from __future__ import annotations

from typing import Literal

PauseMode = Literal["abort", "in_place", "retract"]
"""A way in which an engine itself can pause, by SGLang's name."""
PauseChoice = Literal["drain", PauseMode]
"""A value of --update-weight-pause. "drain" is ours: the sync waits until nothing is in flight."""
