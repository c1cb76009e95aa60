"""What every command shares: one line for a user's error, quiet libraries, cached compilation.

Exit codes: 0 done; 2 the user's error; 75 (EX_TEMPFAIL) stopped by SIGTERM, to be started again.
"""

import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from conprediff_jax.errors import UserError
from conprediff_jax.parallel import processes

USER_ERROR_CODE = 2


def run(main: Callable[[list[str]], None], *, several: bool = False, positional: int = 0) -> None:
    """Runs a command: `absl.app.run`, except that a user's error is one line and exit code 2.

    Args:
        main: the command.
        several: whether it can be one of several processes; see `parallel.processes`.
        positional: how many arguments it takes besides options.
    """
    # TensorFlow only writes events here; without this it announces its oneDNN kernels.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.python_handler.setFormatter(_OneLine())
    handler.addFilter(_ours_or_serious)
    if several:
        flags.DEFINE_bool(
            "distributed", False, "Find the other processes of this run by Cloud TPU, Slurm or MPI."
        )

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1 + positional:
            _fail(f"unexpected argument {argv[1 + positional]!r}: options begin with --")
        _cache_compilations()
        try:
            if several:
                processes.join(automatic=flags.FLAGS.distributed)
                if jax.process_index():  # what all do, the first one says
                    logging.set_verbosity(logging.WARNING)
            else:
                processes.refuse_several()
            main(argv)
        except UserError as error:
            _fail(str(error))
        except processes.Preempted as stop:
            logging.info("%s", stop)
            sys.exit(processes.AGAIN)

    app.run(guarded, flags_parser=_parse_flags)


def config_name() -> pathlib.Path:
    """The file that `--config` names.

    Raises:
        UserError: there is no such file.
    """
    file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not file.is_file():  # ml_collections would say so only later, and at length
        raise UserError(f"--config={file}: there is no such file")
    return file


def read_lines(flag: str, path: str | None) -> list[str] | None:
    """The lines of the text file that a flag names; None where it names none.

    Raises:
        UserError: it is no readable text file.
    """
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}={path}: not a readable text file: {error}") from error


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except flags.Error as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        # Config files run while flags are parsed; their errors have no common type.
        first = str(error).strip("\"' ").splitlines()
        _fail(f"--config: {first[0] if first else type(error).__name__}")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_CODE)


class _OneLine(logging.PythonFormatter):
    """Time and message; the level where it is worth reading."""

    def format(self, record) -> str:
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"


def _ours_or_serious(record) -> bool:
    """Libraries speak up when something is wrong; orbax also where a folder is only read."""
    if record.getMessage().startswith("Given directory is read only"):
        return False
    ours = (str(pathlib.Path(__file__).parent), str(pathlib.Path(sys.argv[0]).resolve().parent))
    return record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)


def _cache_compilations() -> None:
    """Keeps compiled programs between runs, unless the user has chosen a place (or none)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "conprediff_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
