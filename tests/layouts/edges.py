"""Measure how near a run comes to a point where its loss is not smooth: a clip's edge, or a tie between two experts.

- Used by: `one_step` watches the run in one process, in which every sample is a micro-batch, in order.
- Invariant: watching changes nothing.

Shapes: _R response tokens of a sample, _TE tokens and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slime.algo.losses import Loss, LossInputs, LossOptions
from slime.core.batch import TrainBatch

CLOSEST_RATIO = 1e-4
"""The least distance of a policy ratio or an importance weight from the edge of a clip."""
CLOSEST_SCORE = 3e-5
"""The least distance between the scores of the last expert that is chosen and the first that is not."""


class _Seen(NamedTuple):
    """The values of one sample that a loss has read."""

    loss_R: Tensor
    log_ratio_R: Tensor
    log_weights_R: Tensor | None
    """The log-weights of the tokens that have an importance weight."""


@dataclass
class Watch:
    clips: list[float] = field(default_factory=list[float])
    weight_clips: list[float] = field(default_factory=list[float])
    seen: list[_Seen] = field(default_factory=list[_Seen])
    score: float = float("inf")

    def losses(self, loss: Loss) -> Loss:
        """Wrap the loss so that it records its inputs."""

        def watched(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
            loss_R, metrics = loss(inputs, options)
            self.clips = [1 - options.eps_clip, 1 + options.eps_clip_high]
            self.clips += [] if options.eps_clip_c is None else [options.eps_clip_c]
            self.weight_clips = [options.tis_clip, options.tis_clip_low]
            log_weights_R = None
            if inputs.weighted_R is not None and inputs.rollout_log_probs_R is not None:
                log_weights_R = (inputs.old_log_probs_R - inputs.rollout_log_probs_R)[inputs.weighted_R].detach()
            log_ratio_R = (inputs.log_probs_R - inputs.old_log_probs_R).detach()
            self.seen.append(_Seen(loss_R.detach(), log_ratio_R, log_weights_R))
            return loss_R, metrics

        return watched

    def routers(self, model: torch.nn.Module) -> None:
        """Record every router's scores as long as the model exists."""
        for module in model.modules():
            if hasattr(module, "gating") and hasattr(module, "topk"):
                self._watch_router(module)

    def _watch_router(self, router: Any) -> None:
        gating = router.gating

        def watched(*args: Any) -> Tensor:
            logits = gating(*args)
            scores_TE = logits.detach().flatten(0, -2).float()
            sigmoid = router.config.moe_router_score_function == "sigmoid"
            scores_TE = scores_TE.sigmoid() if sigmoid else scores_TE.softmax(-1)
            if getattr(router, "expert_bias", None) is not None:
                scores_TE = scores_TE + router.expert_bias
            best = scores_TE.topk(router.topk + 1).values
            self.score = min(self.score, float((best[:, -2] - best[:, -1]).amin()))
            return logits

        router.gating = watched

    def near(self, batch: TrainBatch) -> str:
        """Return the edge that the run came too near to, or ""; every row of `batch` must have been seen, in order."""
        assert len(self.seen) == len(batch), "a sample a micro-batch"
        closest = self.score / CLOSEST_SCORE
        if closest < 1:
            return "two experts equally good"
        ratios, weights = [], []
        for seen, mask_R in zip(self.seen, batch.rows("loss_mask"), strict=True):
            counts_R = torch.from_numpy(mask_R > 0)
            if counts_R.any():
                sequence = seen.log_ratio_R[counts_R].mean()[None]  # gspo's
                ratios += [seen.log_ratio_R[counts_R].exp(), sequence.exp()]
            if seen.log_weights_R is not None:
                weights.append(seen.log_weights_R.exp())
        too_near = _closest(ratios, self.clips) < CLOSEST_RATIO or _closest(weights, self.weight_clips) < CLOSEST_RATIO
        return "a clip's edge" if too_near else ""

    def size(self, batch: TrainBatch) -> float:
        """Return the mean of |loss| over the counted tokens."""
        losses = torch.cat([seen.loss_R for seen in self.seen]).abs().numpy()
        return float(losses[batch.columns["loss_mask"] > 0].mean(dtype=np.float64))


def _closest(values: Sequence[Tensor], edges: Sequence[float]) -> float:
    gaps = [float((each - edge).abs().amin()) for each in values if len(each) for edge in edges]
    return min(gaps, default=float("inf"))
