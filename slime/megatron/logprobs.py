"""Log-probs and entropy of response tokens from hidden states, vocabulary-parallel and in chunks.

- Used by: `step` calls this with the model's last hidden states; the losses read the result.
- Invariant: logits exist for one chunk of response tokens at a time, forward and backward, and never for prompt or
  padding tokens.

Everything is computed from softmax(logits / temperature), the distribution that was sampled from; at temperature 0 from
softmax(logits).

On a GPU the logits stay in the dtype of the matrix product, two fused passes read them, and the gradient overwrites
them. Elsewhere they are float32. On a GPU the logits of a micro-batch are also kept for the backward pass, up to
KEPT_LOGITS, which saves one of the output layer's four matrix products.

Shapes: _B packed tokens, _R response tokens, _C those of one chunk, _V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from slime.config.memory import KEPT_LOGITS
from slime.megatron.model.main_gradients import add_product, added, main_gradient


class VocabularyPart(NamedTuple):
    """The token ids [start, start + size) of this rank; rows of the table that are padding have no id."""

    start: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, num_rows: int, vocab_size: int, group: dist.ProcessGroup) -> VocabularyPart:
        """Return the part of a rank with `num_rows` rows of the table, for a vocabulary of `vocab_size` ids."""
        start = group.rank() * num_rows
        return cls(start, min(max(vocab_size - start, 0), num_rows), group)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(values, op=op, group=self.group)
        return values


def _logits(hidden_C: Tensor, weight: Tensor, part: VocabularyPart) -> Tensor:
    """Return the logits [C, V] of all ids of this part, before temperature."""
    return F.linear(hidden_C, weight[: part.size])


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(logits_CV: Tensor, scale: float) -> Tensor:
    logits_CV = logits_CV.to(_summed_in(logits_CV.dtype))
    return logits_CV.mul_(scale) if scale != 1.0 else logits_CV


class _Sums(NamedTuple):
    """Sums over the whole vocabulary with y = logits / temperature - largest; all [C] float32."""

    largest_C: Tensor
    target_C: Tensor
    """The target's y."""
    exps_C: Tensor
    """sum of exp(y)."""
    weighted_C: Tensor
    """sum of exp(y) y; undefined if the entropy is not requested."""


def _targets_here(targets_C: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """Return the targets that lie in this part, as (rows, columns) of the chunk's logits."""
    columns = targets_C - part.start
    rows = ((columns >= 0) & (columns < part.size)).nonzero().flatten()
    return rows, columns[rows]


def _sums(logits_CV: Tensor, targets_C: Tensor, part: VocabularyPart, scale: float, with_entropy: bool) -> _Sums:
    if logits_CV.is_cuda:
        return _sums_fused(logits_CV, targets_C, part, scale)
    logits_CV = _scaled(logits_CV, scale)
    # a part that is all padding has no largest logit
    largest_C = logits_CV.amax(1) if part.size else logits_CV.new_full((len(logits_CV),), float("-inf"))
    part.reduce(largest_C, dist.ReduceOp.MAX)
    logits_CV.sub_(largest_C[:, None])
    sums = logits_CV.new_zeros(3, len(logits_CV))
    rows, columns = _targets_here(targets_C, part)
    sums[0, rows] = logits_CV[rows, columns]
    exps_CV = logits_CV.exp()
    sums[1] = exps_CV.sum(1)
    if with_entropy:
        sums[2] = exps_CV.mul_(logits_CV).sum(1)
    return _Sums(largest_C, *part.reduce(sums, dist.ReduceOp.SUM))


def _sums_fused(logits_CV: Tensor, targets_C: Tensor, part: VocabularyPart, scale: float) -> _Sums:
    from slime.megatron.model.kernels import triton_logits

    here_C, exps_C, weighted_C, target_C = triton_logits.sums(logits_CV, targets_C, part.start, scale)
    largest_C = part.reduce(here_C.clone(), dist.ReduceOp.MAX)
    change_C = here_C - largest_C  # from this part's largest logit to the largest of all ranks
    shrink_C = change_C.exp()
    sums = torch.stack([target_C, shrink_C * exps_C, shrink_C * (weighted_C + change_C * exps_C)])
    target_C, exps_C, weighted_C = part.reduce(sums, dist.ReduceOp.SUM)
    return _Sums(largest_C, target_C - largest_C, exps_C, weighted_C)


def _logits_gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    log_sums_C: Tensor,
    entropies_C: Tensor,
    gradient_C: Tensor,
    entropy_gradient_C: Tensor | None,
    part: VocabularyPart,
    scale: float,
) -> Tensor:
    """Return the gradient [C, V] in the logits' dtype; it may overwrite `logits_CV`."""
    if logits_CV.is_cuda:
        from slime.megatron.model.kernels import triton_logits

        return triton_logits.gradient_in_place(
            logits_CV, targets_C, log_sums_C, entropies_C, gradient_C, entropy_gradient_C, part.start, scale
        )
    dtype = logits_CV.dtype
    log_probs_CV = _scaled(logits_CV, scale).sub_(log_sums_C[:, None])
    # d log p(target) / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
    logits_gradient = log_probs_CV.exp()
    if entropy_gradient_C is None:
        logits_gradient.mul_(-gradient_C[:, None])
    else:
        of_entropy = log_probs_CV.add_(entropies_C[:, None]).mul_(entropy_gradient_C[:, None])
        logits_gradient.mul_(of_entropy.add_(gradient_C[:, None])).neg_()
    rows, columns = _targets_here(targets_C, part)
    logits_gradient[rows, columns] += gradient_C[rows]
    return logits_gradient.mul_(scale).to(dtype)


def _weight_gradient(logits_gradient: Tensor, hidden_C: Tensor) -> Tensor:
    """Return [V, H]; in float32 if a GPU's matrix product can return its sums unrounded."""
    if logits_gradient.is_cuda and logits_gradient.dtype != torch.float32:
        return torch.mm(logits_gradient.t(), hidden_C, out_dtype=torch.float32)
    return logits_gradient.t() @ hidden_C


class _ResponseLogProbs(torch.autograd.Function):
    """hidden [B, H], weight [V, H] -> log-probs [R], entropy [R]; backward uses kept logits or computes them again.

    The gradient of `hidden` covers only this rank's part of the vocabulary: the caller sums it over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_B: Tensor,
        weight: Tensor,
        predicting_R: Tensor,
        targets_R: Tensor,
        part: VocabularyPart,
        scale: float,
        chunk_size: int,
        with_entropy: bool,
        room: int,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor | None] = []
        dtype = _summed_in(hidden_B.dtype)
        found = torch.zeros(3, len(targets_R), dtype=dtype, device=hidden_B.device)
        log_probs_R, log_sums_R, entropies_R = found.unbind()
        for here in _chunks(len(targets_R), chunk_size):
            logits_CV = _logits(hidden_B[predicting_R[here]], weight, part)
            largest_C, target_C, sum_C, weighted_C = _sums(logits_CV, targets_R[here], part, scale, with_entropy)
            log_probs_R[here] = target_C - sum_C.log()
            log_sums_R[here] = largest_C + sum_C.log()
            entropies_R[here] = sum_C.log() - weighted_C / sum_C
            fits = logits_CV.nbytes <= room
            kept.append(logits_CV if fits else None)
            room -= logits_CV.nbytes if fits else 0
        ctx.kept = kept
        ctx.save_for_backward(hidden_B, weight, predicting_R, targets_R, log_sums_R, entropies_R)
        ctx.options = part, scale, chunk_size
        ctx.set_materialize_grads(False)  # if the loss does not read the entropy, its gradient is None
        return log_probs_R, entropies_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_B, weight, predicting_R, targets_R, log_sums_R, entropies_R = ctx.saved_tensors
        part, scale, chunk_size = ctx.options
        hidden_gradient = torch.zeros_like(hidden_B)
        main_grad = main_gradient(weight)
        of_part: Tensor | None = None  # summed over chunks in fp32
        gradient_R, entropy_gradient_R = gradients
        if gradient_R is None:
            gradient_R = torch.zeros_like(log_sums_R)
        for number, here in enumerate(_chunks(len(targets_R), chunk_size)):
            hidden_C = hidden_B[predicting_R[here]]
            logits_CV, ctx.kept[number] = ctx.kept[number], None
            logits_gradient = _logits_gradient(
                _logits(hidden_C, weight, part) if logits_CV is None else logits_CV,
                targets_R[here],
                log_sums_R[here],
                entropies_R[here],
                gradient_R[here],
                None if entropy_gradient_R is None else entropy_gradient_R[here],
                part,
                scale,
            )
            hidden_gradient.index_copy_(0, predicting_R[here], logits_gradient @ weight[: part.size])
            if main_grad is not None:
                add_product(main_grad[: part.size], logits_gradient, hidden_C)
            else:
                share = _weight_gradient(logits_gradient, hidden_C)
                of_part = share.to(_summed_in(share.dtype)) if of_part is None else of_part.add_(share)
                del share
            del logits_CV, logits_gradient  # free them before the next chunk's are made
        return hidden_gradient, _of_table(of_part, weight) if main_grad is None else added(weight), *[None] * 7


def _of_table(of_part: Tensor | None, weight: Tensor) -> Tensor:
    """Return the gradient of the whole table in its dtype, with 0 in the rows that are padding."""
    if of_part is not None and len(of_part) == len(weight):
        return of_part.to(weight.dtype)
    gradient = torch.zeros_like(weight)
    if of_part is not None:
        gradient[: len(of_part)] = of_part
    return gradient


def _chunks(size: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, size)) for start in range(0, size, chunk_size)]


def response_log_probs(
    hidden: Tensor,
    weight: Tensor,
    predicting_R: Tensor,
    targets_R: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
    sequence_parallel: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log-prob, and the entropy of its distribution if requested, both [R] in float32 (or 64).

    Args:
        hidden: the last hidden states [B, 1, H]; under sequence parallelism this rank's [B / TP, 1, H].
        weight: this rank's rows of the output layer.
        predicting_R: the position in the pack that predicts each target; all are distinct.
        vocab_size: the number of token ids, without padding.
        group: the tensor-parallel ranks.
    """
    # Each rank's gradient of the hidden states covers its part of the vocabulary. In the backward pass both mappings
    # sum these parts over the ranks; the first one also scatters the sum over the sequence again.
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=group
        )
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
    log_probs_R, entropy_R = _ResponseLogProbs.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden.squeeze(1).to(weight.dtype),
        weight,
        predicting_R,
        targets_R,
        VocabularyPart.of(len(weight), vocab_size, group),
        1.0 / temperature if temperature > 0 else 1.0,
        chunk_size,
        with_entropy,
        KEPT_LOGITS if hidden.is_cuda and torch.is_grad_enabled() else 0,
    )
    return log_probs_R, entropy_R if with_entropy else None
