"""Reading YAML as data alone: no aliases, no objects, no interpolation, and no two entries of one key."""

import re
from typing import Any, ClassVar

import yaml

MAX_NUMBER = 1 << 63
_TIME = "tag:yaml.org,2002:timestamp"
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe loader with floats as Python and YAML 1.2 write them (``1e-4``), and dates left as text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TIME, "tag:yaml.org,2002:float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. An alias raises: few of them can stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not supported; write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a dict. A key that stands there twice raises."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} is given twice")
        return dict(super().construct_mapping(node, deep))


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """The content of a YAML text; ``${...}`` in it stays text.

    Raises:
        ValueError: An alias, a key that is given twice, or a whole number of more than 64 bits.
        Exception: Whatever else the parser raises for a text that is no YAML.
    """
    content = yaml.load(text, Loader=_Loader)
    _check_numbers(content)
    return content


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and not -MAX_NUMBER <= value < MAX_NUMBER:
        raise ValueError("a whole number has more than 64 bits")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
