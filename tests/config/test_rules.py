"""The rules: each contradiction gives one error, each flag without effect one warning, and disabled features pass."""

from __future__ import annotations

import json
import os
import re

import pytest
from config_run import Run

from slime.config.flags.table import all_flags
from slime.config.resolve import cuda_available
from slime.config.rules.files import PLANNED_ROWS
from slime.config.rules.megatron_fields import DECIDED, HARMLESS, HARMLESS_VALUES, NOT_BUILT_HERE
from slime.plan.summary import format_plan


def test_the_base_passes(run: Run) -> None:
    assert run.errors() == []
    assert run.warnings() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-steps-per-rollout 3", "--num-steps-per-rollout 3: 4 prompts x 2 samples = 8 cannot be split"),
        ("--global-batch-size 3", "--global-batch-size 3: does not divide"),
        ("--global-batch-size 16", "--global-batch-size 16: does not divide"),
        (
            "--global-batch-size 4 --num-steps-per-rollout 4",
            "--global-batch-size 4: contradicts --num-steps-per-rollout 4",
        ),
        ("--over-sampling-batch-size 3", "--over-sampling-batch-size 3: less than --rollout-batch-size 4"),
        ("--n-samples-per-prompt 1", "--n-samples-per-prompt 1: grpo compares"),
        ("--rollout-top-p 0.9", "--rollout-top-p 0.9: training rollouts"),
        ("--rollout-top-k 5", "--rollout-top-k 5: training rollouts"),
        ("--num-epoch 2", "--num-rollout 3: cannot be combined with --num-epoch 2"),
        ("--use-dynamic-batch-size", "--use-dynamic-batch-size: has no token budget; add --max-tokens-per-gpu"),
        ("--eval-interval 2", "--eval-interval 2: nothing to evaluate on"),
        ("--fp16", "--fp16: RL's log-prob ratios need bf16 or fp32"),
        ("--attention-dropout 0.1", "--attention-dropout 0.1: packed attention has no dropout"),
        ("--rm-type deepscalar", "--rm-type deepscalar: unknown reward type; one of deepscaler"),
        (
            "--tensor-model-parallel-size 2",
            "--tensor-model-parallel-size 2: TP 2 x PP 1 x CP 1 = 2 does not divide the 1",
        ),
        (
            "--tensor-model-parallel-size 4 --actor-num-gpus-per-node 4",
            "--tensor-model-parallel-size 4: does not divide the 2 KV heads",
        ),
        ("--masked-softmax-fusion", "--masked-softmax-fusion: slime sets it to False itself"),
        ("--recompute-granularity full", "--recompute-granularity full: full needs a method"),
        ("--rollout-num-gpus-per-engine 3", "--rollout-num-gpus 2: is not a multiple"),
        ("--rollout-num-gpus 0", "--rollout-num-gpus 0: no engine, but rollouts are generated"),
        ("--sglang-router-ip 127.0.0.1 --dry-run", "--sglang-router-ip 127.0.0.1: is half of an address"),
        ("--rollout-num-gpus 0 --num-rollout 0 --eval-prompt-data TRAIN", "--rollout-num-gpus 0: no engine, but evalu"),
        ("--sglang-dp-size 2", "--sglang-dp-size 2: data parallelism inside an engine needs DP attention"),
        ("--debug-train-only", "--debug-train-only: has nothing to train on; add --load-debug-rollout-data"),
        ("--loss-type custom_loss", "--loss-type custom_loss: has no function"),
        ("--use-kl-loss --kl-loss-coef 0.1 --ref-load /nowhere", "--ref-load /nowhere: there is no such directory"),
        ("--ref-load /nowhere", "--ref-load /nowhere: there is no such directory"),
        ("--prompt-data /nowhere.jsonl", "--prompt-data /nowhere.jsonl: there is no file /nowhere.jsonl"),
        ("--prompt-data /nowhere.jsonl@[1-2]", "--prompt-data /nowhere.jsonl@[1-2]: "),
        ("--hf-checkpoint /nowhere", "--hf-checkpoint /nowhere: there is no config.json"),
        ("--eval-prompt-data /nowhere.jsonl --eval-interval 1", "--eval-prompt-data /nowhere.jsonl: there is no file"),
        (
            "--eval-prompt-data a b c --eval-interval 1",
            "--eval-prompt-data a b c: 3 words; give one path, or NAME PATH",
        ),
        ("--eval-config /nowhere.yaml --eval-interval 1", "--eval-config /nowhere.yaml: there is no such file"),
        ("--custom-rm-path nowhere.reward", "--custom-rm-path nowhere.reward: "),
        ("--rollout-max-context-len 4096", "--rollout-max-context-len 4096: the model's context is 128"),
        (
            "--num-rollout 3 --lr-decay-style cosine --lr-warmup-iters 3",
            "--lr-warmup-iters 3: the warm-up must end before the decay ends, at optimizer step 3",
        ),
        (
            "--lr-decay-style linear --lr-decay-iters 5 --lr-warmup-iters 5",
            "--lr-warmup-iters 5: the warm-up must end before the decay ends, at optimizer step 5",
        ),
        ("--num-rollout 0", "--num-rollout 0: nothing to do: there is no rollout, and no evaluation"),
        (
            "--num-rollout 0 --debug-train-only --load-debug-rollout-data /tmp/0 --eval-prompt-data TRAIN",
            "--num-rollout 0: nothing to do",
        ),
        ("--save-debug-rollout-data /tmp/x.jsonl", "--save-debug-rollout-data /tmp/x.jsonl: has no {rollout_id}"),
        (
            "--save-debug-rollout-data /tmp/{foo}.jsonl",
            "--save-debug-rollout-data /tmp/{foo}.jsonl: only {rollout_id} can be filled in",
        ),
        ("--load-debug-rollout-data /tmp/{}.jsonl", "--load-debug-rollout-data /tmp/{}.jsonl: only {rollout_id}"),
        ("--save /tmp/s --save-hf /tmp/{rollout", "--save-hf /tmp/{rollout: only {rollout_id} can be filled in"),
        (
            "--optimizer-cpu-offload --optimizer sgd",
            "--optimizer-cpu-offload: only adam's state can be kept in host memory, not --optimizer sgd's; leave one",
        ),
        (
            "--optimizer-cpu-offload --no-decoupled-weight-decay",
            "--optimizer-cpu-offload: it requires AdamW, whose weight decay is decoupled, not --no-decoupled-weight",
        ),
        (
            "--use-distributed-optimizer --optimizer sgd",
            "--use-distributed-optimizer: Megatron can only shard adam, not --optimizer sgd; leave one of the two out",
        ),
        (
            "--rollout-stop-token-ids 5 128 -1",
            "--rollout-stop-token-ids 5 128 -1: the vocabulary has no token 128, -1: ",
        ),
        ("--rollout-stop=", "--rollout-stop: an empty text would end every response"),
        (
            "--use-tis --offpolicy-correction none",
            "--use-tis: cannot be combined with --offpolicy-correction none; leave one of the two out",
        ),
        ("--use-tis --tis-clip 0.9", "--tis-clip 0.9: the clips exclude 1"),
        ("--use-tis --tis-clip-low 1.1", "--tis-clip-low 1.1: the clips exclude 1"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD: WSD needs a decay length; add --lr-wsd-decay-iters"),
        (
            "--num-rollout 9 --lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 2",
            "--lr-wsd-decay-iters 8: the decay that ends at optimizer step 9 would begin during the warm-up",
        ),
        ("--lr-decay-style linear --lr 1e-6 --min-lr 1e-5", "--min-lr 1e-05: the decay would end above --lr 1e-06"),
        (
            "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
            "--lr-warmup-fraction 0.1: cannot be combined with --lr-warm",
        ),
        (
            "--lr-warmup-iters 2 --lr 1e-6 --lr-warmup-init 1e-5",
            "--lr-warmup-init 1e-05: the warm-up would begin above --lr 1e-06",
        ),
        ("--start-weight-decay 0.1", "--start-weight-decay 0.1: --weight-decay-incr-style constant keeps"),
        ("--weight-decay-incr-style linear", "--weight-decay-incr-style linear: needs a first and a last value"),
        (
            "--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
            "--start-weight-decay 0.2: greater than --end-weight-decay 0.1",
        ),
        (
            "--use-checkpoint-opt-param-scheduler --override-opt-param-scheduler",
            "--use-checkpoint-opt-param-scheduler: cannot be combined with --override-opt-param-scheduler",
        ),
    ],
)
def test_one_error(run: Run, words: str, message: str) -> None:
    error = run.error(*words.replace("TRAIN", str(run.data)).split())
    assert error.startswith(message)


def test_a_decay_needs_a_length(run: Run) -> None:
    run.base[run.base.index("--num-rollout") : run.base.index("--num-rollout") + 2] = ["--num-epoch", "2"]
    run.data.write_text(run.data.read_text() * 9)  # 18 prompts drawn in rollouts of 4
    cosine = ["--lr-decay-style", "cosine", "--lr-warmup-iters"]
    assert run.errors(*cosine, "4") == []
    assert "before the decay ends, at optimizer step 5" in run.error(*cosine, "5")
    assert run.errors(*cosine, "5", "--lr-decay-iters", "6") == []
    assert run.errors(*cosine, "5", "--dry-run", "--prompt-data", "/nowhere.jsonl") == [], "not known on this machine"
    assert run.errors("--lr-warmup-iters", "100") == []


def test_num_epoch_counts_the_rows_of_the_file(run: Run) -> None:
    run.base[run.base.index("--num-rollout") : run.base.index("--num-rollout") + 2] = ["--num-epoch", "3"]
    run.data.write_text(run.data.read_text() * 9)
    plan = format_plan(*run.load("--dry-run", "--prompt-data", f"{run.data}@[2:]"))
    assert f"3 epochs of 7 rows: 6 rollouts (fewer if some prompts are too long) from {run.data}@[2:]" in plan
    weighed = ("--prompt-data", f"{run.data}@[2:]", str(run.data), "--prompt-data-weights", "1", "0.5")
    assert "3 epochs of 12 rows: 9 rollouts" in format_plan(*run.load("--dry-run", *weighed))
    problem = "--prompt-data-weights 1.0 0.5 1.0: has 3 values, and --prompt-data has 2; give one weight for each word"
    assert problem in "\n".join(run.errors(*weighed, "1"))
    assert "3 epochs from /nowhere.jsonl" in format_plan(*run.load("--dry-run", "--prompt-data", "/nowhere.jsonl"))
    at = run.base.index("--prompt-data")
    del run.base[at : at + 2]
    replay = ["--debug-train-only", "--load-debug-rollout-data", str(run.directory / "{rollout_id}.json")]
    assert (
        run.error(*replay) == "--num-epoch 3: there are no prompts to count; add --prompt-data, or give --num-rollout"
    )


def test_a_run_without_steps_needs_no_length(run: Run) -> None:
    words = ["--num-rollout", "0", "--eval-prompt-data", str(run.data), "--lr-warmup-iters", "5"]
    assert run.errors(*words, "--lr-decay-style", "cosine") == []
    assert run.errors(*words, "--lr-decay-style", "WSD") == []


@pytest.mark.parametrize(
    "words",
    [
        "--glu-linear-offset 1",
        "--activation-func-clamp-value 2",
        "--attention-output-gate",
        "--qk-l2-norm",
        "--apply-query-key-layer-scaling",
        "--decoupled-lr 0.5",
        "--no-perform-initialization",
        "--window-size 8 0",
        "--fp32-residual-connection",
        "--loss-scale 2",
        "--average-in-collective",
        "--transformer-impl inference_optimized",
    ],
)
def test_megatron_fields_that_only_the_trainer_has(run: Run, words: str) -> None:
    error = run.error(*words.split())
    assert error.startswith(f"{words}: ")
    assert "the engine and the weight tables do not know it" in error


def test_megatron_fields_that_pass(run: Run) -> None:
    defaults = "--glu-linear-offset 0 --no-qk-l2-norm --perform-initialization --softmax-type vanilla"
    harmless = "--ddp-bucket-size 1000 --overlap-grad-reduce --init-method-std 0.5 --transformer-impl local"
    assert run.errors(*defaults.split(), *harmless.split()) == []
    assert run.errors("--moe-router-topk", "4", "--tp-comm-overlap", "--no-bias-swiglu-fusion") == []


def test_initialization_is_by_device(run: Run) -> None:
    wrong, right = "--no-use-cpu-initialization", "--use-cpu-initialization"
    if cuda_available():
        wrong, right = right, wrong
    assert run.error(wrong).startswith(f"{wrong}: slime sets it to ")
    assert run.errors(right) == []


def test_megatrons_list_names_fields_that_exist() -> None:
    names = {spec.name for spec in all_flags() if spec.source == "megatron"}
    assert names >= {*HARMLESS, *DECIDED, *HARMLESS_VALUES, *NOT_BUILT_HERE}


def test_colocate_with_rollout_num_gpus(run: Run) -> None:
    error = run.error("--colocate", "--dry-run")
    assert error == (
        "--rollout-num-gpus 2: --colocate shares the 1 training GPUs with the engines, and engines on further GPUs are "
        "not part of this version; append --no-rollout-num-gpus, which takes it back, or --no-colocate"
    )


def test_missing_basics(run: Run) -> None:
    run.base = [word for word in run.base if word not in ("--num-rollout", "3", "--rollout-num-gpus", "2")]
    run.base = [*run.base[: run.base.index("--n-samples-per-prompt")], "--n-samples-per-prompt", "4", "--no-bf16"]
    run.base[run.base.index("--prompt-data") : run.base.index("--prompt-data") + 2] = []
    errors = run.errors("--no-colocate")
    assert [error.split(":")[0] for error in errors] == ["--rollout-num-gpus", "--num-rollout", "--prompt-data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--use-kl-loss --kl-loss-coef 0.00", "reference KL is off"),
        ("--kl-loss-coef 0.1", "--kl-loss-coef 0.1: no effect: the loss has a KL term only with --use-kl-loss"),
        ("--use-dynamic-batch-size --max-tokens-per-gpu 64 --micro-batch-size 1", "--micro-batch-size 1: no effect"),
        ("--max-tokens-per-gpu 64", "--max-tokens-per-gpu 64: no effect"),
        ("--sequence-parallel", "--sequence-parallel: no effect"),
        ("--over-sampling-batch-size 4", "--over-sampling-batch-size 4: no effect: it equals"),
        ("--rollout-num-gpus-per-engine 2", "--rollout-num-gpus-per-engine 2: no effect: this machine has no CUDA"),
        ("--sglang-mem-fraction-static 0.5", "--sglang-mem-fraction-static: no effect: this run uses embedded"),
        ("--moe-router-topk 4", "--moe-router-topk: no effect: the model has no experts"),
        ("--eval-temperature 0", "--eval-temperature 0: no effect: nothing is evaluated"),
        ("--attention-backend flash", "--attention-backend flash: no effect: this machine has no CUDA"),
        ("--no-attention-softmax-in-fp32", "--no-attention-softmax-in-fp32: no effect: softmax is always in fp32"),
        ("--rollout-temperature 0", "--rollout-temperature 0: greedy"),
        ("--actor-num-gpus-per-node 16", "--global-batch-size 8: a step of 8 samples leaves some of 16"),
        ("--gamma 0.9", "--gamma 0.9: no effect"),
        ("--tis-clip 3", "--tis-clip 3: no effect: every token is from the current policy"),
        ("--offpolicy-correction mis", "--offpolicy-correction mis: no effect: every token is from the current policy"),
        (
            "--offpolicy-correction none --tis-clip-low 0.5",
            "--tis-clip-low 0.5: no effect: --offpolicy-correction none weights no token",
        ),
        ("--num-gpus-per-node 8", "--num-gpus-per-node 8: no effect"),
        (
            "--rollout-max-response-len 128",
            "--rollout-max-response-len 128: the model's context is 128: a response gets",
        ),
        (
            "--rollout-max-context-len 40 --rollout-max-response-len 41",
            "--rollout-max-response-len 41: --rollout-max-context-len is 40: a response gets",
        ),
        (
            "--eval-prompt-data TRAIN --eval-max-response-len 200",
            "--eval-max-response-len 200: the model's context is 128",
        ),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction: no effect: it belongs to Megatron's own"),
        ("--cp-comm-type a2a", "--cp-comm-type: no effect: context parallelism always gathers keys and values"),
        (
            "--save /tmp/s --save-interval 2 --save-hf /tmp/hf",
            "--save-hf /tmp/hf: has no {rollout_id}: each export replaces the previous",
        ),
    ],
)
def test_one_warning(run: Run, words: str, message: str) -> None:
    [warning] = run.warnings(*words.replace("TRAIN", str(run.data)).split())
    assert message in warning


@pytest.mark.parametrize(
    "words",
    [
        "--no-use-rotary-position-embeddings",
        "--overlap-param-gather",
        "--fp8-format hybrid",
    ],
)
def test_unsupported_features_plan_but_do_not_run(run: Run, words: str) -> None:
    assert "not part of this version" in run.error(*words.split())
    assert run.errors("--dry-run", *words.split()) == []


@pytest.mark.parametrize(
    "words",
    [
        "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --context-parallel-size 1",
        "--context-parallel-size 2 --actor-num-gpus-per-node 2",
        "--pipeline-model-parallel-size 1 --no-use-distributed-optimizer --no-colocate --no-partial-rollout",
        "--rollout-top-p 1.0 --rollout-top-k -1 --kl-coef 0 --no-use-tis --no-use-wandb --no-fp16",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--eval-top-p 0.7 --eval-top-k 20 --eval-prompt-data TRAIN",
        "--save-debug-rollout-data /tmp/{rollout_id:05d}.jsonl --load-debug-rollout-data /tmp/same.jsonl",
        "--save-debug-rollout-data /tmp/x.jsonl --num-rollout 1",
        "--num-rollout 0 --eval-prompt-data TRAIN",
    ],
)
def test_off_and_free_values_pass(run: Run, words: str) -> None:
    assert run.errors(*words.replace("TRAIN", str(run.data)).split()) == []


def test_offload_saves_nothing_where_there_is_no_device(run: Run) -> None:
    assert run.errors("--optimizer-cpu-offload") == []
    assert run.warnings("--optimizer-cpu-offload", "--dry-run") == []
    if not cuda_available():
        [warning] = run.warnings("--optimizer-cpu-offload")
        assert warning.startswith("--optimizer-cpu-offload: no effect: this machine has no CUDA")


def test_data_files_of_other_kinds(run: Run) -> None:
    file = run.directory / "train.parquet"
    file.touch()
    assert f"{file}: cannot be read (Parquet file size is 0 bytes)" in run.error("--prompt-data", str(file))
    assert "cannot be read" in run.error("--prompt-data", str(file), "--dry-run")
    file = run.directory / "train.csv"
    file.touch()
    assert "not a known type of data file; name one in .jsonl, .json" in run.error("--prompt-data", str(file))
    error = run.error("--eval-interval", "1", "--eval-prompt-data", f"{file}@[:1]", "--dry-run")
    assert ".csv is not a known type of data file" in error


def test_other_ways_to_run(run: Run) -> None:
    sft = "--loss-type sft_loss --rollout-function-path slime.rollout.sft_rollout.generate_rollout --rollout-num-gpus 0"
    assert run.errors(*sft.split(), "--n-samples-per-prompt", "1") == []
    evaluated = [*sft.split(), "--n-samples-per-prompt", "1", "--eval-prompt-data", str(run.data)]
    assert run.errors(*evaluated) == [], "the trainers compute its loss"
    [warning] = [each for each in run.warnings(*evaluated, "--eval-temperature", "0") if "--eval-temp" in each]
    assert "no effect: SFT without engines evaluates by the loss" in warning
    (run.directory / "0.json").touch()
    replay = ["--debug-train-only", "--load-debug-rollout-data", str(run.directory / "{rollout_id}.json")]
    assert run.args(*replay).num_engines == 0
    assert run.errors("--debug-rollout-only", "--rollout-top-p", "0.9", "--ref-load", "/nowhere") == []


def test_checkpoint_instead_of_ref_load(run: Run) -> None:
    load = run.directory / "load"
    load.mkdir()
    assert run.errors("--load", str(load)) == []  # starts from --ref-load
    run.base[run.base.index("--ref-load") + 1] = "/nowhere"
    assert "--ref-load /nowhere: there is no such directory" in run.error("--load", str(load))
    (load / "latest_checkpointed_iteration.txt").write_text("3")
    assert "--ref-load /nowhere" in run.error("--load", str(load))
    itself = load / "iter_0000003"
    itself.mkdir()
    assert run.errors("--load", str(load)) == []
    assert "--ref-load /nowhere" in run.error("--load", str(itself))
    (itself / ".metadata").write_bytes(b"")
    assert run.errors("--load", str(itself)) == []
    (load / "latest_checkpointed_iteration.txt").unlink()  # killed before it was written
    assert run.errors("--load", str(load)) == []
    assert "--ref-load /nowhere" in run.error("--load", str(load), "--use-kl-loss", "--kl-loss-coef", "0.1")


def test_resolved_values(run: Run) -> None:
    args = run.args("--num-steps-per-rollout", "2", "--rollout-temperature", "0.8", "--eval-top-p", "0.7")
    assert (args.global_batch_size, args.over_sampling_batch_size, args.eps_clip_high) == (4, 4, 0.2)
    assert (args.eval_temperature, args.eval_top_p, args.eval_label_key) == (0.8, 0.7, "label")
    assert (args.n_samples_per_eval_prompt, args.update_weight_transport, args.num_engines) == (1, "broadcast", 2)
    assert run.args("--global-batch-size", "2").num_steps_per_rollout == 4


def test_hooks(run: Run) -> None:
    filters = "slime.rollout.filter_hub.dynamic_sampling_filters"
    assert run.errors("--dynamic-sampling-filter-path", f"{filters}.check_reward_nonzero_std") == []
    assert "has no 'check_reward'" in run.error("--dynamic-sampling-filter-path", f"{filters}.check_reward")
    assert "cannot be called as (args, samples)" in run.error("--dynamic-sampling-filter-path", "json.dumps")
    assert "importing nowhere failed" in run.error("--custom-generate-function-path", "nowhere.generate")
    dry = ["--custom-generate-function-path", "nowhere.generate", "--dry-run"]
    assert ["importing nowhere failed" in warning for warning in run.warnings(*dry)] == [True]
    alone = ["--n-samples-per-prompt", "1", "--dynamic-sampling-filter-path", f"{filters}.check_reward_nonzero_std"]
    assert len(run.errors(*alone)) == 2


def test_a_bad_line_of_the_data(run: Run) -> None:
    run.data.write_text(run.data.read_text() + "{not json}\n")
    assert run.error().startswith(f"{run.data}:2: not JSON (")
    assert run.errors("--prompt-data", f"{run.data}@[0:1]") == []
    assert run.error("--dry-run").startswith(f"{run.data}:2: not JSON (")


def test_a_plan_checks_only_the_first_rows(run: Run) -> None:
    line = run.data.read_text()
    run.data.write_text(line * PLANNED_ROWS + "{not json}\n" + line)
    assert run.errors("--dry-run", "--tool-key", "tools") == []  # a later row may have tools
    assert run.error().startswith(f"{run.data}:{PLANNED_ROWS + 1}: not JSON (")


def test_eval_data_is_checked_too(run: Run) -> None:
    bad = run.directory / "eval.jsonl"
    bad.write_text(json.dumps({"prompt": 7, "label": "2"}) + "\n")
    words = ["--eval-interval", "1", "--eval-prompt-data", "held-out", str(bad)]
    assert run.error(*words).startswith(f"{bad}:1: 'prompt' is not a list of OpenAI messages")


def test_an_evaluation_function_that_is_never_called(run: Run) -> None:
    (run.directory / "own_eval.py").write_text("def evaluate(args, rollout_id, context): return {}\n")
    words = ["--eval-function-path", "own_eval.evaluate", "--dry-run"]
    assert any("no effect: it is never called" in warning for warning in run.warnings(*words))
    words += ["--eval-prompt-data", str(run.data)]
    assert not any("never called" in warning for warning in run.warnings(*words))


def test_a_custom_reward_judges_evaluation_too(run: Run) -> None:
    at = run.base.index("--rm-type")
    run.base[at : at + 2] = ["--custom-rm-path", "own.reward", "--dry-run"]
    words = ["--eval-prompt-data", str(run.data)]
    assert run.errors(*words) == []
    error = run.error(*words, "--eval-rm-type", "deepscaler")
    assert error.startswith("--eval-rm-type deepscaler: --custom-rm-path own.reward also judges evaluation")
    file = run.directory / "eval.yaml"
    entry = f"name: a, path: {run.data}"
    file.write_text(f"datasets: [{{{entry}}}]")
    assert run.errors("--eval-config", str(file)) == []
    file.write_text(f"datasets: [{{{entry}, rm_type: deepscaler}}]")
    error = run.error("--eval-config", str(file))
    assert "rm_type of a is not used: --custom-rm-path own.reward judges" in error


def test_one_export_replaces_none(run: Run) -> None:
    words = ["--save", "/tmp/s", "--save-hf", "/tmp/hf"]
    assert run.warnings(*words) == []
    assert run.warnings(*words, "--save-interval", "3") == []
    assert run.warnings("--save", "/tmp/s", "--save-hf", "/tmp/{rollout_id}", "--save-interval", "1") == []


def test_generation_alone_loads_and_saves_no_checkpoint(run: Run) -> None:
    words = "--load /l --save-interval 1 --save-hf /tmp/hf --keep-last-checkpoints 1"
    warnings = run.warnings("--debug-rollout-only", *words.split())
    flags = ["--load", "--ref-load", "--save-interval", "--save-hf", "--keep-last-checkpoints"]
    assert [warning.split(" ")[0] for warning in warnings] == flags
    assert all("no effect: --debug-rollout-only" in warning for warning in warnings)
    assert warnings[0].endswith("convert it and name it as --hf-checkpoint")
    args, problems = run.load("--debug-rollout-only", "--save", "/tmp/s")
    rows = [line.split()[0] for line in format_plan(args, problems).split("Warnings")[0].splitlines() if line]
    assert not {"load", "ref", "save"} & set(rows)
    args, problems = run.load()
    rows = [line.split()[0] for line in format_plan(args, problems).splitlines() if line]
    assert {"load", "ref", "save"} <= set(rows)


def test_precision_of_engines_and_alarm(run: Run) -> None:
    args, problems = run.load()
    assert args.logprob_gap_alarm == 1e-3
    assert "engines        float32; alarm when" in format_plan(args, problems)
    args, problems = run.load("--bf16")
    assert args.logprob_gap_alarm == 0.1
    assert "engines        bfloat16; alarm when" in format_plan(args, problems)
    assert run.args("--logprob-gap-alarm", "0.5").logprob_gap_alarm == 0.5
    assert run.args("--logprob-gap-alarm", "0.5", "--bf16").logprob_gap_alarm == 0.5


def test_a_training_dump_needs_its_own_directory(run: Run) -> None:
    flag, new, filled = "--save-debug-train-data", run.directory / "new" / "steps", run.directory / "filled"
    assert run.errors(flag, str(new)) == []
    assert not new.parent.exists(), "a plan writes nothing"
    filled.mkdir()
    assert run.errors(flag, str(filled)) == []
    (filled / "index.json").touch()
    error = "already contains files, and a dump belongs to one run; name a new directory, or empty this one"
    assert run.error(flag, str(filled)) == f"{flag} {filled}: {error}"
    assert run.error(flag, str(run.data)) == f"{flag} {run.data}: is a file, not a directory; name a directory"
    error = f"{run.data} is not a directory; name a directory that can be written"
    assert run.error(flag, str(run.data / "steps")) == f"{flag} {run.data / 'steps'}: {error}"
    assert run.errors("--dry-run", flag, str(run.data / "steps")) == []
    if os.geteuid():  # root may write everywhere
        filled.chmod(0o500)
        assert f"{filled} is not writable" in run.error(flag, str(filled / "steps"))
    warnings = run.warnings("--debug-rollout-only", flag, str(filled))
    assert [warning for warning in warnings if flag in warning] == [
        f"{flag} {filled}: no effect: --debug-rollout-only trains nothing and saves no checkpoint; leave it out"
    ]


def test_an_unwritable_place_gives_one_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error before anything starts; a plan only warns, because it may be made on another machine."""
    long = str(run.directory / ("x" * 300))
    deep = str(run.directory) + "/x" * 3000
    for path, message in (
        (long, "a name of 300 bytes in it is too long|File name too long"),
        (deep, "File name too long"),
        (str(run.data / "below"), "Not a directory|is a file"),
    ):
        for flag in ("--save", "--log-dir", "--save-hf"):
            assert re.search(message, run.error(flag, path)), (flag, path)
        assert run.errors("--dry-run", "--save", path) == []
    new = str(run.directory / "new" / "save")
    assert run.errors("--save", new) == []
    here = os.statvfs(run.directory)
    for change, message in (({8: os.ST_RDONLY}, "is read-only"), ({4: 0}, "is full")):
        values = [change.get(number, value) for number, value in enumerate(here)]
        with monkeypatch.context() as patched:
            patched.setattr(os, "statvfs", lambda _, values=values: os.statvfs_result(values))
            assert f"the file system of {run.directory} {message}" in run.error("--save", new)
    assert not (run.directory / "new").exists()
