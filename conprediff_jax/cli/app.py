"""How every command runs: one line for a user's error, quiet libraries, cached compilation.

Exit codes: 0 when the work is done; 2 for a user's error; 75 (EX_TEMPFAIL) when SIGTERM stopped the
command and the same command continues the work; 130 after Ctrl-C (SIGINT). Shells read 130 from the
signal itself, by which the process ends, so that a loop of a script ends with it.
"""

import io
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from conprediff_jax.cli import config_flag, help, trouble
from conprediff_jax.common import interrupts
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.names import did_you_mean
from conprediff_jax.common.version import package_version
from conprediff_jax.parallel import processes, share

USER_ERROR_CODE = 2


def run(
    main: Callable[[list[str]], None],
    *,
    several: bool = False,
    positional: int = 0,
    again: str = "the same command starts afresh",
) -> None:
    """Runs a command as `absl.app.run` does, except that a user's error is one line and code 2.

    Args:
        main: The function of the command.
        several: Whether it can run as one of several processes; see `parallel.processes`.
        positional: Number of arguments that it takes besides flags.
        again: What the command does when it is started again after Ctrl-C.
    """
    _quieten()
    help.define(several)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1 + positional:
            _fail(f"unexpected argument {argv[1 + positional]!r}: options begin with --")
        _cache_compilations()
        try:
            if several:
                processes.exit_when_asked()  # until there is something to save
                processes.join(automatic=flags.FLAGS.distributed)
                if jax.process_index():  # only the first process logs what all of them do
                    logging.set_verbosity(logging.WARNING)
            else:
                processes.refuse_several()
            main(argv)
            if several:
                share.wait_for_all()  # the first process may have more to do than the others
        except UserError as error:
            _fail(_said(error))
        except processes.Preempted as stop:
            # When one process ends, Slurm signals the others, which must keep this exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            logging.info("%s", stop)
            sys.exit(processes.RESTART_CODE)
        except Exception as error:
            if said := trouble.explain(error):
                _fail(said)
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            _end(1)

    try:
        with interrupts.heard():
            app.run(guarded, flags_parser=_parse_flags)
    except KeyboardInterrupt as stop:
        _leave(stop, again)


def config_name() -> pathlib.Path:
    """The file that `--config` names, without a colon and what follows it."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    return pathlib.Path(name.partition(":")[0])


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does, but ends with exit code 2 where a flag is wrong.

    Launchers must be able to tell this from code 1, with which absl ends.
    """
    home = os.path.expanduser("~/")
    if "--version" in argv[1:]:
        print(f"conprediff_jax {package_version()}")
        sys.exit(0)
    try:
        # Shells expand ~ only at the beginning of a word.
        argv = [re.sub(r"(^--[\w.]+=|,)~/", rf"\1{home}", arg) for arg in argv]
        argv, keys = _without_keys(argv)
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl prints help and ends with 1
        sys.exit(0)
    except flags.Error as error:
        inside = "parsing config file" in str(error)
        _fail(_of_config(error) if inside else " ".join(str(error).split()))
    except Exception as error:  # config files run while flags are parsed, and raise any error
        _fail(_of_config(error))
    given = config_flag.is_defined() and flags.FLAGS["config"].value is not None
    if given and not config_name().is_file():  # ml_collections would say so in many lines
        _fail(f"--config={config_name()}: there is no such file")
    if keys and not given:
        _fail(f"--config.{next(iter(keys))}: it is a key of a config file; give --config as well")
    try:
        config_flag.apply(keys)
    except UserError as error:
        _fail(f"--{error}")
    return rest


def _without_keys(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without keys of a config, and these keys; files of flags are read."""
    if not config_flag.is_defined():
        return argv, {}
    rest, keys = config_flag.split(flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False))
    return [argv[0], *rest], keys


def _of_config(error: BaseException | None) -> str:
    """Says what is wrong with a config file, and where."""
    chain = []  # ml_collections and absl wrap the error that was raised first
    while error is not None:
        chain.append(error)
        error = error.__context__
    first = chain[-1]
    if isinstance(first, SyntaxError):
        return f"{first.filename}, line {first.lineno}: {first.msg}"
    texts = [str(e.args[0] if e.args else "").strip() or type(e).__name__ for e in chain]
    reason = texts[-1].splitlines()[0].partition(" Other fields present")[0].strip(" .")
    reason = re.sub(r"^'(\w+)'$", r"there is no key '\1'", reason)
    hint = _hint_of_key(first)
    frames = [frame for e in chain for frame in traceback.extract_tb(e.__traceback__)]
    for frame in reversed(frames):
        if frame.name == "get_config":
            return f"{frame.filename}, line {frame.lineno}: {reason}{hint}"
    return f"--config: {reason}{hint}"


def _hint_of_key(error: BaseException) -> str:
    """The question that names the nearest key, for an error of a config that lacks a key."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    section, key = frame.f_locals.get("self"), re.search(r"[\"'](\w+)[\"']", str(error))
    if not isinstance(section, ConfigDict) or not key or key[1] in section:
        return ""
    return f"; {did_you_mean(key[1], section)}".rstrip("; ")


def _said(error: UserError) -> str:
    """The message of a user's error, with dashes before a field that is a flag of the command."""
    is_flag = isinstance(error, FieldError) and error.field in flags.FLAGS
    return f"--{error}" if is_flag else str(error)


def _fail(message: str) -> NoReturn:
    python_logging.disable()  # so that no library logs anything after the message
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    _end(USER_ERROR_CODE)


def _quieten() -> None:
    """Makes every record of the log one line, and leaves out what libraries only mention."""
    # TensorFlow only writes events here; without this it announces its kernels and factories.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what fails is raised as well
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.python_handler.setFormatter(_OneLine())
    handler.addFilter(_ours_or_serious)
    if sys.stderr.isatty():
        handler.python_handler.setStream(_AboveBars())


def _leave(stop: KeyboardInterrupt, again: str) -> NoReturn:
    """Says in one line that Ctrl-C ended the command, and ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as after Preempted
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a further Ctrl-C ends the process at once
    logging.info("%s", str(stop) or f"stopped by Ctrl-C; {again}")
    alone = not isinstance(stop, processes.Interrupted)
    if alone and jax.distributed.is_initialized():  # the other processes do not stop with it
        _end(interrupts.EXIT_CODE)
    # Python ends by the signal when KeyboardInterrupt leaves it; a traceback would say nothing.
    sys.excepthook = lambda *_: None
    raise KeyboardInterrupt


def _end(code: int) -> NoReturn:
    """Ends the process. One of several ends at once, where JAX would wait for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _AboveBars(io.TextIOBase):
    """The terminal, where lines of the log stand above progress bars."""

    def write(self, text: str) -> int:
        tqdm.write(text, file=sys.stderr, end="")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _OneLine(logging.PythonFormatter):
    """Formats a record as time and message, with its level from warnings on."""

    def format(self, record) -> str:
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{_message(record)}"


def _message(record) -> str:
    """The message of a record; only the first line if a library logged it."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):  # the arguments do not fit the format
        message = str(record.msg)
    return message if _ours(record) else message.partition("\n")[0]


def _ours(record) -> bool:
    folders = (
        str(pathlib.Path(__file__).parent.parent),
        str(pathlib.Path(sys.argv[0]).resolve().parent),
    )
    return record.pathname.startswith(folders)


_logged: set[tuple[str, int]] = set()  # lines of libraries that have logged something


def _ours_or_serious(record) -> bool:
    """Whether to log a record: all of ours, and each warning of a library once.

    Errors that asyncio logs are left out, since they are raised as well.
    """
    if _ours(record):
        return True
    place = record.pathname, record.lineno
    new = place not in _logged
    _logged.add(place)
    return new and record.levelno >= python_logging.WARNING and record.name != "asyncio"


def _cache_compilations() -> None:
    """Keeps compiled programs between runs, unless the user has chosen a cache folder (or none)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = pathlib.Path("~/.cache/conprediff_jax/xla").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s): every start compiles anew, unless "
            "JAX_COMPILATION_CACHE_DIR names a folder that can",
            cache, error.strerror,
        )  # fmt: skip
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
