"""Flat dicts of nested plain data, such as configs."""

from typing import Any


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict from `section.key` to value; tuples become lists."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
