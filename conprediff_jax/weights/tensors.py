"""Maps between our parameters and the state dicts of torch models, with an account of every tensor.

The layouts of kernels differ:

    convolution      theirs [out, in, h, w]      ours [h, w, in, out]
    dense            theirs [out, in]            ours [in, out]
    1x1 convolution  theirs [out, in, 1, 1]      ours a dense layer, [in, out]
    1 convolution    theirs [out, in, 1]         ours a dense layer, [in, out]
    anything else    the same

Several of our parameters may share one of their tensors. Such a tensor stacks them one behind the
other, or interleaves them by head, as the original UNets do with query, key and value:

    stacked      [q of all heads, k of all heads, v of all heads]
    interleaved  [q, k, v of head 0, q, k, v of head 1, ...]

Our models stack the parameters of equal blocks, `blocks/...`. In torch, each block has tensors of
its own, so the tables describe the blocks one by one, `block_{i}/...`.

Each family of models adds a name for every parameter. All tensors are NumPy arrays, so nothing here
needs torch.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from conprediff_jax.common import blocks

Path = tuple[str, ...]


def parameter_shapes(params: Mapping) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter of a tree, by path, with the blocks of a stack one by one."""
    separate = jax.eval_shape(blocks.separate, params)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(separate).items()}


def split_path(path: Path) -> tuple[str | None, str, str]:
    """The parts of a parameter's path in a transformer, from which torch's name is made.

    Returns:
        The number of the block `block_{i}`, or None outside the blocks; the layer, joined by '/';
        and the ending of torch's name, 'weight' or 'bias'.
    """
    *modules, leaf = path
    block, layer = re.fullmatch(r"(?:block_(\d+)/)?(.+)", "/".join(modules)).groups()
    return block, layer, "bias" if leaf == "bias" else "weight"


def check_same(
    model: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that the tensors of a model have the names and shapes that they should have.

    Args:
        model: The name of the model in errors.
        expected: The shapes that the tensors should have, by name.
        given: The shapes that the tensors have, by name.

    Raises:
        ValueError: A tensor is missing, left over, or has another shape. The message is one line.
    """
    problems = [f"{name} {expected[name]} is missing" for name in expected.keys() - given]
    problems += [f"{name} {given[name]} is left over" for name in given.keys() - expected]
    problems += [
        f"{name} is {given[name]}, not {expected[name]}"
        for name in expected.keys() & given
        if expected[name] != given[name]
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(sorted(problems)[:8])
        raise ValueError(f"weights do not fit the {model}: {listed}{more}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The places of a model's parameters in a state dict, for reading and writing.

    Attributes:
        model: The name of the model in errors.
        shapes: The shape of every parameter, by path.
        names: The name of the tensor that holds a parameter, by path. Parameters that share a
            tensor have one shape, and are stacked along its first axis in the order of this
            mapping.
        pointwise: The names of our dense layers that are 1x1 convolutions in the state dict.
        sequence: The names of our dense layers that are convolutions over a sequence, of size 1, in
            the state dict.
        heads: The number of heads in each interleaved tensor, by its name.
    """

    model: str
    shapes: Mapping[Path, tuple[int, ...]]
    names: Mapping[Path, str]
    pointwise: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def read(self, state_dict: Mapping[str, np.ndarray]) -> dict:
        """Reads the parameters from a state dict, as a tree of float32 NumPy arrays.

        Raises:
            ValueError: A tensor is missing, left over, or does not have the model's shape.
        """
        theirs = {name: np.asarray(tensor, np.float32) for name, tensor in state_dict.items()}
        rows = self._rows()
        check_same(
            self.model,
            {name: self._their_shape(paths) for name, paths in rows.items()},
            {name: tensor.shape for name, tensor in theirs.items()},
        )
        params = {}
        for name, paths in rows.items():
            for path, part in zip(paths, self._split(name, theirs[name], len(paths)), strict=True):
                params[path] = self._to_ours(path, part)
        return blocks.stack(traverse_util.unflatten_dict(params))

    def write(self, params: Mapping) -> dict[str, np.ndarray]:
        """Writes the parameters as a state dict of contiguous float32 arrays by name.

        Raises:
            ValueError: A parameter is missing, left over, or does not have the model's shape.
        """
        ours = {
            path: np.asarray(leaf, np.float32)
            for path, leaf in traverse_util.flatten_dict(blocks.separate(params)).items()
        }
        check_same(
            self.model,
            {"/".join(path): shape for path, shape in self.shapes.items()},
            {"/".join(path): leaf.shape for path, leaf in ours.items()},
        )
        return {
            name: self._join(name, [self._to_theirs(path, ours[path]) for path in paths])
            for name, paths in self._rows().items()
        }

    def _rows(self) -> dict[str, list[Path]]:
        """The parameters that each tensor holds."""
        rows = {}
        for path, name in self.names.items():
            rows.setdefault(name, []).append(path)
        return rows

    def _split(self, name: str, tensor: np.ndarray, parts: int) -> list[np.ndarray]:
        """The parts of a tensor that several parameters share."""
        by_head = tensor.reshape(self.heads.get(name, 1), parts, -1, *tensor.shape[1:])
        return [by_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(parts)]

    def _join(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parts."""
        heads, rest = self.heads.get(name, 1), parts[0].shape[1:]
        by_head = np.stack([part.reshape(heads, -1, *rest) for part in parts], axis=1)
        return np.ascontiguousarray(by_head.reshape(-1, *rest))

    def _to_theirs(self, path: Path, leaf: np.ndarray) -> np.ndarray:
        """Brings a parameter into their layout."""
        if path[-1] != "kernel":
            return leaf
        if leaf.ndim == 4:
            return leaf.transpose(3, 2, 0, 1)
        return leaf.T.reshape(*leaf.T.shape, *[1] * self._size_dims(path))

    def _to_ours(self, path: Path, tensor: np.ndarray) -> np.ndarray:
        """Brings a tensor into our layout."""
        if path[-1] != "kernel":
            return tensor
        if self._size_dims(path):
            tensor = tensor.reshape(tensor.shape[:2])
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T

    def _size_dims(self, path: Path) -> int:
        """The number of dimensions of size 1 in their kernel of one of our dense layers."""
        return 2 * (path[-2] in self.pointwise) + (path[-2] in self.sequence)

    def _their_shape(self, paths: list[Path]) -> tuple[int, ...]:
        """The shape of the tensor that holds these parameters."""
        empty = np.broadcast_to(np.float32(0), self.shapes[paths[0]])
        first, *rest = self._to_theirs(paths[0], empty).shape
        return (len(paths) * first, *rest)
