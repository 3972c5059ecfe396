"""The table of attention kernels: which one computes a case, and what the log says about it. No kernel runs here."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime.megatron.model import flash_attention
from slime.megatron.model.flash_attention import KERNELS, Case, choose, fa4, kernel_for

HOPPER = Case(capability=(9, 0), dtype=torch.bfloat16, head=128)
FA4, TORCH, EACH = (kernel.name for kernel in KERNELS)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Import FlashAttention-4 and log choices again in each test."""
    loaded = {name for name in sys.modules if name.split(".")[0] == "flash_attn"}
    yield
    for name in {name for name in sys.modules if name.split(".")[0] == "flash_attn"} - loaded:
        del sys.modules[name]
    fa4.cache_clear()
    kernel_for.cache_clear()


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Put a package flash_attn with the module cute on the path of imports."""
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    (folder / "flash_attn" / "cute" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    fa4.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, "def flash_attn_varlen_func(): ...")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "name", "reasons"),
    [
        ({}, FA4, []),
        ({"backend": "flash", "dtype": torch.float16, "head": 64}, FA4, []),
        ({"capability": (10, 0)}, FA4, []),
        ({"capability": (10, 0), "head": 256}, TORCH, ["a head has 256 channels"]),
        ({"capability": (8, 0)}, TORCH, ["it has no kernels of its own for compute capability 8.0"]),
        ({"capability": (12, 0)}, TORCH, ["it has no kernels of its own for compute capability 12.0"]),
        ({"head": 16}, TORCH, ["a head has 16 channels"]),
        ({"backend": "fused"}, TORCH, ["--attention-backend fused"]),
        (
            {"deterministic": True},
            TORCH,
            ["--deterministic: it adds gradients in the order in which blocks finish"],
        ),
        ({"backend": "unfused"}, EACH, ["--attention-backend unfused"] * 2),
        ({"backend": "local"}, EACH, ["--attention-backend local"] * 2),
        ({"dtype": torch.float32}, EACH, ["the dtype is float32"] * 2),
        ({"dtype": torch.float64, "deterministic": True}, EACH, ["the dtype is float64"] * 2),
        ({"head": 12}, EACH, ["a head has 12 channels"] * 2),
        ({"head": 264}, EACH, ["a head has 264 channels"] * 2),
        ({"capability": (7, 5)}, EACH, [None, "compute capability 7.5"]),
        ({"capability": None}, EACH, ["the tensors are on a CPU"] * 2),
    ],
)
def test_first_kernel_without_a_reason(changes: dict[str, object], name: str, reasons: list[str | None]) -> None:
    kernel, found = choose(replace(HOPPER, **changes))  # pyright: ignore[reportArgumentType]
    assert kernel.name == name
    assert list(found) == [FA4, TORCH, EACH][: len(reasons)]
    assert [why for why, wanted in zip(found.values(), reasons, strict=True) if wanted not in (None, why)] == []


def test_absent_package_is_a_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(flash_attention, "FA4_MODULE", "flash_attn_that_is_not_here.cute")
    with caplog.at_level(logging.INFO):
        kernels = [kernel_for(HOPPER), kernel_for(HOPPER)]
    assert [kernel.name for kernel in kernels] == [TORCH, TORCH]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages == [f"attention: {TORCH}; not {FA4}: flash-attn-4 is not installed"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import cutlass_that_is_missing", "ModuleNotFoundError: No module named 'cutlass_that_is_missing'"),
        ("raise OSError('libcudart.so.13:\\nno such file')", "OSError: libcudart.so.13: no such file"),
        ("", "AttributeError: module 'flash_attn.cute' has no attribute 'flash_attn_varlen_func'"),
    ],
)
def test_broken_package_is_a_warning(
    source: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, monkeypatch, source)
    with caplog.at_level(logging.INFO):
        assert kernel_for(HOPPER).name == TORCH
        assert kernel_for(replace(HOPPER, head=64)).name == TORCH
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"attention: FlashAttention-4 is installed, but cannot be imported: {text}"]
    assert caplog.messages[1] == f"attention: {TORCH}; not {FA4}: its import failed ({text})"
    with pytest.raises(RuntimeError, match="FlashAttention-4: its import failed"):
        empty = torch.empty(0)
        flash_attention.attend_fa4(empty, empty, empty, empty, empty, 1, 1, None)


def test_older_flash_attn_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.ModuleType("flash_attn")
    older.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", older)
    fa4.cache_clear()
    assert fa4() == (None, "flash-attn-4 is not installed")


STAND_IN = """
from slime.megatron.model.flash_attention import attend_each

def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, return_lse):
    assert causal and return_lse
    return attend_each(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None
"""


def test_all_kernels_take_the_same_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, STAND_IN)
    query, key, value = torch.randn(7, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    cu_q, cu_k = torch.tensor([0, 2, 7], dtype=torch.int32), torch.tensor([0, 5, 11], dtype=torch.int32)
    expected = flash_attention.attend_each(query, key, value, cu_q, cu_k, 0.3)
    assert torch.equal(flash_attention.attend(query, key, value, cu_q, cu_k, 5, 6, 0.3), expected)
    assert torch.equal(flash_attention.attend_fa4(query, key, value, cu_q, cu_k, 5, 6, 0.3), expected)
    assert not torch.equal(flash_attention.attend_fa4(query, key, value, cu_q, cu_k, 5, 6, None), expected)
    with pytest.raises(IndexError) as error:
        flash_attention.attend_fa4(query, key, value, cu_q, cu_k[:1], 5, 6, 0.3)
    assert "--attention-backend fused uses PyTorch's" in error.value.__notes__[0]


@pytest.mark.usefixtures("installed")
def test_import_is_tried_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"capability": None}, {"capability": (8, 0)}, {"backend": "fused"}, {"deterministic": True}):
        choose(replace(HOPPER, **changes))
        assert fa4.cache_info().misses == 0
    choose(HOPPER)
    assert fa4.cache_info().misses == 1
