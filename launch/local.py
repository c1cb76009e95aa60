#!/usr/bin/env python3
"""Runs a command as several processes on this machine, and starts it again when it asks for that.

    python launch/local.py --processes=2 --
        python -m conprediff_jax.main --config=configs/openmoji.py
    python launch/local.py --processes=4 --restarts=3 --
        python -m conprediff_jax.sample --workdir=runs/openmoji --num=1000 --out=samples

Every process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. This launcher is
for CPUs, to try out what a cluster will do: one process takes all accelerators of a machine.

When a process exits with 75, it was preempted and has saved what it needs, and all processes are
started again. When a process dies otherwise, the launcher names it, kills the other processes and
starts all of them again, up to --restarts times. When the command itself was wrong (exit code 2),
nothing is started again. SIGTERM is passed on to all processes, and then nothing is started again.
After Ctrl-C (SIGINT), which a terminal sends to the processes as well, nothing is started again
either.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

RESTART_CODE, USER_ERROR, INTERRUPTED = 75, 2, 130


def main() -> int:
    """Reads the flags, and starts the command until it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="number of processes")
    parser.add_argument("--devices", type=int, help="simulated CPU devices of each process")
    parser.add_argument("--port", type=int, help="port of the first process; a free one by default")
    parser.add_argument("--restarts", type=int, default=0, help="starts after failures, at most")
    parser.add_argument("--grace", type=float, default=120, help="seconds for the last ones to end")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", nargs="+", help="the command, after --")
    options = parser.parse_args()
    if options.dry_run:
        for environment in environments(options):
            settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
            print(" ".join([*settings, shlex.join(options.command)]))
        return 0
    launcher = Launcher(options)
    signal.signal(signal.SIGTERM, launcher.stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in a script's background
        signal.signal(signal.SIGINT, launcher.stop)
    failures = 0
    while True:
        code = launcher.run()
        if code != RESTART_CODE:
            failures += 1
        done = code in (0, USER_ERROR, INTERRUPTED) or failures > options.restarts
        if launcher.stopped or done:
            return code
        print(f"local: exit code {code}, starting again", flush=True)


def environments(options: argparse.Namespace) -> list[dict[str, str]]:
    """What each process finds in its environment, besides what is there."""
    port = options.port
    if not port:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(options.processes),
    }
    if options.devices:
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        shared["JAX_PLATFORMS"] = "cpu"
        shared["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return [shared | {"JAX_PROCESS_ID": str(index)} for index in range(options.processes)]


class Launcher:
    """Starts all processes, watches them, and ends them together."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.stopped = options, False
        self._processes: list[subprocess.Popen] = []

    def stop(self, *_) -> None:
        """Passes SIGTERM on."""
        self.stopped = True
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def run(self) -> int:
        """One start of all; the exit code of the first that failed, or `RESTART_CODE`, or 0."""
        self._processes = [
            subprocess.Popen(
                self.options.command,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for environment in environments(self.options)
        ]
        pids = " ".join(str(process.pid) for process in self._processes)
        print(f"local: started {pids}", flush=True)
        readers = [
            threading.Thread(target=_copy, args=(index, process))
            for index, process in enumerate(self._processes)
        ]
        for reader in readers:
            reader.start()
        if self.stopped:  # while they were being started
            self.stop()
        try:
            code = self._wait()
        finally:
            for process in self._processes:
                process.kill()
            for reader in readers:
                reader.join()
        return code

    def _wait(self) -> int:
        """Until all have ended, or one has failed, or the last take too long."""
        deadline = None
        while True:
            codes = [process.poll() for process in self._processes]
            ended = [_shell(code) for code in codes if code is not None]
            for index, code in enumerate(codes):
                if code is not None and _shell(code) not in (0, RESTART_CODE, INTERRUPTED):
                    pid = self._processes[index].pid
                    print(f"local: process {index} ({pid}) {_described(code)}", flush=True)
                    return _shell(code)
            if len(ended) == len(codes):
                return max(ended)
            if ended and deadline is None:
                deadline = time.monotonic() + self.options.grace
            if deadline is not None and time.monotonic() > deadline:
                print("local: some processes do not end, killing them", flush=True)
                return max(ended) or 1
            time.sleep(0.05)


def _shell(code: int) -> int:
    """The exit code that a shell would report: 128 plus the signal that ended a process."""
    return 128 - code if code < 0 else code


def _described(code: int) -> str:
    """How a process ended, by its exit code as `subprocess` has it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _copy(index: int, process: subprocess.Popen) -> None:
    """Prints a process's lines with its number in front."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
