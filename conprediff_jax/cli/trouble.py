"""One line, with what to do, for errors of the machine and of libraries."""

import os
import re
import traceback
from typing import Any

import jax
from absl import flags

from conprediff_jax.cli import config_flag

_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY|bad_alloc", re.IGNORECASE)
_BACKEND = re.compile(r"[Uu]nable to initialize backend|[Uu]nknown backend")
# What JAX says where another program holds the memory of the GPU.
_BUSY = re.compile(r"DNN library initialization failed|CUDNN_STATUS|CUBLAS_STATUS|cuSolver")


def explain(error: BaseException) -> str | None:
    """What is wrong and what to do, in one line; None for an error that this module does not know.

    Args:
        error: An error of JAX, XLA or the system.
    """
    said = " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else ""
    if _BACKEND.search(said) or (isinstance(error, AssertionError) and "xla_bridge" in last):
        return _backend(said)
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    if isinstance(error, MemoryError) or _MEMORY.search(said):
        return _memory(said)
    if _BUSY.search(said):
        return (
            f"a library of the GPU cannot start ({_short(said)}): most often another program holds "
            "its memory; nvidia-smi names it, and XLA_PYTHON_CLIENT_PREALLOCATE=false shares it"
        )
    return None


def _backend(said: str) -> str:
    """The message for a platform that JAX cannot use."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return (
        f"JAX finds no device of JAX_PLATFORMS={asked}{f' ({_short(said)})' if said else ''}: "
        'pip install -e ".[cuda]" or ".[tpu]" installs what it needs, and without JAX_PLATFORMS '
        "JAX uses what there is"
    )


def _memory(said: str) -> str:
    """The message for memory that is used up: what did not fit, and how to need less."""
    asked = re.search(r"(allocat\w+|[Uu]sed) ([\d.]+ ?\w+)", said)
    size = f" when it asked for {_in_gib(asked[2])}" if asked else ""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = f", of {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
    device = jax.local_devices()[0].device_kind
    return f"{device} is out of memory{limit}{size}; {_smaller()}"


def _smaller() -> str:
    """How the command can need less memory, in the numbers of its flags."""
    config = flags.FLAGS["config"].value if config_flag.is_defined() else None
    if config is not None:
        return _smaller_training(config)
    if "batch_size" not in flags.FLAGS:
        return "use a machine with more memory"
    batch = flags.FLAGS["batch_size"].value
    if batch > 1:
        return f"it works on {batch} images at a time: try --batch_size={batch // 2}"
    return "it works on one image at a time: use a device with more memory"


def _smaller_training(config: Any) -> str:
    """How a training can need less memory."""
    batch, parts = config.train.batch_size, config.train.get("microbatches", 1)
    devices = jax.device_count()
    at_once = batch // parts
    tries = []
    if at_once >= 2 * devices and at_once % (2 * devices) == 0:
        tries.append(f"--config.train.microbatches={2 * parts} for the same training")
    if "remat" in config.get("model", {}) and not config.model.remat:
        tries.append("--config.model.remat=True, which takes a third more time")
    if devices > 1 and config.mesh.fsdp == 1:
        tries.append(f"--config.mesh.fsdp={devices}, which divides the parameters")
    if batch >= 2 * devices:
        tries.append(f"--config.train.batch_size={batch // 2}")
    if not tries:
        tries = ["more devices, over which config.mesh divides the work"]
    return (
        f"a step takes {batch} examples, {at_once} at a time on {devices} devices: try "
        + ", or ".join(tries)
    )


def _in_gib(size: str) -> str:
    """A size as a message has it, in GiB where it is a number of bytes."""
    count = re.fullmatch(r"(\d+) ?(bytes?)?", size)
    return f"{int(count[1]) / 2**30:.2f} GiB" if count else size


def _short(said: str) -> str:
    """The beginning of a message of a library."""
    return said if len(said) <= 120 else f"{said[:117]}..."
