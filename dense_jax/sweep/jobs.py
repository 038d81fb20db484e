"""Runs of a sweep as processes of this machine: some at once, each with its share of the devices.

A job is a folder and the commands to be run for it, one after the other. Their output is appended
to log.txt there. If one fails, the others of its job are left out, and failure.json says so:

    {"exit_code": 1, "error": "its error, or the last line of its output"}

Never imports jax.
"""

import collections
import concurrent.futures
import contextlib
import json
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

from dense_jax.storage import try_lock

PREEMPTED = os.EX_TEMPFAIL  # 75: the command saved and stopped; the same one resumes
FAILURE = "failure.json"
LOG = "log.txt"


class Job(NamedTuple):
    name: str
    workdir: epath.Path
    commands: list[list[str]]  # none: nothing is left to do


class Share(NamedTuple):
    """What one job at a time may use: no cores stands for all."""

    cores: frozenset[int] = frozenset()
    environment: Mapping[str, str] = {}


def shares(num_jobs: int) -> list[Share]:
    """Equal shares of this machine for so many jobs at once, the remainder unused.

    Equal, so that it makes no difference to its numbers where a job runs, or runs on. Processor
    cores always, by affinity, which also sizes XLA's thread pool; GPUs if there are any. Raises
    ValueError if there are too few.
    """
    if num_jobs == 1:
        return [Share()]
    cores = _share_out("processor cores", sorted(os.sched_getaffinity(0)), num_jobs)
    ids = gpus()
    devices = _share_out("GPUs", ids, num_jobs) if ids else [[]] * num_jobs
    return [
        Share(frozenset(own), {"CUDA_VISIBLE_DEVICES": ",".join(gpu)} if gpu else {})
        for own, gpu in zip(cores, devices, strict=True)
    ]


def gpus() -> list[str]:
    """The ids of the NVIDIA GPUs that jax would use: of CUDA_VISIBLE_DEVICES, if that is set."""
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
    """Runs commands, from any thread; a signal to us becomes SIGTERM to them: they can save."""

    def __init__(self):
        self.stopped = False
        self._children: set[subprocess.Popen] = set()

    def install(self) -> None:
        """Ctrl-C, a launcher's SIGTERM and a closed terminal stop the sweep; nohup still works."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self.stop())

    def stop(self) -> None:
        self.stopped = True
        for child in list(self._children):
            child.terminate()

    def __call__(
        self, command: list[str], output: IO | None = None, environment: Mapping[str, str] = {}
    ) -> int:
        """Returns the exit code, PREEMPTED if we were stopped.

        output: where its output goes, rather than to ours.
        """
        if self.stopped:
            return PREEMPTED
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output and subprocess.STDOUT,
            # Unbuffered: a traceback is to be the last in the log.
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment),
            # In a group of its own: Ctrl-C would reach it as SIGINT too, as one that kills.
            process_group=0,
        )
        self._children.add(child)
        if self.stopped:  # while it was being started
            child.terminate()
        code = child.wait()
        self._children.discard(child)
        return PREEMPTED if self.stopped else code


class Progress:
    """How far all are: a bar in a terminal, else a line for each start and end."""

    def __init__(self, jobs: Sequence[Job]):
        self._numbers = {job.name: number for number, job in enumerate(jobs, 1)}
        self._num_done = self._num_before = sum(not job.commands for job in jobs)
        self._started: dict[str, float] = {}
        self._start = time.monotonic()
        self._num_failed = 0
        self._bar = tqdm(
            total=len(jobs),
            initial=self._num_done,  # what was done before does not count as fast
            unit="run",
            smoothing=0,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        if self._num_done:
            self.say(f"{self._num_done} of {len(jobs)} runs are already finished")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def start(self, job: Job) -> None:
        self._started[job.name] = time.monotonic()
        if self._bar.disable:
            self.say(f"{self._where(job)}: starts")
        self.refresh()

    def end(self, job: Job, error: str | None) -> None:
        seconds = time.monotonic() - self._started.pop(job.name)
        self._num_done += 1
        self._num_failed += error is not None
        how = "finished" if error is None else f"failed ({error})"
        if self._bar.disable:
            self.say(
                f"{self._where(job)}: {how} after {tqdm.format_interval(seconds)}; "
                f"{self._num_done} of {len(self._numbers)} are done, {self._left()} left"
            )
        elif error is not None:
            self.say(f"{self._where(job)}: {how}")
        self._bar.n = self._num_done
        self.refresh()

    def refresh(self) -> None:
        failed = [f"{self._num_failed} failed"] if self._num_failed else []
        self._bar.set_postfix_str(", ".join([*failed, *self._started]))

    def close(self) -> None:
        self._bar.close()

    def _where(self, job: Job) -> str:
        return f"[{self._numbers[job.name]}/{len(self._numbers)}] {job.name}"

    def _left(self) -> str:
        rate = (time.monotonic() - self._start) / (self._num_done - self._num_before)
        return tqdm.format_interval(rate * (len(self._numbers) - self._num_done))


def run_all(
    jobs: Sequence[Job], shares: Sequence[Share], runner: Runner, *, logs: bool = True
) -> int:
    """Runs the jobs in order, as many at once as there are shares, and returns the exit code.

    0: all are finished; 1: some failed, the others ran; PREEMPTED: stopped, by a signal to us or
    to one of them, and the same command resumes.

    logs: False leaves output in the terminal, where several processes are one run.
    """
    waiting = collections.deque(job for job in jobs if job.commands)
    failures: list[str] = []
    interrupted: list[str] = []
    progress = Progress(jobs)

    def work(share: Share) -> None:
        if share.cores:
            os.sched_setaffinity(0, share.cores)  # this thread's, and so of all it starts
        while not runner.stopped:
            try:
                job = waiting.popleft()
            except IndexError:  # none is left
                return
            run_one(job, share)

    def run_one(job: Job, share: Share) -> None:
        progress.start(job)
        job.workdir.mkdir(parents=True, exist_ok=True)
        with _log(job, runner, progress.say) if logs else contextlib.nullcontext() as log:
            (job.workdir / FAILURE).unlink(missing_ok=True)
            code, error = _run_commands(job, log, lambda c: runner(c, log, share.environment))
            if code == PREEMPTED:
                interrupted.append(job.name)
                runner.stop()
                return
            if code:
                see = f", see {job.workdir / LOG}" if logs else ""
                failures.append(f"  {job.name}: {error} (exit code {code}){see}")
                text = json.dumps({"exit_code": code, "error": error}, indent=2)
                (job.workdir / FAILURE).write_text(text + "\n")
        progress.end(job, error if code else None)

    with contextlib.closing(progress), concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        running = [pool.submit(work, share) for share in shares]
        said = False
        while concurrent.futures.wait(running, timeout=1).not_done:
            progress.refresh()
            if runner.stopped and not said:
                progress.say("stopping: the runs save; the same signal again kills them")
                said = True
    for worker in running:
        worker.result()  # raises what it raised
    if runner.stopped:
        names = ", ".join(interrupted) or "before the first run"
        print(f"stopped at {names}; the same command resumes there", file=sys.stderr)
        return PREEMPTED
    if failures:
        print(
            f"{len(failures)} of {len(jobs)} runs failed; the same command tries them again:",
            *failures,
            sep="\n",
            file=sys.stderr,
        )
        return 1
    print(f"all {len(jobs)} runs are finished")
    return 0


@contextlib.contextmanager
def _log(job: Job, runner: Runner, say: Callable[[str], None]) -> Iterator[IO]:
    """Opens the job's log, when no other process writes to it any more.

    The commands inherit the lock with the file, so that one whose sweep was killed is waited for.
    """
    with (job.workdir / LOG).open("ab") as log:
        said = False
        while not runner.stopped and not try_lock(log, job.workdir / LOG):
            if not said:
                say(f"{job.name} is still run by another process: waiting for its end")
            said = True
            time.sleep(0.2)
        yield log


def _run_commands(job: Job, log: IO | None, run: Callable[[list[str]], int]) -> tuple[int, str]:
    """Returns the exit code of the first that fails, or 0, and what it said."""
    for command in job.commands:
        start = 0
        if log is not None:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            start = log.tell()
        code = run(command)
        if code:
            return code, _reason(job.workdir / LOG, start) if log else "see its output"
    return 0, ""


def _reason(path: epath.Path, start: int) -> str:
    """The error in a file, or its last line that is not empty, of those from byte `start` on.

    An error is what `command.run` makes of it: "error: " and maybe indented lines. Others may follow,
    such as those of threads that end.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - 65536))
        text = file.read().decode(errors="replace")
    if errors := re.findall(r"^error: (.*(?:\n  .*)*)", text, re.MULTILINE):
        return " ".join(errors[-1].split())
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
