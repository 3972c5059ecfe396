"""The embedded engine's model of every family: the names of the weight table, and transformers' greedy responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from test_scheduler import make_bench, prompts, request

from slime.config.architecture import FAMILIES, hf_architecture, read_hf_config
from slime.engine.embedded.model import Model
from slime.models.families import weight_table

MODELS = ("glm4", "qwen3", "qwen2", "llama3", "mistral", "qwen3_moe", "glm4_moe")


def test_every_family_is_served(model_dirs: dict[str, Path]) -> None:
    assert {hf_architecture(read_hf_config(model_dirs[name])).family for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_the_weight_tables(name: str, model_dirs: dict[str, Path]) -> None:
    arch = hf_architecture(read_hf_config(model_dirs[name]))
    for tied in (False, True):
        ours = replace(arch, tied_embeddings=tied)
        assert sorted(Model(ours).weights) == sorted(weight_table(ours).hf_names())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_responses_are_transformers(name: str, model_dirs: dict[str, Path]) -> None:
    bench, hf = make_bench(model_dirs[name]), tiny_models.hf_model(model_dirs[name])
    for number, text in enumerate(prompts(4, seed=8)):
        bench.add(request(text, seed=number, temperature=0.0, max_new_tokens=60))
    for done in bench.run():
        ids = torch.tensor([done.input_ids])
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
        assert done.output_ids == expected[0, len(done.input_ids) :].tolist()


def test_control_without_scaling_responses_differ(model_dirs: dict[str, Path]) -> None:
    outputs: list[list[int]] = []
    for scaled in (True, False):
        bench = make_bench(model_dirs["llama3"])
        if not scaled:
            model = bench.scheduler.model
            model._rotation = Model(replace(model.architecture, rope_scaling=None))._rotation
        done = bench.add(request(prompts(1, seed=8, shortest=40)[0], temperature=0.0, max_new_tokens=60))
        bench.run()
        outputs.append(done.output_ids)
    assert outputs[0] != outputs[1]


def test_there_is_no_padding_to_sample(tmp_path: Path) -> None:
    """The engine's table ends with the vocabulary, and a padded table from a trainer is refused."""
    bench = make_bench(tiny_models.make_model(tmp_path, "qwen2", vocab_size=93))
    model = bench.scheduler.model
    assert model.logits(torch.zeros(1, model.architecture.hidden_size)).shape == (1, 93)
    for number in range(3):
        bench.add(request([1, 2, 3], seed=number, temperature=50.0, max_new_tokens=200))
    sampled = {token for done in bench.run() for token in done.output_ids}
    assert max(sampled) < 93 and len(sampled) > 80
    padded = torch.zeros(128, model.architecture.hidden_size)
    with pytest.raises(ValueError, match=r"lm_head\.weight is sent as \[128, 64\], the model's is \[93, 64\]"):
        bench.weights.write_bucket(["lm_head.weight"], [padded], version=None, flush=True)
