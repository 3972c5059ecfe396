"""Fused passes over lists of tensors against Megatron's own tensor by tensor, which a CPU keeps."""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_scale
from torch import Tensor

from slime.megatron.optim import multi_tensor


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (7,), (1,), (2, 3, 4))]


def test_norm_covers_all_entries() -> None:
    flag, lists = torch.zeros(1), [tensors()]
    found, _ = multi_tensor._norm(1, flag, lists, False)
    expected = torch.cat([tensor.flatten() for tensor in tensors()]).norm()
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], expected)
    assert abs(float(found) - sum(float(tensor.norm()) for tensor in tensors())) > 0.1


def test_scale_is_in_place() -> None:
    ours, theirs = tensors(), tensors()
    multi_tensor._scale(1, torch.zeros(1), [ours, ours], 0.25)
    local_multi_tensor_scale(1, torch.zeros(1), [theirs, theirs], 0.25)
    for found, expected, before in zip(ours, theirs, tensors(), strict=True):
        assert torch.equal(found, expected) and not torch.equal(found, before)


def test_copies_are_rounded_to_the_target() -> None:
    source, target = tensors(), tensors(1, torch.bfloat16)
    multi_tensor._copy(source, target)
    for found, expected in zip(target, source, strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
    multi_tensor._copy([], [])


def stepped(factor: float, *, as_read: bool, skip: float = 0.0) -> list[Tensor]:
    weights = [tensor.requires_grad_() for tensor in tensors()]
    adam = torch.optim.AdamW(weights, lr=1e-2, eps=1e-3, weight_decay=0.1, fused=True)
    for number in range(3):
        for weight, gradient in zip(weights, tensors(number + 1), strict=True):
            weight.grad = gradient if as_read else gradient * factor
        if as_read:
            with multi_tensor.scaled_as_read([adam], torch.tensor(1.0 / factor), torch.tensor(skip)):
                adam.step()
        else:
            adam.step()
    return [weight.detach() for weight in weights]


def test_adam_scales_gradients_as_it_reads_them() -> None:
    """The epsilon makes the scale matter; the scale is removed after the step. A skipped step changes nothing."""
    pairs = zip(stepped(0.01, as_read=True), stepped(0.01, as_read=False), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-6
    pairs = zip(stepped(1.0, as_read=True), stepped(0.01, as_read=False), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-4
    skipped = stepped(0.01, as_read=True, skip=1.0)
    assert all(torch.equal(found, before) for found, before in zip(skipped, tensors(), strict=True))
    assert not multi_tensor.takes_scale(torch.optim.AdamW(tensors(), fused=True))  # on a CPU Megatron clips


def test_a_cpu_keeps_megatrons_functions() -> None:
    before = clip_grads.l2_norm_impl
    multi_tensor.install()
    assert clip_grads.l2_norm_impl is before and not multi_tensor.fuse_weight_gradients()
