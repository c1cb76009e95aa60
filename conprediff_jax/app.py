"""Shows trained models and runs in progress on a page in the browser.

    python -m conprediff_jax.app --workdir=runs/openmoji
    python -m conprediff_jax.app --workdir=runs/openmoji,runs/no_context
    python -m conprediff_jax.app --workdir=runs/openmoji --step=1500 --port=8000

On the page you draw images and see one of them on its way from noise, paint over a part of a photo
and have it filled, compare two models on the same seeds, and watch the curves and sample grids of a
run. Models are called one at a time; the calls of several users wait in a queue.

The page is served on 127.0.0.1 unless --host says otherwise. It has no password. It fetches nothing
from other machines, and writes nothing to the workdirs. Press Ctrl-C to close it.
"""

import errno
import os
import socket
import tempfile
import threading

from absl import flags

from conprediff_jax.cli import help

_WORKDIR = flags.DEFINE_list(
    "workdir",
    None,
    "Show the models and runs in these workdirs, or `inference` folders, with commas between them.",
    required=True,
)
_STEP = flags.DEFINE_integer(
    "step", None, "Use the checkpoints of this training step; the default is the newest."
)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Draw this many images at a time.", lower_bound=1)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Serve the page on this interface; 0.0.0.0 is all of them."
)
_PORT = flags.DEFINE_integer("port", 7860, "Serve the page on this port.", 1, 65535)

help.answer(__name__)  # before imports that take seconds

from absl import logging

from conprediff_jax import parallel
from conprediff_jax.cli import app, trouble
from conprediff_jax.common import extras, opening
from conprediff_jax.common.errors import FieldError

_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str]) -> None:
    """Reads the flags, opens the models, and serves the page until Ctrl-C."""
    del argv
    extras.need("gradio", "app")
    _check_free(_HOST.value, _PORT.value)
    with tempfile.TemporaryDirectory(prefix="conprediff_jax_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads and what is downloaded
        from conprediff_jax.page import layout  # imports Gradio, which is an extra

        mesh = parallel.make_mesh(parallel.MeshSpec())
        names = layout.names_of(_WORKDIR.value)
        shown = [
            layout.open_workdir(workdir, name, mesh, step=_STEP.value, batch_size=_BATCH.value)
            for workdir, name in zip(_WORKDIR.value, names, strict=True)
        ]
        page = layout.make(shown, trouble.explain)
        address = layout.serve(page, _HOST.value, _PORT.value)
        logging.info("reads   %s, on %s", ", ".join(_WORKDIR.value), opening.devices())
        logging.info("serves  %s until Ctrl-C", address)
        if _HOST.value not in _LOCAL:
            logging.warning("whoever can reach this machine can use the page: it has no password")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    """Checks that the page can be served there.

    Raises:
        FieldError: Another program uses the port, or this machine has no such interface.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise FieldError("host", f"is {host}: this machine knows no such name") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise FieldError("port", f"is {port}: only root may use it; name another") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"is {port}: another program uses it; name another"
                raise FieldError("port", reason) from None
            raise FieldError("host", f"is {host}: {error.strerror}") from None


if __name__ == "__main__":
    app.run(main, again="the same command serves the page again")
