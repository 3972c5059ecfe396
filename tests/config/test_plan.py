"""The memory section of --dry-run: sums, units and notes. tests/config/test_memory.py checks the numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from config_run import Run

from slime.config.args import Args
from slime.core.architecture import Architecture
from slime.plan.summary import format_plan

GLM4_9B = Architecture(
    family="glm4",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=13696,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151552,
    max_position_embeddings=32768,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
    rotary_percent=0.5,
    add_qkv_bias=True,
    post_self_attn_layernorm=True,
    post_mlp_layernorm=True,
)

PAGE = Args(
    architecture=GLM4_9B,
    actor_num_gpus_per_node=4,
    rollout_num_gpus=4,
    rollout_num_gpus_per_engine=2,
    rollout_engine="sglang",
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    context_parallel_size=2,
    recompute_granularity="full",
    recompute_method="uniform",
    recompute_num_layers=1,
    use_dynamic_batch_size=True,
    max_tokens_per_gpu=4608,
    rollout_batch_size=32,
    n_samples_per_prompt=8,
    rollout_max_response_len=8192,
    num_rollout=3000,
    global_batch_size=256,
    num_steps_per_rollout=1,
    over_sampling_batch_size=32,
    eps_clip_high=0.28,
    logprob_gap_alarm=0.1,
    log_probs_chunk_size=4096,
    bf16=True,
)
"""The page's run on GPUs, resolved."""


def memory_of(args: Args) -> dict[str, str]:
    """Return the rows of the plan's memory section by name."""
    section = format_plan(args, []).split("\nMemory\n")[1].split("\n\n")[0]
    return {line[2:16].strip(): line[17:] for line in section.splitlines()}


def numbers(row: str) -> list[float | None]:
    """Return the numbers in the two columns."""
    return [None if cell == "-" else float(cell.replace(",", "")) for cell in row.split()[:2]]


def test_the_page() -> None:
    rows = memory_of(PAGE)
    assert rows["GiB"].split() == ["train", "engine", "a", "GPU"]
    billions = GLM4_9B.num_parameters() / 2 / 2**30
    assert numbers(rows["weights"]) == pytest.approx([2 * billions, 2 * billions], abs=0.1)
    assert numbers(rows["gradients"])[0] == pytest.approx(4 * billions, abs=0.1)
    assert numbers(rows["optimizer"])[0] == pytest.approx(12 * billions, abs=0.1)
    # 40 layers x 2304 rows of the residual stream, in bf16
    assert numbers(rows["activations"])[0] == pytest.approx(40 * 2304 * 4096 * 2 / 2**30, abs=0.2)
    # 128 requests an engine; a token has 40 layers of one KV head on each of its two GPUs
    assert numbers(rows["KV cache"])[1] == pytest.approx(128 * 8192 * 40 * 2 * 128 * 2 / 2**30, abs=0.1)
    assert "4,608 tokens, full recompute" in rows["activations"]
    assert "128 requests of 8,192 tokens" in rows["KV cache"]


def test_rows_add_up() -> None:
    assert "forward" not in memory_of(PAGE)["at most"]  # one step a rollout, no reference: there is none
    rows = memory_of(replace(PAGE, num_steps_per_rollout=2, global_batch_size=128))
    train = {name: numbers(row)[0] or 0.0 for name, row in rows.items() if name not in ("GiB", "")}
    working = max(train.pop("log-probs"), train.pop("layers"))
    peak = train.pop("at most")
    assert sum(train.values()) + working == pytest.approx(peak, abs=0.3)
    assert float(re.findall(r"training step ([\d.]+)", rows["at most"])[0]) == peak


def test_each_evaluation_set_has_its_own_sampling(run: Run) -> None:
    config = run.directory / "eval.yaml"
    own = "{name: b, path: b.jsonl, n_samples_per_eval_prompt: 4, temperature: 0.5, rm_type: math}"
    config.write_text("datasets:\n  - {name: a, path: a.jsonl}\n  - " + own + "\n")
    words = ["--eval-prompt-data", "c", "c.jsonl@[:9]", "--eval-config", str(config), "--dry-run"]
    plan = format_plan(*run.load(*words))
    for line in (
        "evaluation     before the first and after the last",
        "c: c.jsonl@[:9]",
        "a: a.jsonl",
        "b: b.jsonl, math",
    ):
        assert f" {line}\n" in plan
    sampling = [line.split(" a prompt")[0].strip() for line in plan.splitlines() if " a prompt, up to" in line]
    assert sampling == ["1 sample", "1 sample", "4 samples"]
    assert plan.count("temperature 0.5, top-p 1") == 1
    config.unlink()
    assert f"\n                 on c c.jsonl@[:9] {config}\n" in format_plan(*run.load(*words))


def test_a_terminal_breaks_lines_between_words(run: Run) -> None:
    planned = run.load("--balance-data", "--dry-run")
    whole, narrow = format_plan(*planned), format_plan(*planned, width=60)
    assert max(map(len, whole.splitlines())) > 100  # control: there is something to break
    paths = str(run.directory)
    assert all(len(line) <= 60 or paths in line for line in narrow.splitlines())
    assert narrow.split() == whole.split()
    starts = {len(line) - len(line.lstrip()) for line in narrow.splitlines() if line}
    assert starts <= {0, 2, 4, 17, 19}


def test_rows_of_the_memory_plan() -> None:
    assert "host memory" not in memory_of(PAGE)
    with_reference = memory_of(replace(PAGE, log_ref_kl=True))
    assert "in host memory" in with_reference["reference"]
    assert numbers(with_reference["host memory"])[0] == pytest.approx(17.5, abs=0.1)
    assert "1/2" in memory_of(replace(PAGE, use_distributed_optimizer=True))["optimizer"]
    long = memory_of(replace(PAGE, rollout_max_response_len=16384))["activations"]
    assert "8,192 tokens" in long
    assert "longer than --max-tokens-per-gpu" in long
    stages = replace(PAGE, pipeline_model_parallel_size=2, context_parallel_size=1)
    assert "stage 1, the fullest" in memory_of(stages)["activations"]
    assert "20, 20 layers" in format_plan(stages, [])
    shared = replace(PAGE, colocate=True, offload=True, sglang={"mem_fraction_static": 0.5})
    rows = memory_of(shared)
    assert "weights and optimizer while the engine has it; 4 of them on a node" in rows["host memory"]
    text = format_plan(shared, [])
    assert "take turns on a GPU" in text
    assert re.search(r"the GPU holds for both: training [\d.]+, weights sent [\d.]+, generating [\d.]+ GiB", text)
    fits = numbers(rows["weights"])[1] or 0.0
    fits += numbers(rows["KV cache"])[1] or 0.0
    assert f"takes 50% of a GPU for weights and KV: one of {2 * fits:,.0f} GiB" in text
    assert "the GPU holds for both: always" in format_plan(replace(shared, offload=False), [])
    assert "not estimated: the model is unknown" in format_plan(replace(PAGE, architecture=None), [])


def test_a_plan_on_this_machine(run: Run) -> None:
    """The plan of the tests' small model has its own unit and both columns."""
    rows = memory_of(run.args("--log-ref-kl"))
    assert rows["MiB"].split() == ["train", "engine", "a", "process"]
    assert "copy of the actor" in rows["reference"]
    assert all(None not in numbers(rows[name]) for name in ("weights", "at most"))
    assert "-" in memory_of(run.args("--debug-rollout-only"))["weights"].split()[0]


def test_the_plan_shows_rollouts_ahead() -> None:
    ahead = replace(PAGE, rollouts_ahead=1)
    assert "one rollout ahead" not in format_plan(PAGE, [])
    assert "the weight sync waits until it is complete" in format_plan(ahead, [])
    passes = replace(ahead, update_weight_pause="abort")
    assert "the weight sync passes between its requests" in format_plan(passes, [])
