"""Runs jobs in parallel processes on this machine, each on an equal share of the cores and GPUs.

A job is a workdir and a sequence of commands. The output of the commands is appended to log.txt in
the workdir. If a command fails, the rest of the job is skipped, and failure.json in the workdir
says why:

    {"exit_code": 1, "error": "the command's error, or the last line of its output"}

Never imports jax.
"""

import concurrent.futures
import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from etils import epath
from tqdm import tqdm

from dense_jax import storage
from dense_jax.command import PREEMPTED
from dense_jax.data.workers import processor_cores
from dense_jax.sweep.plan import FAILURE

LOG = "log.txt"


class Job(NamedTuple):
    name: str
    workdir: epath.Path
    commands: list[list[str]]  # empty if nothing is left to do


class Share(NamedTuple):
    """A set of cores and GPUs that runs one job at a time.

    cores: The core ids. If empty, a job may use all cores.
    environment: The environment variables that select the GPUs.
    """

    cores: frozenset[int] = frozenset()
    environment: Mapping[str, str] = {}


def shares(num_jobs: int) -> list[Share]:
    """Divides the cores and GPUs of this machine equally between `num_jobs` parallel jobs.

    Any remainder is unused, so that a resumed job gets as many cores as before. On a CPU, results
    depend on the number of cores.

    Raises ValueError if there are fewer cores or GPUs than jobs.
    """
    if num_jobs == 1:
        return [Share()]
    cores = _share_out("processor cores", processor_cores(), num_jobs)
    ids = gpus()
    devices = _share_out("GPUs", ids, num_jobs) if ids else [[]] * num_jobs
    return [
        Share(frozenset(own), {"CUDA_VISIBLE_DEVICES": ",".join(gpu)} if gpu else {})
        for own, gpu in zip(cores, devices, strict=True)
    ]


def gpus() -> list[str]:
    """Returns the ids of the NVIDIA GPUs that jax would use, in CUDA_VISIBLE_DEVICES format."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [word.strip() for word in visible.split(",")]
        return [word for word in ids if word not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:  # no driver
        return []
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def _share_out(what: str, items: Sequence, num_jobs: int) -> list[Sequence]:
    size = len(items) // num_jobs
    if size == 0:
        raise ValueError(f"--jobs={num_jobs} at once, but there are {len(items)} {what}")
    return [items[k * size : (k + 1) * size] for k in range(num_jobs)]


class Runner:
    """Runs as many jobs in parallel as there are `shares`. The jobs start in order.

    logs: Whether to write output to log files. If False, output goes to the terminal.
    finish: Called with each job after its last command.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        shares: Sequence[Share],
        *,
        logs: bool = True,
        finish: Callable[[Job], None] = lambda job: None,
    ):
        self.jobs, self.shares, self.logs, self.finish = jobs, shares, logs, finish
        self.stopped = False
        self._children: set[subprocess.Popen] = set()
        self._failures: list[str] = []
        self._interrupted: list[str] = []
        num_finished = sum(not job.commands for job in jobs)
        self._progress = tqdm(
            total=len(jobs),
            initial=num_finished,
            smoothing=0,
            bar_format="{n_fmt} of {total_fmt} are done, {remaining} left",
            file=sys.stderr if sys.stderr.isatty() else io.StringIO(),
        )
        if num_finished:
            _say(f"{num_finished} of {len(jobs)} runs are already finished")

    def stop_on_signals(self) -> None:
        """Calls `stop` on SIGINT, SIGTERM and SIGHUP. Signals that are ignored stay ignored."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Prevents further commands from starting, and asks running commands to save and exit."""
        self.stopped = True
        for child in list(self._children):
            child.terminate()

    def run(self) -> int:
        """Runs the jobs and returns the exit status.

        The status is 0 if all jobs are finished, 1 if some failed, and PREEMPTED if a signal
        stopped the sweep or one of its commands.
        """
        todo = iter([(k, job) for k, job in enumerate(self.jobs, 1) if job.commands])
        with self._progress, concurrent.futures.ThreadPoolExecutor(len(self.shares)) as pool:
            workers = [pool.submit(self._work, share, todo) for share in self.shares]
            said = False
            while concurrent.futures.wait(workers, timeout=1).not_done:
                self._progress.refresh()
                if self.stopped and not said:
                    _say("stopping: the runs are saving; repeat the signal to kill them")
                    said = True
        for worker in workers:
            worker.result()  # raises the worker's exception
        if self.stopped:
            names = ", ".join(self._interrupted) or "before the first run"
            print(f"stopped at {names}; the same command resumes there", file=sys.stderr)
            return PREEMPTED
        if self._failures:
            failed = f"{len(self._failures)} of {len(self.jobs)} runs failed"
            print(f"{failed}; the same command tries them again:", file=sys.stderr)
            print(*self._failures, sep="\n", file=sys.stderr)
            return 1
        print(f"all {len(self.jobs)} runs are finished")
        return 0

    def _work(self, share: Share, todo: Iterator[tuple[int, Job]]) -> None:
        """Runs jobs one by one on the cores and GPUs in `share`, until no job is left."""
        if share.cores and hasattr(os, "sched_setaffinity"):  # macOS has no such function
            # For this thread and the processes that it starts. XLA sizes its thread pool to match.
            os.sched_setaffinity(0, share.cores)
        for number, job in todo:
            if self.stopped:
                return
            title = f"[{number}/{len(self.jobs)}] {job.name}"
            _say(f"{title}: starts")
            start = time.monotonic()
            job.workdir.mkdir(parents=True, exist_ok=True)
            (job.workdir / FAILURE).unlink(missing_ok=True)
            code, error = self._run_job(job, share.environment)
            if code == PREEMPTED:
                self._interrupted.append(job.name)
                self.stop()
                return
            if code:
                see = f", see {job.workdir / LOG}" if self.logs else ""
                self._failures.append(f"  {job.name}: {error} (exit code {code}){see}")
                failure = {"exit_code": code, "error": error}
                storage.write_json(job.workdir / FAILURE, failure)
            else:
                self.finish(job)
            self._progress.update()
            outcome = f"failed ({error})" if code else "finished"
            duration = tqdm.format_interval(time.monotonic() - start)
            _say(f"{title}: {outcome} after {duration}; {self._progress}")

    def _run_job(self, job: Job, environment: Mapping[str, str]) -> tuple[int, str]:
        """Runs a job's commands in order, until one fails.

        Returns (exit code, error message) of the failed command, or (0, "") if none failed.
        """
        path = job.workdir / LOG
        with storage.appending(path) if self.logs else contextlib.nullcontext() as log:
            said = False
            # Commands inherit the lock. A command may outlive a killed sweep and hold the lock.
            while log and not self.stopped and not storage.try_lock(log, path):
                if not said:
                    _say(f"{job.name} is still run by another process: waiting for its end")
                said = True
                time.sleep(0.2)
            for command in job.commands:
                if log:
                    log.write(f"$ {shlex.join(command)}\n".encode())
                    log.flush()
                start = log.tell() if log else 0
                if code := self._call(command, log, environment):
                    return code, _error(log.name, start) if log else "see its output"
        return 0, ""

    def _call(self, command: list[str], log: IO | None, environment: Mapping[str, str]) -> int:
        """Runs a command and returns its exit code, or PREEMPTED if `stop` was called."""
        if self.stopped:
            return PREEMPTED
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            # Without buffering, a traceback is the last thing in the log.
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment),
            # In a separate process group, the command does not get Ctrl-C. Otherwise, SIGTERM from
            # `stop` would be the second signal and kill the command.
            process_group=0,
        )
        self._children.add(child)
        if self.stopped:  # a signal arrived while the child was started
            child.terminate()
        code = child.wait()
        self._children.discard(child)
        return PREEMPTED if self.stopped else code


def _say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _error(path: str, start: int) -> str:
    """Returns the last error in a log after byte `start`, or else the last nonempty line.

    An error is a line that starts with "error: " and any indented lines that follow, as printed by
    `command.run`.
    """
    with open(path, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 65536))
        text = file.read().decode(errors="replace")
    if errors := re.findall(r"^error: (.*(?:\n  .*)*)", text, re.MULTILINE):
        return " ".join(errors[-1].split())
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
