"""Tests what the launchers ship and pass to the trainer, with fake cloud commands on PATH."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
ARGS = ["--config=a b.py", "--config.model.skips=(4, 8)", "--config.data.root=$HOME/'x' \"*\""]

# Fakes log their argv and then act: gcloud's hosts are one folder, srun's tasks run here.
LOG = 'printf "%s\\0" "$(basename "$0")" "$@" >>"$LOG"; printf "\\n\\0" >>"$LOG"\n'
GCLOUD = """
case $4 in
    scp) cp "$5" "$HOST/${6#*:}" ;;
    ssh) command=${!#}; cd "$HOST" && bash -c "${command#--command=}" ;;
esac
"""
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
pathlib.Path(os.environ["ARGV"]).write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)))
pathlib.Path(os.environ["ARGV"] + ".pid").write_text(str(os.getpid()))
time.sleep(float(os.environ.get("SECONDS_TO_TRAIN", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
"""

# The processes of local.sh, each with files of its own; it also asks Python for a free port.
LOCAL = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
if sys.argv[1] == "-c":
    os.execv(sys.executable, sys.argv)
first = pathlib.Path(os.environ["ARGV"] + "0.pid")
os.environ["ARGV"] += os.environ["JAX_LOCAL_DEVICE_IDS"]
while os.environ["JAX_LOCAL_DEVICE_IDS"] == os.environ.get("FAILS"):
    if first.exists():
        sys.exit(3)
    time.sleep(0.02)
{PYTHON}"""
# Joins the others as the trainer does, and adds up over all of them.
PEER = f"""#!{sys.executable}
import os, sys
if sys.argv[1] == "-c":
    os.execv(sys.executable, sys.argv)
sys.path.insert(0, {str(REPOSITORY)!r})
from absl import app
from dense_jax.devices import distributed
distributed.TIMEOUT = int(os.environ.get("TIMEOUT", distributed.TIMEOUT))
distributed.define_flags()
def main(argv):
    distributed.initialize()
    import jax
    from jax.experimental import multihost_utils
    if os.environ.get("FAILS") == str(jax.process_index()):
        raise ValueError("the others are waiting for me")
    numbers = multihost_utils.process_allgather(jax.numpy.asarray(1 + jax.process_index()))
    print(f"{{len(numbers)}} processes, sum {{numbers.sum()}}")
sys.argv[1:3] = []  # -m dense_jax.main
app.run(main)
"""
# As Slurm does on one node: each task learns its number from its environment.
SRUN = """
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for ((k = 0; k < SLURM_NTASKS; k++)); do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & done
status=0
for pid in $(jobs -p); do wait "$pid" || status=$?; done
exit "$status"
"""


class World:
    """A repository with the launchers, fakes on PATH and the environment that they need."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.repository = folder, folder / "repository with a space"
        shutil.copytree(LAUNCH, self.repository / "launch")
        self.env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
        self.env |= {"LOG": str(folder / "log"), "HOST": str(folder / "host")}
        self.env |= {"ARGV": str(folder / "argv"), "TMPDIR": str(folder)}
        for name in ("bin", "host/venv/bin"):
            (folder / name).mkdir(parents=True)
        self.git("init", "--quiet")
        (self.repository / "committed.txt").write_text("as committed")
        self.git("add", "--all")
        self.git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "-m", "Begin")
        (self.repository / "committed.txt").write_text("edited")
        (self.repository / "untracked.txt").touch()

    def git(self, *args):
        subprocess.run(["git", *args], cwd=self.repository, check=True, env=self.env)

    def fake(self, name: str, script: str, folder: str = "bin") -> None:
        path = self.folder / folder / name
        path.write_text(script if script.startswith("#!") else f"#!/bin/bash\n{LOG}{script}")
        path.chmod(0o755)

    def command(self, *args: str) -> list[str]:
        return ["bash", str(self.repository / "launch" / args[0]), *args[1:]]

    def run(self, *args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*args),
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """The argv of each fake that was called, in order."""
        path = self.folder / "log"
        text = path.read_text() if path.exists() else ""
        return [call.strip("\0").split("\0") for call in text.split("\n\0") if call]

    def trained_with(self) -> list[str]:
        wait_for(self.folder / "argv.pid")
        return json.loads((self.folder / "argv").read_text())


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["tpu_vm.sh", "run", "x"], {"ZONE": "z"}, "TPU: must be set to the name of the TPU VM"),
        (["tpu_vm.sh", "run", "x"], {"TPU": "t"}, "ZONE: must be set to the zone of the TPU VM"),
        (["tpu_vm.sh"], {}, "launch/tpu_vm.sh run --config=experiments/unet_dice.py"),
        (["tpu_vm.sh", "run"], {"TPU": "t", "ZONE": "z"}, "launch/tpu_vm.sh run --config="),
        (["tpu_vm.sh", "rnu", "x"], {"TPU": "t", "ZONE": "z"}, "launch/tpu_vm.sh run --config="),
        (["xpk.sh", "list"], {}, "CLUSTER: must be set to the name of the GKE cluster"),
        *(
            (["xpk.sh", *args], {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z"}, "launch/xpk.sh stop")
            for args in (
                ["stop"],
                ["stop", ""],
                ["run", "", "--config=x"],
                ["run", "--config=x", "y"],
            )
        ),
        (["slurm.sbatch", "x"], {}, "SLURM_JOB_ID: is not set: start this with sbatch"),
        (["slurm.sbatch"], {"SLURM_JOB_ID": "1"}, "no arguments for dense_jax.main"),
        (["local.sh"], {}, "launch/local.sh 8 --config=experiments/unet_dice.py"),
        (["local.sh", "2"], {}, "launch/local.sh 8 --config=experiments/unet_dice.py"),
        (["local.sh", "0", "x"], {}, "launch/local.sh 8 --config=experiments/unet_dice.py"),
        (["local.sh", "--config=x", "x"], {}, "launch/local.sh 8 --config=experiments/"),
        (
            ["tpu_vm.sh", "run", "--workdir=runs/x"],
            {"TPU": "t", "ZONE": "z"},
            "--workdir must be gs://..., or a folder that all hosts share, absolute",
        ),
        (
            ["xpk.sh", "run", "name", "--workdir", "runs/x"],
            {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TPU_TYPE": "t"},
            "--workdir must be gs://..., or a folder that all pods share, absolute",
        ),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_called(world, args, env, message):
    for name in ("gcloud", "xpk", "srun", "python"):
        world.fake(name, "")
    result = world.run(*args, check=False, **env)
    assert result.returncode != 0
    assert message in result.stderr
    assert world.calls() == []


TPU = {"TPU": "my-tpu", "ZONE": "my-zone"}


def test_tpu_setup_ships_committed_files_only(world):
    world.fake("gcloud", GCLOUD)
    world.fake("python3", "")  # installing is not what is tested here
    (world.folder / "host/dense_jax").mkdir()
    (world.folder / "host/dense_jax/stale.txt").touch()
    result = world.run("tpu_vm.sh", "setup", **TPU)
    assert "only HEAD is shipped, not your edits" in result.stderr
    shipped = world.folder / "host" / "dense_jax"
    assert sorted(path.name for path in shipped.iterdir()) == ["committed.txt", "launch"]
    assert (shipped / "committed.txt").read_text() == "as committed"
    for call in (call for call in world.calls() if call[0] == "gcloud"):
        assert {"--zone=my-zone", "--worker=all"} <= set(call)
    installs = [call[1:] for call in world.calls() if call[0] == "python3"]
    assert installs[-1][:3] == ["-m", "uv", "pip"]
    assert installs[-1][-4:] == ["-r", "dense_jax/requirements.txt", "jax[tpu]", "gcsfs"]


def test_tpu_run_goes_to_the_background_and_stop_lets_it_save(world):
    world.fake("gcloud", GCLOUD)
    world.fake("python", PYTHON, "host/venv/bin")
    (world.folder / "host/dense_jax").mkdir()
    world.run("tpu_vm.sh", "run", *ARGS, **TPU, SECONDS_TO_TRAIN="60")
    assert world.trained_with() == ["-m", "dense_jax.main", "--multihost", *ARGS]
    pid = int((world.folder / "host/train.pid").read_text())

    again = world.run("tpu_vm.sh", "run", *ARGS, check=False, **TPU)
    assert again.returncode == 1
    assert "already training; launch/tpu_vm.sh stop first" in again.stderr
    setup = world.run("tpu_vm.sh", "setup", check=False, **TPU)
    assert setup.returncode == 1
    assert (world.folder / "host/dense_jax").exists()  # not removed under the run

    assert world.run("tpu_vm.sh", "stop", **TPU).stderr == ""
    assert not running(pid)


def test_tpu_stop_and_run_know_a_stranger_that_has_the_number_of_an_old_run(world):
    world.fake("gcloud", GCLOUD)
    world.fake("python", PYTHON, "host/venv/bin")
    (world.folder / "host/dense_jax").mkdir()
    assert world.run("tpu_vm.sh", "stop", **TPU).stderr == "not training\n"  # no run at all
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (world.folder / "host/train.pid").write_text(f"{stranger.pid}\n")
        assert world.run("tpu_vm.sh", "stop", **TPU).stderr == "not training\n"
        assert stranger.poll() is None
        world.run("tpu_vm.sh", "run", *ARGS, **TPU)
        assert world.trained_with()[-3:] == ARGS
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_a_new_file_that_is_not_shipped_is_said(world, script):
    for name in ("gcloud", "xpk"):
        world.fake(name, "")
    world.git("checkout", "--quiet", "committed.txt")
    args = ["setup"] if script == "tpu_vm.sh" else ["run", "name", *ARGS]
    result = world.run(script, *args, **TPU | XPK)
    assert "only HEAD is shipped, not your edits" in result.stderr


def running(pid: int) -> bool:
    try:  # an orphan may stay a zombie where no init reaps it
        return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_tpu_logs_are_those_of_one_host(world):
    world.fake("gcloud", "")
    world.run("tpu_vm.sh", "logs", **TPU)
    world.run("tpu_vm.sh", "logs", **TPU, WORKER="3")
    assert ["--worker=0" in call for call in world.calls()] == [True, False]
    assert "--worker=3" in world.calls()[1]


XPK = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TPU_TYPE": "v5litepod-16"}
SHIP = 'for a in "$@"; do case $a in --script-dir=*) cp -r "${a#*=}" "$HOST/shipped" ;; esac; done'


def test_xpk_ships_committed_files_and_restarts_after_preemption_only(world):
    world.fake("xpk", SHIP)
    world.run("xpk.sh", "run", "my-job", *ARGS, **XPK)
    (call,) = world.calls()
    assert call[1:3] == ["workload", "create"]
    expected = {"--cluster=c", "--project=p", "--zone=z", "--workload=my-job"}
    expected |= {"--tpu-type=v5litepod-16", "--num-slices=1", "--restart-on-exit-codes=75"}
    assert expected <= set(call)
    shipped = world.folder / "host/shipped"
    assert sorted(path.name for path in shipped.iterdir()) == ["committed.txt", "launch"]
    assert (shipped / "committed.txt").read_text() == "as committed"
    script_dir = next(arg for arg in call if arg.startswith("--script-dir=")).split("=", 1)[1]
    assert not pathlib.Path(script_dir).exists()  # cleaned up

    # What xpk makes of the command: a line in the shell of a pod.
    world.fake("pip", "")
    world.fake("python", PYTHON)
    command = call[-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", f"({command}) & wait $!"], env=world.env, check=True)
    assert world.trained_with() == ["-m", "dense_jax.main", "--multihost", *ARGS]
    extras = ["jax[tpu]", "gcsfs"]
    assert world.calls()[-1] == ["pip", "install", "-q", "-r", "requirements.txt", *extras]


def test_xpk_stop_deletes_that_workload_only(world):
    world.fake("xpk", "")
    world.run("xpk.sh", "stop", "my-job", **XPK)
    where = ["--cluster=c", "--project=p", "--zone=z"]
    assert world.calls() == [["xpk", "workload", "delete", *where, "--workload=my-job"]]


def test_slurm_starts_the_trainer_and_passes_its_exit_code_on(world):
    world.fake("srun", 'exec "$@"')
    world.fake("scontrol", "")
    world.fake("python", PYTHON)
    result = world.run("slurm.sbatch", *ARGS, SLURM_JOB_ID="7", CODE="75", check=False)
    assert result.returncode == 75
    assert world.trained_with() == ["-m", "dense_jax.main", "--multihost", *ARGS]
    # 75 without the time limit's USR1 is an scancel: the user wants it gone.
    assert [call[0] for call in world.calls()] == ["srun"]


def test_slurm_array_index_is_the_sweep_index(world):
    world.fake("srun", 'exec "$@"')
    world.fake("python", PYTHON)
    world.run("slurm.sbatch", *ARGS, SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert world.trained_with() == ["-m", "dense_jax.sweep", "--multihost", "--index=3", *ARGS]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({}, "7"),
        # 7 alone would be the whole array.
        ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
    ],
    ids=["job", "array"],
)
def test_slurm_saves_and_requeues_when_time_runs_out(world, task, name):
    world.fake("srun", 'exec "$@"')
    world.fake("scontrol", "")
    world.fake("scancel", 'kill -TERM "$(cat "$ARGV.pid")"')  # to the tasks, as Slurm does
    world.fake("python", PYTHON)
    env = world.env | task | {"SLURM_JOB_ID": "7", "SECONDS_TO_TRAIN": "60"}
    job = subprocess.Popen(world.command("slurm.sbatch", *ARGS), env=env)
    world.trained_with()
    job.send_signal(signal.SIGUSR1)  # to the shell alone: --signal=B:USR1
    assert job.wait(timeout=60) == 75
    assert world.calls()[1:] == [["scancel", "--signal=TERM", name], ["scontrol", "requeue", name]]


def test_slurm_tasks_get_the_processors_that_sbatch_was_asked_for(world):
    world.fake("srun", 'echo "$SRUN_CPUS_PER_TASK"')
    result = world.run("slurm.sbatch", *ARGS, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8")
    assert result.stdout == "8\n"


def test_slurm_tasks_find_each_other(world):
    world.fake("srun", SRUN)
    world.fake("python", PEER)
    result = world.run("slurm.sbatch", "--multihost", **two_tasks())
    assert result.stdout.count("2 processes, sum 3\n") == 2


@pytest.mark.parametrize("failing", ["0", "1"])
def test_no_process_waits_for_one_that_failed(world, failing):
    world.fake("srun", SRUN)  # which leaves that to us
    world.fake("python", PEER)
    env = two_tasks() | {"FAILS": failing, "TIMEOUT": "3"}
    result = world.run("slurm.sbatch", "--multihost", check=False, **env)
    assert result.returncode not in (0, 75)
    assert "sum" not in result.stdout


def two_tasks() -> dict[str, str]:
    """What sbatch sets, with a job whose port, which JAX makes of the number, is free."""
    job = next(number for number in range(os.getpid() % 4096, 4096) if is_free(61440 + number))
    return {"SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "JAX_PLATFORMS": "cpu"}


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::", port))
        except OSError:
            return False
    return True


def test_local_processes_find_each_other_and_say_which_they_are(world):
    world.fake("python", PEER)
    result = world.run("local.sh", "2", "--multihost", JAX_PLATFORMS="cpu")
    assert {f"[{k}] 2 processes, sum 3" for k in range(2)} <= set(result.stdout.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_local_signals_reach_all_processes_which_save(world, number):
    world.fake("python", LOCAL)
    job = subprocess.Popen(
        world.command("local.sh", "2", *ARGS),
        env=world.env | {"SECONDS_TO_TRAIN": "60"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    for k in range(2):
        wait_for(world.folder / f"argv{k}.pid")
        argv = json.loads((world.folder / f"argv{k}").read_text())
        assert argv[:2] == ["-m", "dense_jax.main"]
        assert argv[3:] == ["--num_processes=2", f"--process_id={k}", *ARGS]
    if number == signal.SIGTERM:
        job.send_signal(number)
    else:
        os.killpg(job.pid, number)  # as a terminal does
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 75
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_local_ends_the_others_when_one_fails(world):
    world.fake("python", LOCAL)
    result = world.run("local.sh", "2", *ARGS, SECONDS_TO_TRAIN="600", FAILS="1", check=False)
    assert result.returncode == 3
    assert not running(int((world.folder / "argv0.pid").read_text()))
