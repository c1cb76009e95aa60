"""The lines with which long work begins: what it reads, what it makes, where, and on what."""

import os

import jax
from absl import logging


def say(reads: str, makes: str, out: str | os.PathLike, *, on: str | None = "") -> None:
    """Logs what is about to happen. How long it takes is logged once a part of it is done.

    Args:
        reads: The model or the data, with the step of the checkpoint.
        makes: What is made, with the settings that matter.
        out: File or folder that is written.
        on: What it runs on; by default all devices. None for work that needs none.
    """
    logging.info("reads   %s", reads)
    logging.info("makes   %s", makes)
    logging.info("writes  %s", os.fspath(out))
    if on is not None:
        logging.info("runs    on %s", on or devices())


def devices() -> str:
    """The devices in words, such as '4 x NVIDIA H100' or '1 x cpu, 8 cores'."""
    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{cores}"
