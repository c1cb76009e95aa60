"""Meshes, sharding rules, and runs of several processes that start and stop together."""

from conprediff_jax.parallel.activations import divided_batch
from conprediff_jax.parallel.mesh import BATCH_AXES, MeshSpec, make_mesh
from conprediff_jax.parallel.sharding import (
    batch_sharding,
    batch_share,
    exchange,
    replicated,
    to_global,
    tree_shardings,
)

__all__ = [
    "BATCH_AXES",
    "MeshSpec",
    "batch_sharding",
    "batch_share",
    "divided_batch",
    "exchange",
    "make_mesh",
    "replicated",
    "to_global",
    "tree_shardings",
]
