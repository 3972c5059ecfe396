"""Hugging Face weights into a sharded model and out again: same names, same bits, same order on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import FAMILIES, hf_dir, hf_model, make_args
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.args import Args
from slime.models.hf_files import HFReader

pytestmark = pytest.mark.dist


def loaded(rank: int, world_size: int, init_method: str, args: Args, wrap: bool) -> Any:
    """Fill a model from --hf-checkpoint; return names and tensors as they come out, and padding that is not zero."""
    from slime.megatron.model import hf_weights
    from slime.megatron.model.build import build_model, named_parameters
    from slime.megatron.model.hf_weights import iter_hf_tensors, load_hf_into

    assert args.hf_checkpoint is not None and args.architecture is not None
    with joined(args, rank, world_size, init_method) as topology:
        model = build_model(args, wrap=wrap)
        load_hf_into(model, args.architecture, HFReader(args.hf_checkpoint), args)
        padding = 0
        for name, parameter in named_parameters(model):
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first_row = topology.tp_rank * parameter.shape[0]
                rows = parameter.detach()[max(args.architecture.vocab_size - first_row, 0) :]
                padding += int(rows.count_nonzero())
        together = list(iter_hf_tensors(model, args.architecture))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_weights, "GATHER_BYTES", 1000)  # many gathers, most of them with several tensors
            apart = list(iter_hf_tensors(model, args.architecture))
        assert [name for name, _ in apart] == [name for name, _ in together]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(apart, together, strict=True))
        return together, padding


def file_tensors(path: Path) -> dict[str, Tensor]:
    reader = HFReader(path)
    return {name: reader.get(name) for name in reader.names()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2)])
def test_load_and_export_keep_every_bit(workers: WorkerPool, tmp_path: Path, family: str, tp_size: int, pp_size: int):
    hf = hf_dir(tmp_path / "hf", family)
    for bf16 in (False, True):
        args = make_args(
            hf,
            tensor_model_parallel_size=tp_size,
            sequence_parallel=tp_size > 1,
            pipeline_model_parallel_size=pp_size,
            bf16=bf16,
        )
        results = workers.run(tp_size * pp_size, loaded, args, bf16)
        expected = {
            name: tensor.to(torch.bfloat16 if bf16 else torch.float32) for name, tensor in file_tensors(hf).items()
        }
        for tensors, padding in results:
            assert padding == 0
            assert [name for name, _ in tensors] == [name for name, _ in results[0][0]]
            assert sorted(name for name, _ in tensors) == sorted(expected)
            for name, tensor in tensors:
                assert tensor.is_contiguous() and tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), name


def refusal(rank: int, world_size: int, init_method: str, args: Args) -> str:
    from slime.megatron.model.build import build_model
    from slime.megatron.model.hf_weights import load_hf_into

    assert args.hf_checkpoint is not None and args.architecture is not None
    with joined(args, rank, world_size, init_method):
        model = build_model(args, wrap=False)
        try:
            load_hf_into(model, args.architecture, HFReader(args.hf_checkpoint), args)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, "Hugging Face tensors without a rule: model.layers.2.input_layernorm.weight, "),
        ({"num_layers": 6}, "Hugging Face tensors that are missing: model.layers.4.input_layernorm.weight, "),
        ({"add_qkv_bias": False}, "without a rule: model.layers.0.self_attn.k_proj.bias, "),
        ({"ffn_hidden_size": 100}, "model.layers.0.mlp.gate_up_proj.weight in "),
        ({"vocab_size": 92}, "model.embed_tokens.weight has 93 rows, the vocabulary has 92"),
    ],
)
def test_weights_of_another_model_are_named(
    workers: WorkerPool, tmp_path: Path, change: dict[str, Any], message: str, stages: int
):
    args = make_args(hf_dir(tmp_path, "glm4", num_layers=4), pipeline_model_parallel_size=stages)
    assert args.architecture is not None
    errors = workers.run(stages, refusal, replace(args, architecture=replace(args.architecture, **change)))
    assert message in errors[0] and errors == errors[:1] * stages


def test_a_misfit_on_one_stage_stops_every_rank(workers: WorkerPool, tmp_path: Path):
    args = make_args(hf_dir(tmp_path, "glm4"), pipeline_model_parallel_size=2)
    name = "model.layers.1.mlp.down_proj.weight"
    weights = file_tensors(tmp_path)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, tmp_path / "model.safetensors")
    errors = workers.run(2, refusal, args)
    assert name in errors[0] and errors[0] == errors[1]


def test_a_tied_file_may_repeat_the_output_layer(workers: WorkerPool, tmp_path: Path):
    args = make_args(hf_dir(tmp_path, "qwen3-tied"))
    weights = {name: tensor.contiguous() for name, tensor in hf_model("qwen3-tied").state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert workers.run(1, refusal, args) == [""]
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (error,) = workers.run(1, refusal, args)
    assert "lm_head.weight differs from model.embed_tokens.weight" in error


def exported(rank: int, world_size: int, init_method: str, args: Args, path: Path) -> None:
    from slime.megatron.model.build import build_model
    from slime.megatron.model.hf_weights import load_hf_into, save_hf

    assert args.hf_checkpoint is not None and args.architecture is not None
    with joined(args, rank, world_size, init_method):
        model = build_model(args, wrap=False)
        load_hf_into(model, args.architecture, HFReader(args.hf_checkpoint), args)
        save_hf(path, model, args.architecture, args.hf_checkpoint)


def test_export_equals_the_source_in_its_dtype(workers: WorkerPool, tmp_path: Path):
    """A bf16 directory that was trained in fp32 is exported as bf16 again."""
    hf = tmp_path / "hf"
    hf_model("glm4").to(torch.bfloat16).save_pretrained(hf)
    args = make_args(hf, tensor_model_parallel_size=2, sequence_parallel=True)
    workers.run(2, exported, args, tmp_path / "out")
    ours, theirs = file_tensors(tmp_path / "out"), file_tensors(hf)
    assert ours.keys() == theirs.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_exported_config_describes_the_trained_model(workers: WorkerPool, tmp_path: Path):
    """With --override-hf-config rotary-base, the source's config.json would describe another function."""
    hf = hf_dir(tmp_path / "hf", "llama3")
    args = make_args(hf)
    assert args.architecture is not None
    workers.run(1, exported, args, tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    trained = replace(args.architecture, rotary_base=5e4)
    workers.run(1, exported, replace(args, architecture=trained), tmp_path / "out")
    assert hf_architecture(read_hf_config(tmp_path / "out")) == trained != hf_architecture(read_hf_config(hf))
