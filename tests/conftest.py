"""Shared set-up of the tests: CPU, eight simulated devices, compilation cache, shape checks."""

import gc
import os

import quick

# Before JAX starts: the suite never wants an accelerator, and sharding tests want several devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), quick.FLAGS, "--xla_force_host_platform_device_count=8"]
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jaxtyping
import psutil
import pytest

MEMORY = 4 * 2**30  # bytes that a test process holds between two files
jax.config.update("jax_compilation_cache_dir", str(quick.CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Every annotated shape of the package is checked in every call.
jaxtyping.install_import_hook("conprediff_jax", "beartype.beartype")


def pytest_collection_finish():
    """What imports have made stays, so that the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the compiled programs after a file where they have come to fill the memory.

    Each file has programs of its own, but traces of common functions are worth keeping.
    """
    yield
    if psutil.Process().memory_info().rss > MEMORY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_device():
    """`train` uses every device; with this fixture there is only one, as on a laptop."""
    from conprediff_jax import parallel

    with pytest.MonkeyPatch.context() as patch:
        one, make_mesh = jax.devices()[:1], parallel.make_mesh
        patch.setattr(jax, "device_count", lambda *_: 1)
        patch.setattr(parallel, "make_mesh", lambda spec, devices=one: make_mesh(spec, devices))
        yield
