"""Meshes and sharding rules."""

from conprediff_jax.parallel.mesh import BATCH_AXES, MeshSpec, make_mesh
from conprediff_jax.parallel.sharding import batch_sharding, replicated, to_global, tree_shardings

__all__ = [
    "BATCH_AXES",
    "MeshSpec",
    "batch_sharding",
    "make_mesh",
    "replicated",
    "to_global",
    "tree_shardings",
]
