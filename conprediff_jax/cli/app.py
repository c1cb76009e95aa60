"""What every command shares: one line for a user's error, quiet libraries, cached compilation.

Exit codes: 0 done; 2 the user's error; 75 (EX_TEMPFAIL) stopped by SIGTERM, to be started again.
"""

import importlib.util
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from conprediff_jax.cli import config_flag
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.parallel import processes

USER_ERROR_CODE = 2


def run(main: Callable[[list[str]], None], *, several: bool = False, positional: int = 0) -> None:
    """Runs a command: `absl.app.run`, except that a user's error is one line and exit code 2.

    Args:
        main: The command.
        several: Whether it can be one of several processes; see `parallel.processes`.
        positional: How many arguments it takes besides options.
    """
    # TensorFlow only writes events here; without this it announces its oneDNN kernels.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.python_handler.setFormatter(_OneLine())
    handler.addFilter(_ours_or_serious)
    flags.DEFINE_bool("version", False, "Print the version of the package, and end.")
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
                processes.exit_when_asked()  # until there is something to save
                processes.join(automatic=flags.FLAGS.distributed)
                if jax.process_index():  # what all do, the first one says
                    logging.set_verbosity(logging.WARNING)
            else:
                processes.refuse_several()
            main(argv)
        except UserError as error:
            _fail(_said(error))
        except processes.Preempted as stop:
            # The first to end must not take the others' exit codes from them: Slurm signals those.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            logging.info("%s", stop)
            sys.exit(processes.RESTART_CODE)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            _end(1)

    app.run(guarded, flags_parser=_parse_flags)


def version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version("conprediff_jax")
    except metadata.PackageNotFoundError:  # run from a folder of its source
        return "(not installed)"


def need(module: str, extra: str) -> None:
    """Checks, before anything is computed, that a library of one of the extras is there.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{module} is not installed, which this needs: pip install -e ".[{extra}]"')


def config_name() -> pathlib.Path:
    """The file that `--config` names, without what may follow a colon."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    return pathlib.Path(name.partition(":")[0])


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl's own, which ends with code 1 where launchers must know that a flag was wrong."""
    home = os.path.expanduser("~/")
    if "--version" in argv[1:]:
        print(f"conprediff_jax {version()}")
        sys.exit(0)
    try:
        # A shell leaves ~ alone where it does not begin a word.
        argv = [re.sub(r"(^--[\w.]+=|,)~/", rf"\1{home}", arg) for arg in argv]
        argv, keys = _without_keys(argv)
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl prints help and ends with 1
        sys.exit(0)
    except flags.Error as error:
        inside = "parsing config file" in str(error)
        _fail(_of_config(error) if inside else " ".join(str(error).split()))
    except Exception as error:  # config files run while flags are parsed, and raise what they like
        _fail(_of_config(error))
    given = config_flag.is_defined() and flags.FLAGS["config"].value is not None
    if given and not config_name().is_file():  # ml_collections says so later, and at length
        _fail(f"--config={config_name()}: there is no such file")
    if keys and not given:
        _fail(f"--config.{next(iter(keys))}: there is no --config that it could be a key of")
    try:
        config_flag.apply(keys)
    except UserError as error:
        _fail(f"--{error}")
    return rest


def _without_keys(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without keys of a config, files of flags read; and the keys."""
    if not config_flag.is_defined():
        return argv, {}
    rest, keys = config_flag.split(flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False))
    return [argv[0], *rest], keys


def _of_config(error: BaseException | None) -> str:
    """What is wrong with a config file, and where."""
    chain = []  # ml_collections and absl wrap what was raised first
    while error is not None:
        chain.append(error)
        error = error.__context__
    first = chain[-1]
    if isinstance(first, SyntaxError):
        return f"{first.filename}, line {first.lineno}: {first.msg}"
    texts = [str(e.args[0] if e.args else "").strip() or type(e).__name__ for e in chain]
    reason = texts[-1].splitlines()[0].partition(" Other fields present")[0].strip(" .")
    reason = re.sub(r"^'(\w+)'$", r"\1", reason)  # a KeyError's
    hints = [line for text in texts for line in text.splitlines() if line.startswith("Did you")]
    hint = f"; {hints[0].lower()}" if hints else ""
    frames = [frame for e in chain for frame in traceback.extract_tb(e.__traceback__)]
    for frame in reversed(frames):
        if frame.name == "get_config":
            return f"{frame.filename}, line {frame.lineno}: {reason}{hint}"
    return f"--config: {reason}{hint}"


def _said(error: UserError) -> str:
    """The message of a user's error; here alone a field becomes the flag that sets it."""
    is_flag = isinstance(error, FieldError) and error.field in flags.FLAGS
    return f"--{error}" if is_flag else str(error)


def _fail(message: str) -> NoReturn:
    python_logging.disable()  # what libraries still say, in the background, is not the last word
    print(f"error: {message}", file=sys.stderr, flush=True)
    _end(USER_ERROR_CODE)


def _end(code: int) -> NoReturn:
    """Ends the process; one of several at once, where JAX would first wait for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _OneLine(logging.PythonFormatter):
    """Time and message; the level where it is worth reading."""

    def format(self, record) -> str:
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{_message(record)}"


def _message(record) -> str:
    """The message; of a library's, the first line."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):  # it was given other arguments than it asks for
        message = str(record.msg)
    return message if _ours(record) else message.partition("\n")[0]


def _ours(record) -> bool:
    folders = (
        str(pathlib.Path(__file__).parent.parent),
        str(pathlib.Path(sys.argv[0]).resolve().parent),
    )
    return record.pathname.startswith(folders)


def _ours_or_serious(record) -> bool:
    """Libraries speak up when something is wrong; not asyncio, of what has been raised already."""
    return _ours(record) or (record.levelno >= python_logging.WARNING and record.name != "asyncio")


def _cache_compilations() -> None:
    """Keeps compiled programs between runs, unless the user has chosen a place (or none)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "conprediff_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
