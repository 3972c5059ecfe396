"""SGLang's command line and environment, the check of what is installed, and the phases of its start."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.core.architecture import Architecture
from slime.engine.kinds.kind import EngineStart
from slime.engine.kinds.sglang import (
    CLASSES,
    PHASES,
    check_installed,
    command,
    engine_port,
    installed_spellings,
    installed_version,
    warm_up,
    words,
)
from slime.engine.launch import launch_engine
from slime.engine.server_process import is_healthy, phase_of

SERVER_ARGS = """
class ServerArgs:
    model_path: A[str, Arg(help="Model.", aliases=["--model"])]
    tp_size: A[int, Arg(help="Ranks.", aliases=["--tensor-parallel-size"])] = 1
    attention_backend: A[Optional[str], "Kernels."] = None
    context_length: A[Optional[int], "Longest."] = None
    chunked_prefill_size: A[Optional[int], Arg(help="Chunk.", cli_name="--chunked-prefill")] = None
    hidden: A[int, Arg(no_cli=True)] = 0
    unrelated: int = 3

    def add_cli_args(parser):
        parser.add_argument("--disable-cuda-graph", action="store_true", help="old --words")
"""


SERVER = """
import http.server, json, os, sys, threading, time
print("server_args=", sys.argv[1:], flush=True)
print("devices", os.environ["CUDA_VISIBLE_DEVICES"], "Load weight begin.", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = body["return_logprob"] and self.headers["Authorization"] == "Bearer secret"
        self.answer(200 if good else 500, {"message": "no kernel for this"})

time.sleep(0.5)
print("The server is fired up and ready to roll!", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory with those parts of an SGLang 0.5.16 that are read."""
    srt = tmp_path / "site" / "sglang" / "srt"
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (srt.parent / "__init__.py").write_text("raise RuntimeError('SGLang was imported')")
    (srt / "server_args.py").write_text(SERVER_ARGS)
    (srt.parent / "launch_server.py").write_text(SERVER)
    (srt / "arg_groups" / "fields" / "memory.py").write_text(
        'class M:\n    mem_fraction_static: A[float, "Share."] = 0'
    )
    set_version(tmp_path / "site", "0.5.16")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def set_version(site: Path, version: str) -> None:
    info = site / "sglang-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")


def some_args(**changes: object) -> Args:
    return Args(**{"num_rollout": 1, "rollout_engine": "sglang", "hf_checkpoint": "/model", "bf16": True, **changes})  # pyright: ignore[reportArgumentType]


def line_of(args: Args, index: int = 0, gpu_ids: tuple[str, ...] = ("3",)) -> tuple[str, dict[str, str]]:
    start = EngineStart(
        model_path=str(args.hf_checkpoint),
        index=index,
        host="127.0.0.1",
        port=1,
        gpu_ids=gpu_ids,
        directory=Path("/tmp/x"),
    )
    server = command(args, start)
    return " ".join(server.words) + " ", dict(server.environment)


def test_settings_that_decide_tokens_are_explicit() -> None:
    line, environment = line_of(some_args(rollout_seed=7, rollout_num_gpus_per_engine=2), index=1, gpu_ids=("2", "3"))
    for part in ("--model-path /model", "--tp-size 2", "--dtype bfloat16", "--random-seed 8", "--host 127.0.0.1"):
        assert f"{part} " in line
    assert "--skip-server-warmup" in line
    for part in ("--enable-memory-saver", "--trust-remote-code", "--attention-backend", "--api-key"):
        assert part not in line
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"
    assert environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "file:///tmp/x/ranks"


def test_the_trainer_decides_the_default_precision() -> None:
    assert "--dtype bfloat16 " in line_of(some_args())[0]
    assert "--dtype half " in line_of(some_args(bf16=False, sglang={"dtype": "half"}))[0]


def test_routed_experts_are_requested() -> None:
    flag = "--enable-return-routed-experts "
    assert flag in line_of(some_args(use_routing_replay=True))[0]
    assert flag in line_of(some_args(sglang={"enable_return_routed_experts": True}))[0]
    assert flag not in line_of(some_args())[0]


def test_the_deterministic_mode_is_requested() -> None:
    flag = "--enable-deterministic-inference "
    assert flag in line_of(some_args(deterministic=True))[0]
    assert flag in line_of(some_args(sglang={"enable_deterministic_inference": True}))[0]
    assert flag not in line_of(some_args())[0]


def test_the_memory_saver_needs_colocation() -> None:
    assert "--enable-memory-saver " in line_of(some_args(colocate=True, offload=True))[0]
    assert "--enable-memory-saver" not in line_of(some_args(colocate=True, offload=False))[0]
    assert "--enable-memory-saver" not in line_of(some_args(offload=True))[0]


def test_flags_of_the_user_keep_sglangs_spelling() -> None:
    given = {
        "mem_fraction_static": 0.7,
        "disable_cuda_graph": True,
        "log_requests": False,  # from YAML; its flag can only switch on
        "dllm_fdfo": False,
        "cuda_graph_bs_decode": [1, 2],
        "api_key": "secret",
    }
    line, _ = line_of(some_args(sglang=given, hf_trust_remote_code=True))
    for part in ("--mem-fraction-static 0.7", "--disable-cuda-graph", "--no-dllm-fdfo", "--cuda-graph-bs-decode 1 2"):
        assert f"{part} " in line
    assert "--trust-remote-code " in line
    assert "log-requests" not in line
    assert "secret" not in line, "other users read command lines"


def test_ranks_of_several_replicas_meet_apart() -> None:
    assert "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE" not in line_of(some_args(sglang={"dp_size": 2}))[1]


def test_an_overridden_config_reaches_sglang(tmp_path: Path) -> None:
    from tests.config.config_run import GLM4_TINY

    (tmp_path / "config.json").write_text(json.dumps(GLM4_TINY))
    arch = Architecture(**{**vars_of(tmp_path), "rotary_base": 50000.0})
    args = some_args(hf_checkpoint=str(tmp_path), architecture=arch, override_hf_config=("rotary-base",))
    line, _ = line_of(args)
    rope = {"rope_theta": 50000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    assert f"--json-model-override-args {json.dumps({'rope_parameters': rope})} " in line
    assert "--json-model-override-args" not in line_of(some_args(hf_checkpoint=str(tmp_path)))[0]


def vars_of(directory: Path) -> dict[str, object]:
    from slime.config.architecture import hf_architecture, read_hf_config

    return dict(vars(hf_architecture(read_hf_config(directory))))


def test_engines_never_pick_the_same_port() -> None:
    picked = [engine_port("127.0.0.1", index) % CLASSES for index in range(CLASSES)]
    assert picked == list(range(CLASSES))


def test_installed_spellings_are_found(installed: Path) -> None:
    assert installed_spellings(str(installed / "sglang" / "srt")) == {
        *("--model-path", "--model", "--tp-size", "--tensor-parallel-size", "--attention-backend", "--context-length"),
        *("--chunked-prefill", "--disable-cuda-graph", "--mem-fraction-static"),
    }


def test_flags_of_the_installed_version_pass(installed: Path) -> None:
    given = {"attention_backend": "triton", "disable_cuda_graph": True, "mem_fraction_static": 0.5}
    assert check_installed(some_args(sglang=given)) == "0.5.16"


def test_all_missing_flags_are_named_at_once(installed: Path) -> None:
    given = {"context_length": 4, "dcp_comm_backend": "x", "decode_attention_backend": "fa3"}
    with pytest.raises(ValueError) as caught:
        check_installed(some_args(sglang=given))
    first, second = str(caught.value).splitlines()
    assert first.startswith("--sglang-dcp-comm-backend: SGLang 0.5.16, which is installed, has no such flag")
    assert "the nearest is --sglang-attention-backend" in second


def test_a_flag_uses_the_installed_versions_name(installed: Path) -> None:
    given = {"enable_linear_replayssm_spec": True, "cuda_graph_bs_decode": [1, 2], "mem_fraction_static": 0.5}
    assert words(given)[:2] == ["--enable-linear-replayssm-spec", "--cuda-graph-bs-decode"], "it has neither"
    source = installed / "sglang" / "srt" / "arg_groups" / "fields" / "memory.py"
    source.write_text(f'{source.read_text()}\n    enable_gdn_replayssm_spec: A[bool, "Old."] = False')
    installed_spellings.cache_clear()
    assert words(given) == [
        *("--enable-gdn-replayssm-spec", "--cuda-graph-bs-decode", "1", "2", "--mem-fraction-static", "0.5"),
    ]
    assert check_installed(some_args(sglang={"enable_linear_replayssm_spec": True})) == "0.5.16"
    source.write_text(f'{source.read_text()}\n    enable_linear_replayssm_spec: A[bool, "New."] = False')
    installed_spellings.cache_clear()
    assert words(given)[0] == "--enable-linear-replayssm-spec"


@pytest.mark.parametrize("version", ["0.5.15", "0.5.24", "0.6.0"])
def test_another_version_is_refused(installed: Path, version: str) -> None:
    set_version(installed, version)
    with pytest.raises(ValueError, match=rf"SGLang {version} is installed; versions 0\.5\.16 to 0\.5\.23"):
        check_installed(some_args())


@pytest.mark.parametrize("version", ["0.5.16.post1", "0.5.23"])
def test_known_versions_pass(installed: Path, version: str) -> None:
    set_version(installed, version)
    assert check_installed(some_args()) == version


@pytest.mark.skipif(installed_version() is not None, reason="SGLang is installed")
def test_a_missing_sglang_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"SGLang is not installed here: pip install 'slime\[gpu\]'"):
        check_installed(some_args())


def test_it_is_started_watched_and_warmed_up(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / "sglang" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    args = some_args(sglang={"api_key": "secret"})
    port = engine_port("127.0.0.1", 0)
    engine = launch_engine(args, index=0, host="127.0.0.1", port=port, log_path=tmp_path / "log", gpu_ids=("5",))
    seen: set[str] = set()
    while not is_healthy(engine.url):
        assert engine.alive()
        seen.add(engine.phase())
        time.sleep(0.02)
    assert "loading weights" in seen
    engine.wait_ready(10)
    assert engine.phase() == "ready"
    warm_up(args, engine, 10)
    with pytest.raises(RuntimeError, match=r"(?s)engine 0 failed at its first request \(500.*no kernel.*devices 5"):
        warm_up(some_args(), engine, 10)
    engine.stop()
    assert not engine.alive()
    log = (tmp_path / "log").read_text()
    assert "secret" not in log
    assert "--api-key=***" in log, "control: it writes all its settings down"


LOG = """
[2026-01-01 10:00:00] server_args=ServerArgs(model_path='/model', log_level='info')
[2026-01-01 10:00:09] Init torch distributed begin.
[2026-01-01 10:00:10] Init torch distributed ends. elapsed=0.35 s, mem usage=0.09 GB
[2026-01-01 10:00:11] Load weight begin. avail mem=138.61 GB
Multi-thread loading shards: 100% Completed | 1/1
[2026-01-01 10:00:12] Load weight end. elapsed=0.55 s, type=Glm4ForCausalLM, avail mem=138.52 GB
[2026-01-01 10:00:12] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 100, K size: 1 GB, V size: 1 GB
[2026-01-01 10:00:13] Capture decode CUDA graph begin. This can take up to several minutes.
[2026-01-01 10:00:20] Capture decode CUDA graph end. Time elapsed: 7.00 s. mem usage=0.30 GB
[2026-01-01 10:00:22] The server is fired up and ready to roll!
"""


def test_phases_follow_the_log() -> None:
    lines = LOG.splitlines()
    newer = [line.replace("Init torch distributed", "Init parallel") for line in lines]  # from 0.5.21 on
    for log in (lines, newer):
        seen = [phase_of("\n".join(log[:count]), PHASES) for count in range(1, len(log) + 1)]
        assert list(dict.fromkeys(seen)) == ["starting", *dict.fromkeys(phase for _, phase in PHASES)]
    assert phase_of(LOG, ()) == "starting", "an embedded engine logs no phase"


def test_a_second_graph_is_being_captured() -> None:
    again = LOG.replace("The server is fired up and ready to roll!", "Capture prefill CUDA graph begin.")
    assert phase_of(again, PHASES) == "capturing CUDA graphs"


def test_an_unknown_field_has_no_flag() -> None:
    with pytest.raises(KeyError):
        words({"no_such_field": 1})
