"""The parameters of equal blocks: stacked, as a scan reads them, or block by block.

    stacked     {"blocks": {"norm": {"scale": [layers, ...]}}, ...}
    separate    {"block_0": {"norm": {"scale": [...]}}, "block_1": ..., ...}

Our models stack them. The state dicts of torch have them block by block, as checkpoints of earlier
versions do.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

BLOCKS = "blocks"
_FIRST = "block_0"


def separate(tree: Any, part: Callable[[Any, int], Any] = operator.getitem) -> Any:
    """A pytree whose stacked blocks are taken apart; parts of it without blocks stay as they are.

    Args:
        tree: A pytree with dicts of parameters, or of something with the shapes of parameters.
        part: A function from a stacked leaf and the number of a block to the leaf of this block.
    """

    def separated(node: Mapping) -> dict:
        stacked = node[BLOCKS]
        rest = {name: separate(value, part) for name, value in node.items() if name != BLOCKS}
        count = jax.tree.leaves(stacked)[0].shape[0]
        for i in range(count):
            rest[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: part(leaf, i), stacked)
        return rest

    return _replaced(tree, BLOCKS, separated)


def stack(tree: Any, join: Callable[..., Any] = np.stack) -> Any:
    """A pytree whose blocks are stacked, as the inverse of `separate`.

    Args:
        tree: A pytree with dicts of parameters.
        join: A function from a list of leaves to their stack.
    """

    def stacked(node: Mapping) -> dict:
        rest, blocks = dict(node), []
        while (name := f"block_{len(blocks)}") in rest:
            blocks.append(rest.pop(name))
        return stack(rest, join) | {BLOCKS: jax.tree.map(lambda *leaves: join(leaves), *blocks)}

    return _replaced(tree, _FIRST, stacked)


def are_separate(tree: Any) -> bool:
    """Whether a pytree has blocks that are not stacked."""
    return _holds(tree, _FIRST)


def are_stacked(tree: Any) -> bool:
    """Whether a pytree has stacked blocks."""
    return _holds(tree, BLOCKS)


def _has(node: Any, key: str) -> bool:
    return isinstance(node, Mapping) and key in node


def _holds(tree: Any, key: str) -> bool:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: _has(node, key))
    return any(_has(node, key) for node in nodes)


def _replaced(tree: Any, key: str, by: Callable[[Mapping], dict]) -> Any:
    """A pytree in which every dict with a key is replaced."""
    return jax.tree.map(
        lambda node: by(node) if _has(node, key) else node,
        tree,
        is_leaf=lambda node: _has(node, key),
    )
