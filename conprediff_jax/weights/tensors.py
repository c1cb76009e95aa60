"""Parameters to and from the state dicts of torch models: layouts, and an account of every tensor.

Layouts:

    convolution      theirs [out, in, h, w]      ours [h, w, in, out]
    dense            theirs [out, in]            ours [in, out]
    1x1 convolution  theirs [out, in, 1, 1]      ours a dense layer, [in, out]
    1 convolution    theirs [out, in, 1]         ours a dense layer, [in, out]
    anything else    the same

Several of our parameters may share one tensor of theirs: stacked one behind the other, or taking
turns head by head, as query, key and value of the original UNets do:

    stacked      [q of all heads, k of all heads, v of all heads]
    interleaved  [q, k, v of head 0, q, k, v of head 1, ...]

A family of models adds a name for every parameter. It need not know torch: tensors are NumPy
arrays.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

Path = tuple[str, ...]


def parameter_shapes(params: Mapping) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter of a tree, by path."""
    return {path: np.shape(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}


def check_same(
    model: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Accounts for every tensor of a model.

    Args:
        model: What it is called in errors.
        expected: Shapes by name.
        given: Those that there are.

    Raises:
        ValueError: On one line, unless both have the same names and shapes.
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
    """Where in a state dict the parameters of a model are; it serves both directions.

    Attributes:
        model: What the model is called in errors.
        shapes: The shape of every parameter, by path.
        names: The name of the tensor that holds it, by path. Parameters that share a tensor, all of
            one shape, are stacked along its first axis in the order of this mapping.
        pointwise: Names of the dense layers that are 1x1 convolutions there.
        sequence: Names of the dense layers that are convolutions over a sequence there, of size 1.
        heads: For the names of interleaved tensors, the number of heads that take turns.
    """

    model: str
    shapes: Mapping[Path, tuple[int, ...]]
    names: Mapping[Path, str]
    pointwise: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def read(self, state_dict: Mapping[str, np.ndarray]) -> dict:
        """The parameters out of a state dict: a tree of float32 NumPy arrays.

        Raises:
            ValueError: If a tensor is missing, left over or of another shape than the model's.
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
        return traverse_util.unflatten_dict(params)

    def write(self, params: Mapping) -> dict[str, np.ndarray]:
        """The state dict of the parameters: contiguous float32 arrays by name.

        Raises:
            ValueError: If a parameter is missing, left over or of another shape than the model's.
        """
        ours = {
            path: np.asarray(leaf, np.float32)
            for path, leaf in traverse_util.flatten_dict(params).items()
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
        """Our layout -> theirs."""
        if path[-1] != "kernel":
            return leaf
        if leaf.ndim == 4:
            return leaf.transpose(3, 2, 0, 1)
        return leaf.T.reshape(*leaf.T.shape, *[1] * self._size_dims(path))

    def _to_ours(self, path: Path, tensor: np.ndarray) -> np.ndarray:
        """Their layout -> ours."""
        if path[-1] != "kernel":
            return tensor
        if self._size_dims(path):
            tensor = tensor.reshape(tensor.shape[:2])
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T

    def _size_dims(self, path: Path) -> int:
        """Dimensions of size 1 that a dense kernel has there because it is a convolution."""
        return 2 * (path[-2] in self.pointwise) + (path[-2] in self.sequence)

    def _their_shape(self, paths: list[Path]) -> tuple[int, ...]:
        """The shape of the tensor that holds these parameters."""
        empty = np.broadcast_to(np.float32(0), self.shapes[paths[0]])
        first, *rest = self._to_theirs(paths[0], empty).shape
        return (len(paths) * first, *rest)
