"""Runs commands and programs as forks of a single process that imports everything once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.conftest import REPOSITORY

SERVER = """
import contextlib, importlib, json, os, runpy, sys, tempfile, traceback, warnings
warnings.filterwarnings("ignore", "os.fork")  # no device is used before the fork
preload, commands = json.load(sys.stdin)
for module in preload:
    importlib.import_module(module)
results = []
for module, *arguments in commands:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            code = 0
            try:
                if module == "-c":
                    sys.argv = ["-c", *arguments[1:]]
                    exec(arguments[0], {"__name__": "__main__"})
                else:
                    sys.argv = [module, *arguments]
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        results.append([code, *texts])
json.dump(results, sys.stdout)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run_all(
    commands: Mapping[Hashable, Sequence[str]],
    *preload: str,
    cwd: Path = REPOSITORY,
    **environment: str,
) -> dict[Hashable, Ended]:
    """Returns how each command ended: a module and its arguments, or "-c", a program and arguments.

    preload: modules to import before the first fork. They must not start threads or devices.
    """
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps([preload, list(map(list, commands.values()))]),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {key: Ended(*end) for key, end in zip(commands, json.loads(done.stdout), strict=True)}


STARTER = """
import importlib, json, os, signal, sys, warnings
warnings.filterwarnings("ignore", "os.fork")  # no device is used before the fork
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
running = set()
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        running.discard(pid)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if not answer:
            break
        running.add(answer)
    print(json.dumps(answer), flush=True)
else:
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    sys.exit()
# A child goes on here, and ends like any program.
log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
sys.argv = ["-c", *request["arguments"]]
exec(request["program"], {"__name__": "__main__"})
"""


class Starter:
    """Starts programs side by side; a context manager that ends with all of them.

    preload: modules to import before the first fork. They must not start threads or devices.
    """

    def __init__(self, *preload: str, **environment: str):
        self._server = subprocess.Popen(
            [sys.executable, "-c", STARTER, json.dumps(preload)],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._server.communicate()

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin and self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, program: str, *arguments: str, log: Path) -> "Started":
        """Starts Python code as `python -c` does; what it prints goes to the file `log`."""
        return Started(
            self, self.ask(program=program, arguments=list(arguments), log=os.fspath(log))
        )


class Started:
    """A program that was started, with methods like those of subprocess.Popen."""

    def __init__(self, starter: Starter, pid: int):
        self._starter, self.pid = starter, pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._starter.ask(poll=self.pid)
        return self._status

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.05)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
