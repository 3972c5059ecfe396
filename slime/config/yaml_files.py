"""The reader of YAML files with flags; scalars stay as they are written.

- Used by: `parse` (--config) and `eval_data` (--eval-config).
- Invariant: reading takes bounded time and memory, runs no code, drops nothing and changes no number (`010` and `1:30`
  stay text, and the flag's own type decides).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import yaml

from slime.core.small_files import read_small

MAX_BYTES = 256 * 1024
MAX_EXPANDED = 1_000_000
"""The largest number of characters, lists and mappings after aliases are expanded."""


class _TextLoader(yaml.SafeLoader):
    """A SafeLoader that only makes text, booleans, null, lists and mappings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            written = (key.tag, str(key.value))
            if written in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is repeated", key.start_mark
                )
            seen.add(written)
        return super().construct_mapping(node, deep)


def _as_written(loader: _TextLoader, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _refuse(loader: _TextLoader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, f"a value of the type {node.tag}", node.start_mark)


for _kind in ("int", "float", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)
for _kind in ("binary", "omap", "pairs", "set"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _refuse)


def read_yaml_file(path: str) -> Any:
    """Return the single document of a YAML file, or None if it is empty.

    Raises:
        ValueError: the file cannot be read, is larger than MAX_BYTES or MAX_EXPANDED, or is not YAML of this kind. The
            message completes "FILE ...".
    """
    try:
        text = read_small(path, MAX_BYTES).decode("utf-8-sig")
        loader: Any = _TextLoader(text)
        node: yaml.Node | None = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_EXPANDED:
            raise ValueError(f"has more than {MAX_EXPANDED:,} characters once its aliases are expanded")
        return loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read (not text in UTF-8, byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"cannot be read ({error.problem or error.context}{where})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read ({str(error).splitlines()[0]})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of characters and nodes in this node; an alias counts like the node that it refers to.

    Raises:
        ValueError: a node contains an alias of itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("has a value that contains itself")
        return known[id(node)]
    known[id(node)] = 0  # until it is counted
    if isinstance(node, yaml.MappingNode):
        pairs = cast(list[tuple[yaml.Node, yaml.Node]], node.value)
        below = sum(_size(each, known) for pair in pairs for each in pair)
    elif isinstance(node, yaml.SequenceNode):
        below = sum(_size(each, known) for each in cast(list[yaml.Node], node.value))
    else:
        below = len(str(node.value))
    known[id(node)] = 1 + below
    return 1 + below
