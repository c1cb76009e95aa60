"""How programs are compiled in tests: quickly, since the suite compiles more than it computes."""

import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".jax_cache"

# Without optimisation, and with one module of machine code, programs compile several times faster.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # It is twice as fast without the emitters that make one kernel of many operations. Later
    # versions have no others, and end at a flag that they do not know.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts: one device, as on a laptop.

    Args:
        **more: Further variables. A test that computes more than it compiles sets XLA_FLAGS="".
    """
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }
