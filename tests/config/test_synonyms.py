"""Flags that slime does not know: other trainers' names, missing features, slips of the finger, and nothing else."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.config.flags.synonyms import ABSENT, SYNONYMS, absent, misspelt, shortened, synonym
from slime.config.flags.table import spellings
from slime.config.parse import Given, read_command_line


def complaint(*words: str) -> str:
    given = Given()
    read_command_line(given, words)
    [problem] = given.problems
    return str(problem)


def test_the_table_leads_from_unknown_to_known_flags() -> None:
    known = spellings()
    assert len(SYNONYMS) > 60
    assert {name for name in SYNONYMS if f"--{name}" in known} == set()
    assert {flag for flag in SYNONYMS.values() if flag not in known} == set()
    assert SYNONYMS.keys() & ABSENT.keys() == set()


def test_each_synonym_is_suggested() -> None:
    for name, flag in SYNONYMS.items():
        for spelling in (f"--{name}", f"--{name.replace('-', '_')}"):
            assert complaint(spelling, "1") == f"{spelling}: unknown flag; did you mean {flag}?"


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("actor_rollout_ref.rollout.n", "--n-samples-per-prompt"),
        ("actor_rollout_ref.actor.optim.lr", "--lr"),
        ("actor_rollout_ref.model.path", "--hf-checkpoint"),
        ("algorithm.adv_estimator", "--advantage-estimator"),
        ("data.max_response_length", "--rollout-max-response-len"),
        ("trainer.n_gpus_per_node", "--actor-num-gpus-per-node"),
    ],
)
def test_keys_of_verl(key: str, flag: str) -> None:
    assert synonym(f"--{key}") == flag
    assert complaint(f"--{key}=4").endswith(f"did you mean {flag}?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use-lora"], "--use-lora: LoRA is not part of this version"),
        (["--lora-rank", "8"], "--lora-rank: LoRA is not part of this version"),
        (["--lora-target-modules", "a"], "--lora-target-modules: LoRA"),  # SGLang has such a flag, for serving
        (["--use_peft"], "--use_peft: LoRA is not"),
        (["--image-key", "image"], "--image-key: models of images and videos are not part of this version"),
        (["--dpo-beta", "1"], "--dpo-beta: learning from pairs of answers is not part of this version"),
        (["--reward-model", "m"], "--rm-type remote_rm"),
        (["--deepspeed", "a.json"], "--deepspeed: slime trains with Megatron-core; use --use-distributed-optimizer"),
        (["--max-prompt-length", "512"], "--rollout-max-context-len"),
        (["--loss-type", "dpo"], "learning from pairs of answers is not part of this version: use a reward"),
        (["--loss-type", "dop"], "it means: "),
    ],
)
def test_missing_features_are_named(words: list[str], message: str) -> None:
    assert message in complaint(*words)
    assert "did you mean" not in complaint(*words)


def test_features_in_yaml_are_named(run: Run) -> None:
    file = run.directory / "more.yaml"
    file.write_text("lora_rank: 8\nlearning_rate: 1e-6\n")
    errors = run.errors("--config", str(file))
    assert [error.split(": ", 1)[1] for error in errors] == [
        "lora_rank: LoRA is not part of this version; leave it out: all weights are trained",
        "learning_rate: unknown flag; did you mean --lr?",
    ]


@pytest.mark.parametrize(
    ("spelling", "flag"),
    [
        ("--rollout-btach-size", "--rollout-batch-size"),
        ("--advantage-estimater", "--advantage-estimator"),
        ("--num_rollouts", "--num-rollout"),
        ("--sglang-lora-pahts", "--sglang-lora-paths"),  # a slip in a flag that exists is no missing feature
        ("--wandb", "--use-wandb"),
        ("--eval-prompt", "--eval-prompt-data"),
        ("--qqqq", None),
        ("--checkpoint-everything", None),
        ("--num-experts-of-mine", None),
        ("--eval", None),  # several begin so
    ],
)
def test_only_near_names_are_suggested(spelling: str, flag: str | None) -> None:
    found = complaint(spelling, "1")
    assert found.endswith(f"did you mean {flag}?" if flag else "--help names slime's flags, --help all every flag")


def test_words_inside_other_words_are_no_features() -> None:
    assert absent("--explorative") is None and absent("--revision") is None
    assert misspelt("--learning-rate", spellings()) is None and shortened("--lr", spellings()) is None
