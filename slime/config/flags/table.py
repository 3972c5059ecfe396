"""The table of all flags: slime's own (from the dataclasses), Megatron's, SGLang's and the router's.

- Used by: `parse`, which looks up spellings, and `help`, which prints the table.
- Invariant: a spelling belongs to exactly one flag.

The flags of Megatron, SGLang and the router are checked-in data (`*_flags.json`, written by
tools/generate_flag_tables.py), so these packages do not have to be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from slime.config.args import SECTIONS
from slime.config.flags.flag import JsonObject, Secret

Source = Literal["slime", "megatron", "sglang", "router"]
Kind = Literal["bool", "int", "float", "str", "layers", "json"]
"""The type of a flag's value. 'layers' is Megatron's per-layer pattern: a number, a list, or an expression such as
[0]*1+[1]*45. 'json' is the text of a JSON object."""

BOUNDS = MappingProxyType({"ge": ">=", "gt": ">", "le": "<=", "lt": "<"})


@dataclass(frozen=True, kw_only=True)
class FlagSpec:
    """One flag. `on` and `off` are its spellings; only booleans have `off`."""

    name: str
    """The name of the field that it fills, in `Args` or in the mapping of its source."""
    source: Source
    section: str
    kind: Kind
    on: tuple[str, ...]
    off: tuple[str, ...] = ()
    help: str = ""
    default: Any = None
    optional: bool = False
    """Whether None is also a value ("not given"; `null` in YAML)."""
    choices: tuple[str, ...] = ()
    num_values: tuple[int, int | None] | None = None
    """The smallest and the largest number of values, for flags with several (None: no limit)."""
    one_is_scalar: bool = False
    """Whether a single value of a flag with several is passed on bare, not as a list."""
    suffixes: bool = False
    """Whether integers may be written as 64k or 64Ki, which SGLang accepts for some flags."""
    bounds: Mapping[str, float] = field(default_factory=dict[str, float])
    metavar: str | None = None
    secret: Secret | None = None

    @property
    def flag(self) -> str:
        """Return the first spelling, which messages show."""
        return self.on[0]

    @property
    def limits(self) -> list[str]:
        """Its bounds as text: [">= 1", "<= 65536"]."""
        given = [(sign, self.bounds[key]) for key, sign in BOUNDS.items() if key in self.bounds]
        return [f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}" for sign, bound in given]


def _field_kind(hint: Any) -> tuple[Kind, dict[str, Any]]:
    """Return the kind and the other properties of a field with the type hint `hint`."""
    properties: dict[str, Any] = {}
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        properties["optional"] = NoneType in get_args(hint)
        properties["one_is_scalar"] = len(members) == 2
        assert len(members) == 1 or (members[0], get_args(members[1])) == (str, (str, ...)), hint
        hint = members[-1]
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
        properties["num_values"] = (1, None)
    if get_origin(hint) is Literal:
        properties["choices"] = get_args(hint)
        hint = str
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str", JsonObject: "json"}
    return kinds[hint], properties


def _section_specs(section: type[Any]) -> Iterable[FlagSpec]:
    hints = get_type_hints(section)
    title = f"{section.__name__.removesuffix('Options')}: {(section.__doc__ or '').strip().splitlines()[0]}"
    for item in fields(section):
        kind, properties = _field_kind(hints[item.name])
        metadata: Mapping[str, Any] = item.metadata
        if metadata["choices"]:
            properties["choices"] = metadata["choices"]
        if metadata["nargs"] is not None:
            properties["num_values"] = (metadata["nargs"], metadata["nargs"])
        dashed = item.name.replace("_", "-")
        off = dashed.removeprefix("no-") if dashed.startswith("no-") else f"no-{dashed}"
        yield FlagSpec(
            name=item.name,
            source="slime",
            section=title,
            kind=kind,
            on=(f"--{dashed}",),
            off=(f"--{off}",) if kind == "bool" else (),
            help=metadata["help"],
            default=None if item.default is MISSING else item.default,
            bounds={key: metadata[key] for key in BOUNDS if metadata[key] is not None},
            metavar=metadata["metavar"],
            secret=metadata["secret"],
            **properties,
        )


SET_BY_SLIME: Mapping[tuple[Source, str], str] = {
    ("sglang", "model_path"): "use --hf-checkpoint",
    ("sglang", "tokenizer_path"): "use --hf-checkpoint",
    ("sglang", "skip_tokenizer_init"): "slime sends and receives tokens; leave it out",
    ("sglang", "trust_remote_code"): "use --hf-trust-remote-code",
    ("sglang", "tp_size"): "use --rollout-num-gpus-per-engine",
    ("sglang", "host"): "leave it out",
    ("sglang", "port"): "leave it out",
    ("sglang", "nccl_port"): "leave it out",
    ("sglang", "dist_init_addr"): "leave it out",
    ("sglang", "nnodes"): "it follows from --rollout-num-gpus-per-engine",
    ("sglang", "node_rank"): "leave it out",
    ("sglang", "base_gpu_id"): "leave it out",
    ("sglang", "gpu_id_step"): "leave it out",
    ("sglang", "random_seed"): "use --rollout-seed",
    ("sglang", "skip_server_warmup"): "slime warms the server up with tokens; leave it out",
    ("sglang", "admin_api_key"): "one key is used for all requests: use --sglang-api-key",
    ("sglang", "enable_memory_saver"): "use --colocate and --offload",
    ("sglang", "config"): "slime would not see the flags in it: give each as --sglang-*",
    ("sglang", "weight_version"): "slime sets it to the policy version; leave it out",
    ("router", "worker_urls"): "use --rollout-external-engines",
    ("router", "prometheus_host"): "slime sets it to the router's own address; leave it out",
    ("router", "prometheus_port"): "slime chooses a free port; leave it out",
}
"""Flags of the other programs that slime refuses because it sets them itself, and what to do instead."""

SECTION_TITLES: Mapping[Source, str] = MappingProxyType(
    {
        "megatron": "Megatron: passed on to megatron-core by name.",
        "sglang": "SGLang: passed on to every SGLang server.",
        "router": "Router: passed on to sglang-router.",
    }
)


def taken_back(spelling: str) -> FlagSpec | None:
    """Return the flag whose earlier value `spelling` takes back: --rollout-num-gpus for --no-rollout-num-gpus.

    All of slime's flags that may be unset have one, except switches, whose --no-x is a value, and --save: a run without
    it saves all the same, so --no-save would promise too much.
    """
    spec, _ = spellings().get("--" + spelling.removeprefix("--no-"), (None, True))
    if not spelling.startswith("--no-") or spec is None or spec.source != "slime" or spec.kind == "bool":
        return None
    return spec if spec.default in (None, ()) and spec.name != "save" else None


def _load_table(source: Source) -> Iterable[FlagSpec]:
    """Read the rows of `<source>_flags.json`; tools/generate_flag_tables.py describes their keys."""
    text = files("slime.config.flags").joinpath(f"{source}_flags.json").read_text(encoding="utf-8")
    for row in cast(list[dict[str, Any]], json.loads(text)["flags"]):
        tuples = {key: tuple(row.pop(key)) for key in ("on", "off", "choices", "num_values") if key in row}
        secret = secret_part(row["name"]) if row["kind"] == "str" else None
        yield FlagSpec(source=source, section=SECTION_TITLES[source], optional=True, secret=secret, **tuples, **row)


_ALL_SECRET = re.compile(r"(^|_)(key|api_keys?|password|passwd|secret|token|credentials?|connect_descriptor|dsn)$")
_URL = re.compile(r"(^|_)(urls?|uri|endpoints?|issuer)$")


def secret_part(name: str) -> Secret | None:
    """Return the secret part of a flag's value, judged by the flag's name.

    It is for the flags of other programs, whose tables do not mark secrets.
    """
    return "all" if _ALL_SECRET.search(name) else "url" if _URL.search(name) else None


@cache
def secret_names(source: Source) -> frozenset[str]:
    """Return the names of all secret flags of `source`."""
    return frozenset(spec.name for spec in all_flags() if spec.source == source and spec.secret is not None)


@cache
def all_flags() -> tuple[FlagSpec, ...]:
    """Return all flags, slime's own first."""
    own = [spec for section in SECTIONS for spec in _section_specs(section)]
    others = [spec for source in SECTION_TITLES for spec in _load_table(source)]
    return (*own, *others)


@cache
def spellings() -> Mapping[str, tuple[FlagSpec, bool]]:
    """Return, for each spelling, its flag and whether it switches the flag on.

    If slime and another program share a spelling, it means slime's flag.
    """
    table: dict[str, tuple[FlagSpec, bool]] = {}
    for spec in all_flags():
        for switches_on, group in ((True, spec.on), (False, spec.off)):
            for spelling in group:
                table.setdefault(spelling, (spec, switches_on))
    return MappingProxyType(table)
