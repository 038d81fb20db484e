"""Runs many short commands as forks of a single process that imports everything once."""

import json
import os
import subprocess
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
