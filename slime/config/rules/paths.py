"""Rules for the names of paths, for directories that a run reads and writes, and for the tokenizer in the HF directory.

- Used by: `rules.check`.
- Invariant: files are read as data here; transformers is not imported.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from slime.config.end_tokens import end_token_ids, read_json_object
from slime.config.eval_data import readable_eval_datasets
from slime.config.problem import Problem
from slime.config.quantized import REMEDY, quantization
from slime.config.rules.case import Case
from slime.core.small_files import is_file, open_regular

READ = ("hf_checkpoint", "load", "ref_load", "critic_load", "prompt_data", "eval_prompt_data", "eval_config")
WRITTEN = ("save", "log_dir", "tensorboard_dir", "save_hf", "update_weight_disk_dir", "save_debug_rollout_data")
"""Fields of paths that are written; `directories` checks the length of their names."""
MAX_NAME, MAX_PATH = 255, 4095
"""The largest number of bytes in one name and in a whole path on Linux."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Files of which a tokenizer has at least one."""
PICKLED = (".bin", ".bin.index.json", ".pt", ".pth")
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""The largest number of bytes in a safetensors header; the library refuses more."""
MAX_NAME_BYTES = 255
"""The largest number of bytes in a file name that all common file systems allow."""
MODEL_DIRECTORIES = ("hf_checkpoint", "ref_load", "load", "critic_load")
"""Fields whose directory may be an HF directory with weights."""


def directories(case: Case) -> Iterable[Problem]:
    """Check that paths of directories are not files, and that outputs can be written."""
    for field in ("load", "ref_load", "critic_load", "save_debug_train_data"):
        path: str | None = vars(case.args)[field]
        if field in case.given and path is not None and _stat(path) == "file":
            yield case.error(field, "is a file, not a directory", "name a directory")
    for field in ("save", "log_dir", "tensorboard_dir", "update_weight_disk_dir"):
        path = vars(case.args)[field]
        if path is None or field not in case.given:
            continue
        fault = _stat(path)
        if fault == "file":
            yield case.error(field, "is a file, not a directory", "name a directory")
            continue
        fault = fault or _long_name(path) or unwritable(Path(path))
        if fault is not None:
            yield case.missing(field, fault, "name a directory that you can write to")
    for field in ("save_hf", "save_debug_rollout_data"):
        path = vars(case.args)[field]
        if path is None:
            continue
        fault = _long_name(path) or unwritable(Path(path.partition("{")[0] or ".").parent)
        if fault is not None:
            yield case.missing(field, fault, "name a place that you can write to")


def _stat(path: str) -> str | None:
    """Return 'file', or why `path` cannot be used; None if it is a directory or does not exist yet."""
    try:
        return None if stat.S_ISDIR(os.stat(path).st_mode) else "file"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or a lone surrogate
        return f"cannot be used ({getattr(error, 'strerror', None) or error})"


def _long_name(path: str) -> str | None:
    longest = max((len(part.encode(errors="replace")) for part in Path(path).parts), default=0)
    return f"a name of {longest} bytes in it is too long" if longest > MAX_NAME_BYTES else None


def unwritable(path: Path) -> str | None:
    """Return why a run cannot create `path` and write into it, or None if it can."""
    there = path.absolute()
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            return f"{there} is a file"
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            return f"the file system of {there} is read-only"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} is not writable"
        if os.statvfs(there).f_blocks and os.statvfs(there).f_bavail == 0:  # without blocks, none can run out
            return f"the file system of {there} is full"
    except (OSError, ValueError) as error:
        return f"cannot be used ({getattr(error, 'strerror', None) or error})"
    return None


def tokenizer(case: Case) -> Iterable[Problem]:
    """Check that --hf-checkpoint has the model's own tokenizer, with a chat template if one is needed."""
    args = case.args
    folder = Path(args.hf_checkpoint or "")
    if args.hf_checkpoint is None or not _readable(folder / "config.json"):
        return  # another rule's error
    if not any(os.path.exists(folder / name) for name in TOKENIZER_FILES):
        yield case.missing("hf_checkpoint", "there is no tokenizer", "name a complete HF directory")
        return
    try:
        ids = _token_ids(folder)
        settings = read_json_object(folder / "tokenizer_config.json")
        end_ids = sorted(end_token_ids(folder))
    except (OSError, ValueError) as error:
        rule, remedy = f"{error}", "download the directory again"
        yield case.error("hf_checkpoint", rule, remedy)
        return
    templates = [args.apply_chat_template, *(dataset.apply_chat_template for dataset in readable_eval_datasets(args))]
    if any(templates) and not _has_chat_template(folder, settings):
        remedy = "add chat_template.jinja there, or use a chat model"
        rule = f"there is no chat template in {folder}"
        yield case.error("apply_chat_template", rule, remedy, also=["hf_checkpoint"])
    if not ids:
        return  # there is no tokenizer.json; the ids of other formats are checked when they are loaded
    token, largest = max(ids.items(), key=lambda item: item[1])
    size = None if args.architecture is None else args.architecture.vocab_size
    if size is not None and largest >= size:
        rule = f"tokenizer.json has token {largest} ({token!r}), but the model's vocabulary ends at {size - 1}"
        yield case.error("hf_checkpoint", rule, "put the model's own tokenizer there", also=["vocab_size"])
    end = _text(settings.get("eos_token"))
    if end is not None and end_ids and ids.get(end) not in (None, *end_ids):
        listed = ", ".join(str(number) for number in end_ids)
        rule = f"the tokenizer's end-of-text token is {ids[end]} ({end!r}), but the model's config has {listed}"
        yield case.warning("hf_checkpoint", rule, "check whether tokenizer and weights belong together")


def quantized(case: Case) -> Iterable[Problem]:
    """Refuse quantized models as sources of weights, also in a --dry-run. Each directory is reported once."""
    seen: set[Path] = set()
    for field in MODEL_DIRECTORIES:
        path: str | None = vars(case.args)[field]
        found = None if path is None or Path(path) in seen else quantization(path)
        if path is not None and found is not None:
            seen.add(Path(path))
            yield case.error(field, found, REMEDY)


def weight_files(case: Case) -> Iterable[Problem]:
    """Check that every safetensors file of an HF directory exists and has the length that its header implies.

    Each directory is checked once.
    """
    args = case.args
    seen: set[str] = set()
    for field in MODEL_DIRECTORIES:
        path: str | None = vars(args)[field]
        if path is None or path in seen or not is_file(f"{path}/config.json"):
            continue
        seen.add(path)
        pickled = _pickled_alone(Path(path))
        if pickled is not None:
            rule = f"{pickled} is a pickle, which may run code and is never read, and there are no safetensors"
            yield case.error(field, rule, "convert it to safetensors, or download safetensors")
            continue
        try:
            files = _safetensors_files(Path(path))
        except (OSError, ValueError) as error:
            yield case.error(field, f"{error}", "download or export it again")
            continue
        for file in files:
            fault = _damage(file)
            if fault is not None:
                yield case.error(field, f"{file.name} {fault}", "download or export it again")


def _pickled_alone(folder: Path) -> str | None:
    """Return the name of a file with pickled weights, if the directory has no other weights."""
    if is_file(folder / ".metadata") or any(folder.glob("*.safetensors*")):
        return None
    found = sorted(path.name for suffix in PICKLED for path in folder.glob(f"*{suffix}"))
    return found[0] if found else None


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the files that the index lists, existing or not; without an index, all safetensors files.

    Raises:
        OSError, ValueError: the index cannot be read, or lists something that is not a file name.
    """
    names = read_json_object(folder / INDEX).get("weight_map", {})
    if not isinstance(names, dict):
        raise ValueError(f"{INDEX} cannot be read (its weight_map is not an object)")
    found: set[Path] = set()
    for name in cast(dict[str, Any], names).values():
        if not isinstance(name, str) or not name.isprintable() or name != os.path.basename(name[:MAX_NAME_BYTES]):
            raise ValueError(f"{INDEX} names {name!r}, which is not a file of the directory")
        found.add(folder / name)
    return sorted(found) or sorted(folder.glob("*.safetensors"))


def _damage(file: Path) -> str | None:
    """Return the fault of a safetensors file, judged by its header and size, or None. Its tensors are not read."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            header_size = int.from_bytes(stream.read(8), "little")
            if size >= 8 and 8 + header_size > size:
                return f"is truncated: its header alone has {header_size} bytes, the file only {size}"
            if header_size > MAX_HEADER:
                return f"has a header of {header_size} bytes, more than safetensors reads"
            header: object = json.loads(stream.read(header_size))
        entries = [entry for name, entry in cast(dict[str, Any], header).items() if name != "__metadata__"]
        expected = 8 + header_size + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except FileNotFoundError:
        return f"is missing, but {INDEX} lists it"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        return "is not a safetensors file"
    return None if size == expected else f"has {size} bytes, but its header implies {expected}"


def _readable(path: Path) -> bool:
    try:
        return bool(read_json_object(path))
    except (OSError, ValueError):
        return False


def _token_ids(folder: Path) -> dict[str, int]:
    """Return the token ids from tokenizer.json, including added tokens; empty if there is no such file."""
    data = read_json_object(folder / "tokenizer.json")
    if not data:
        return {}
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] by id
            entries = cast(list[list[Any]], vocabulary)
            ids = {str(entry[0]): number for number, entry in enumerate(entries)}
        else:
            ids = {str(token): int(number) for token, number in cast(dict[str, Any], vocabulary).items()}
        for added in cast(list[dict[str, Any]], data.get("added_tokens") or []):
            ids[str(added["content"])] = int(added["id"])
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"tokenizer.json cannot be read ({type(error).__name__}: {error})") from error
    return ids


def _has_chat_template(folder: Path, settings: Mapping[str, Any]) -> bool:
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    return bool(settings.get("chat_template")) or any(os.path.exists(folder / name) for name in files)


def _text(token: Any) -> str | None:
    """Return the text of a special token in tokenizer_config.json, which is a text or an object with `content`."""
    content = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def path_names(case: Case) -> Iterable[Problem]:
    """Refuse paths that are empty or longer than file systems allow."""
    for field in (*READ, *WRITTEN, "save_debug_train_data", "load_debug_rollout_data"):
        value: str | tuple[str, ...] | None = vars(case.args)[field]
        if field not in case.given:
            continue
        for path in (value,) if isinstance(value, str) else value or ():
            longest = max((len(name.encode()) for name in path.split("/")), default=0)
            if not path.strip():
                yield case.error(field, "is empty", "name a path, or leave the flag out")
            elif field in WRITTEN:
                continue
            elif longest > MAX_NAME:
                rule = f"a name in it has {longest} bytes, and file systems allow at most {MAX_NAME}"
                yield case.error(field, rule, "shorten it")
            elif len(path.encode()) > MAX_PATH:
                rule = f"it has {len(path.encode())} bytes, and file systems allow at most {MAX_PATH}"
                yield case.error(field, rule, "shorten it")
