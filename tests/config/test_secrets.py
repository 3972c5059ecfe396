"""Secrets in flags: declared once, then hidden in errors, warnings, the plan, args.yaml and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_run import ROOT, Run

from slime.config.flags.table import SET_BY_SLIME, FlagSpec, all_flags, secret_part
from slime.config.parse import dump_args
from slime.config.secrets import masked_words, masker_of
from slime.plan.summary import format_plan

NAMES_OF_COLUMNS = {
    "input_key",
    "label_key",
    "metadata_key",
    "tool_key",
    "reward_key",
    "eval_input_key",
    "eval_label_key",
}
SECRETS = [spec for spec in all_flags() if spec.secret is not None and (spec.source, spec.name) not in SET_BY_SLIME]
SPECIAL = {
    "control_plane_api_keys": "id:Name:admin:PLANTED",
    "rollout_external_engines": "http://PLANTEDuser:PLANTED@127.0.0.1:4000",
}
"""Values for the other secret flags: PLANTED, or a URL that contains it."""


def planted(spec: FlagSpec) -> str:
    url = "http://PLANTEDuser:PLANTED@host/path?token=PLANTED"
    return SPECIAL.get(spec.name, url if spec.secret == "url" else "PLANTED")


def test_flags_with_secrets_are_declared() -> None:
    """Secret flags are found by name, so that a flag of a newer SGLang or router is noticed."""
    own = {
        spec.name for spec in all_flags() if spec.source == "slime" and spec.kind == "str" and secret_part(spec.name)
    }
    assert {name for name in own if name not in NAMES_OF_COLUMNS} == {"rm_url"}
    declared = {(spec.source, spec.name, spec.secret) for spec in all_flags() if spec.secret}
    assert declared >= {
        ("slime", "rm_url", "url"),
        ("slime", "rollout_external_engines", "url"),
        ("sglang", "api_key", "all"),
        ("sglang", "ssl_keyfile_password", "all"),
        ("router", "api_key", "all"),
        ("router", "control_plane_api_keys", "all"),
        ("router", "oracle_password", "all"),
        ("router", "oracle_connect_descriptor", "all"),
        ("router", "postgres_db_url", "url"),
        ("router", "redis_url", "url"),
    }


def test_planted_secrets_are_shown_nowhere(run: Run) -> None:
    for spec in SECRETS:
        for words in ([spec.flag, planted(spec)], [f"{spec.flag}={planted(spec)}"], [f"{spec.flag}=", "PLANTED"]):
            try:
                args, problems = run.load(*words)
                shown = format_plan(args, problems) + dump_args(args)
            except ValueError as error:
                shown = str(error)
            assert "PLANTED" not in shown, (words, shown)
            assert "PLANTED" not in " ".join(masked_words(words[:1] if words[0].endswith("=") else words))
    taken = run.args("--rm-url", planted(SECRETS[0]), "--sglang-api-key", "PLANTED")
    assert taken.rm_url == planted(SECRETS[0]), "control: what needs it gets it"
    assert "PLANTED" not in masker_of(taken)(f"{taken!r} and PLANTED")


def test_errors_do_not_contain_the_secret(run: Run) -> None:
    for words in (["--rm-url", "PLANTED@host"], ["--sglang-api-key", "PLAN", "TED"], ["--sglang-api-key", "PLAN TED"]):
        errors = run.errors("--rm-type", "remote_rm", *words)
        assert errors
        assert "PLAN" not in " ".join(errors)
    file = run.directory / "broken.yaml"
    file.write_text("lr: 1\nsglang-api-key: 'PLANTED\n")
    error = run.error("--config", str(file))
    assert error.startswith(f"--config {file}: cannot be read (")
    assert "line " in error
    assert "PLANTED" not in error


def test_args_yaml_names_the_secrets_it_omits(run: Run) -> None:
    url = "http://me:PLANTED@host/judge?token=PLANTED"
    args = run.args(
        "--rm-type", "remote_rm", "--rm-url", url, "--sglang-api-key", "PLANTED", "--router-policy", "random"
    )
    text = dump_args(args)
    assert "# rm_url is not written here, because it holds a secret: http://***@host/judge?token=***\n" in text
    assert "# sglang_api_key is not written here, because it holds a secret: ***\n" in text
    assert "router_policy: random" in text
    file = run.directory / "args.yaml"
    file.write_text(text)
    again = Run(run.directory, base=["--config", str(file)])
    assert again.error().startswith("--rm-url: not given;"), "nobody goes on with a URL of asterisks"
    assert again.args("--rm-url", url).rm_url == url
    assert "\nrm_url: http://host/judge\n" in dump_args(run.args("--rm-url", "http://host/judge"))


def test_a_secret_can_be_taken_from_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "PLANTED")
    assert run.args("--sglang-api-key", "env:MY_KEY").sglang["api_key"] == "PLANTED"
    file = run.directory / "more.yaml"
    file.write_text("router-control-plane-api-keys: ['env:MY_KEYS']\n")
    monkeypatch.setenv("MY_KEYS", "a:b:admin:c")
    assert list(run.args("--config", str(file)).router["control_plane_api_keys"]) == ["a:b:admin:c"]
    monkeypatch.delenv("MY_KEY")
    error = run.error("--sglang-api-key", "env:MY_KEY")
    assert "the name of an environment variable after env:, but MY_KEY is not set" in error
    assert run.args("--rollout-stop", "env:MY_KEY").rollout_stop == ("env:MY_KEY",), "secrets alone"


def test_secrets_vanish_from_the_command_line(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom slime.config.secrets import hide_command_line\n"
        "hide_command_line(sys.argv[1:])\n"
        "print([*Path('/proc/self/cmdline').read_text().split(chr(0))[3:-1], sys.argv[1:], sys.orig_argv[3:]])\n"
    )
    words = ["--rm-url", "http://me:PLANTED@host/a?t=PLANTED", "--sglang-api-key=PLANTED", "--lr", "1"]
    words += ["--router-control-plane-api-keys", "a:b:c:PLANTED", "d:e:f:PLANTED", "--prompt-data", "PLANTED-file"]
    output = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    *shown, argv, orig_argv = eval(output)
    assert shown == argv == orig_argv == masked_words(words)
    assert "PLANTED" not in " ".join(shown).replace("PLANTED-file", ""), "a path is no secret"
    assert shown[1].startswith("http://***@host/a?t=***")
    assert [len(word) for word in shown] == [len(word) for word in words]
