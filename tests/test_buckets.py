"""Tests runs, data and locks in a bucket, which a server on this machine holds."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax import buckets, command, data, evaluate, export, predict, storage, train
from dense_jax.inference.predictor import load
from dense_jax.report.__main__ import NOT_READ, write
from dense_jax.workdir import checkpoint, files
from tests.bucket_server import BucketServer
from tests.devices.test_multihost import free_port
from tests.test_train import (
    Killed,
    assert_same_run,
    finished,  # noqa: F401
    interrupt,
    kill,
    make_config,
)

pytestmark = pytest.mark.usefixtures("unchecked_shapes")  # for the export

RUN = epath.Path("gs://bucket/run")


@pytest.fixture(scope="module")
def server():
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module)
    with BucketServer() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def root(server, tiny_folder):
    """The tiny dataset, in a bucket."""
    for file in sorted(tiny_folder.rglob("*.*")):
        buckets.write(f"gs://bucket/tiny/{file.relative_to(tiny_folder)}", file.read_bytes())
    return "gs://bucket/tiny"


@pytest.fixture(scope="module")
def run(root, tiny_folder, shared_programs):
    """A run in a bucket that was killed after step 3, and resumed."""
    config = make_config(root)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(config, str(RUN))
    assert not (RUN / "result.json").exists()
    train.train(config, str(RUN))
    return RUN


def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk(run, finished, capsys):  # noqa: F811
    assert_same_run(run, finished)
    folders = ({path.name for path in folder.iterdir()} for folder in (run, finished))
    assert next(folders) == next(folders)
    assert not (run / "checkpoints" / "lock").exists()
    # Two starts, each with a file of its own, which TensorBoard joins.
    assert len([*(run / "tensorboard").iterdir()]) in (1, 2)
    train.train(make_config("gs://bucket/tiny"), str(run))
    assert f"{run} is finished" in capsys.readouterr().out


def test_it_is_evaluated_and_reported(run, finished, tmp_path):  # noqa: F811
    expected = evaluate.evaluate(str(finished), "test", output=str(tmp_path))
    evaluation = evaluate.evaluate(str(run), "test")
    assert evaluation.pop("root") == "gs://bucket/tiny" != expected.pop("root")
    assert storage.to_json(evaluation) == storage.to_json(expected)
    picture = (tmp_path / "evaluation_test.png").read_bytes()
    assert (run / "evaluation_test.png").read_bytes() == picture
    with storage.working_copy(str(run), NOT_READ) as copy:
        assert not (copy / "checkpoints").exists()
        paths = write(copy, split="val", url=str(run))
    for path in paths:
        assert (run / path.relative_to(copy)).exists()
    # The only run is not evaluated on this split, and its row says how to do that.
    assert f"--workdir={run}" in (run / "report.md").read_text()


def test_it_is_exported_and_predicts(run, root, tmp_path):
    export.export(str(run), f"{run}.zip")
    images, outputs = (root + "/images/test", root + "/images/test/*.png"), {}
    for network, argument in zip((str(run), f"{run}.zip"), images, strict=True):
        with storage.working_copy(f"gs://bucket/predicted/{len(outputs)}") as output:
            assert predict.predict(network, argument, output) == []
        folder = epath.Path(f"gs://bucket/predicted/{len(outputs)}")
        outputs[network] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(outputs[str(run)]) == 2 * 5 + 1
    first, second = outputs.values()
    assert first == second
    with (
        pytest.raises(ValueError, match="10 results do"),
        storage.working_copy("gs://bucket/predicted/0") as output,
    ):
        predict.predict(str(run), images[0], output)
    assert load(run).class_names == ("dark", "bright")


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(server):
    saved = checkpoint.Checkpoints("gs://bucket/damaged/latest", 2)
    for step in (1, 2):
        saved.save(step, {"a": jax.numpy.arange(3.0) + step})
    saved.wait()
    (saved.directory / "2" / "about" / "metadata").unlink()
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"a": jax.ShapeDtypeStruct((3,), "float32", sharding=whole)}
    np.testing.assert_array_equal(saved.restore_latest(like)["a"], [1, 2, 3])
    assert saved.steps == [1]
    assert (epath.Path("gs://bucket/damaged/latest.unreadable/2/default")).is_dir()
    saved.close()


SAVER = """
import sys
import jax
from dense_jax.devices import mesh
from dense_jax.workdir.checkpoint import Checkpoints

address, process, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
whole = mesh.replicated(mesh.make_mesh())
state = {"a": jax.jit(lambda: jax.numpy.arange(3.0), out_shardings=whole)()}
saved = Checkpoints(path)
saved.save(1, state)
saved.close()
shapes = {"a": jax.ShapeDtypeStruct((3,), "float32", sharding=whole)}
saved = Checkpoints(path)
assert saved.restore_latest(shapes)["a"].tolist() == [0, 1, 2]
saved.close()
"""


def test_two_processes_save_in_a_bucket(server):
    address, path = f"localhost:{free_port()}", "gs://bucket/shared/latest"
    savers = [
        subprocess.Popen([sys.executable, "-c", SAVER, address, str(k), path]) for k in range(2)
    ]
    assert [saver.wait() for saver in savers] == [0, 0]


def test_a_local_copy_follows_the_bucket(root, tiny_folder):
    copy = storage.local_copy(root)
    same = data.open_dataset("folder", root, "test")
    assert same.fingerprint == data.open_dataset("folder", str(tiny_folder), "test").fingerprint
    assert storage.local_copy(str(tiny_folder)) == str(tiny_folder)
    for name in ("a/b.txt", "a/c.txt", "d/e.txt"):
        buckets.write(f"gs://bucket/copied/{name}", name.encode())
    copy = epath.Path(storage.local_copy("gs://bucket/copied/"))
    numbers = {name: os.stat(copy / name).st_ino for name in ("a/b.txt", "a/c.txt")}
    buckets.write("gs://bucket/copied/a/b.txt", b"")
    epath.Path("gs://bucket/copied/d/e.txt").unlink()
    storage.local_copy("gs://bucket/copied")
    assert (copy / "a/b.txt").read_bytes() == b"" and (copy / "a/c.txt").read_text() == "a/c.txt"
    assert not (copy / "d/e.txt").exists()
    assert os.stat(copy / "a/c.txt").st_ino == numbers["a/c.txt"]  # not copied again
    assert os.stat(copy / "a/b.txt").st_ino != numbers["a/b.txt"]
    shutil.rmtree(copy)
    storage.local_copy("gs://bucket/copied", within="a")
    assert {path.name for path in copy.iterdir()} == {"a"}
    with pytest.raises(ValueError, match="there is nothing in gs://bucket/copied/b"):
        storage.local_copy("gs://bucket/copied", within="b")


def test_a_log_in_a_bucket_grows_and_a_file_is_whole_or_absent(server):
    for line in (b"one\n", b"two\n"):
        with storage.appending(epath.Path("gs://bucket/log.txt")) as file:
            file.write(line)
    assert epath.Path("gs://bucket/log.txt").read_text() == "one\ntwo\n"
    with pytest.raises(ZeroDivisionError), storage.atomic("gs://bucket/half") as file:
        file.write(b"half")
        _ = 1 / 0
    assert not epath.Path("gs://bucket/half").exists()


@pytest.fixture
def workdir(server, request, monkeypatch):
    """An empty workdir in the bucket, whose lock is stale after 3 s."""
    monkeypatch.setattr(buckets, "STALE", 3)
    monkeypatch.setattr(buckets, "REFRESH", 0.05)
    yield epath.Path(f"gs://bucket/{request.node.name}")


def be_on(monkeypatch, host):
    monkeypatch.setattr(buckets.socket, "gethostname", lambda: host)


def test_a_workdir_in_a_bucket_is_one_process_s(workdir, monkeypatch):
    files.lock(workdir)
    files.lock(workdir)  # a second time from one process: a notebook goes on
    held = workdir / "checkpoints" / "lock"
    for host in (buckets.socket.gethostname(), "other"):
        be_on(monkeypatch, host)
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on "):
            buckets.Lock(held)
    files.check_lock(workdir)
    files.unlock(workdir)
    assert not held.exists()


def test_the_lock_of_a_host_that_is_gone_becomes_stale(workdir, monkeypatch):
    monkeypatch.setattr(buckets, "STALE", 0.3)
    monkeypatch.setattr(buckets, "REFRESH", 1000)  # as if this process stood still
    files.lock(workdir)
    be_on(monkeypatch, "other")
    start = time.monotonic()
    new = buckets.Lock(workdir / "checkpoints" / "lock")
    assert time.monotonic() - start >= 0.3
    files.check_lock(workdir)
    files._LOCKS[workdir]._refresh()  # it goes on
    with pytest.raises(OSError, match=r"taken over by process \d+ on other"):
        files.check_lock(workdir)
    files.unlock(workdir)
    assert (workdir / "checkpoints" / "lock").exists()  # it is not that of the old holder
    new.check()
    new.release()
    assert not (workdir / "checkpoints" / "lock").exists()


@pytest.mark.parametrize("process", [os.getpid(), 2**22 + 1], ids=["number_reused", "gone"])
def test_a_killed_process_s_own_lock_does_not_block_its_restart(workdir, monkeypatch, process):
    monkeypatch.setattr(buckets, "STALE", 60)
    holder = {"holder": "x", "host": buckets.socket.gethostname(), "process": process}
    storage.write_json(workdir / "checkpoints" / "lock", holder | {"started": "1", "id": "x"})
    start = time.monotonic()
    buckets.Lock(workdir / "checkpoints" / "lock").release()
    assert time.monotonic() - start < 30


def test_of_many_that_take_a_stale_lock_one_gets_it(workdir):
    holder = {"holder": "x", "host": "gone", "process": 1, "started": "1", "id": "x"}
    storage.write_json(workdir / "checkpoints" / "lock", holder)

    def take(_):
        try:
            return buckets.Lock(workdir / "checkpoints" / "lock")
        except ValueError:
            return None

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        (held,) = filter(None, pool.map(take, range(3)))
    assert json.loads((workdir / "checkpoints" / "lock").read_bytes())["id"] == held._id
    held.release()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://no-bucket/run", "there is no bucket gs://no-bucket$"),
        ("gs://forbidden/run", "no permission for gs://forbidden .someone does not have .*roles"),
        ("gs://read-only/run", "no permission for gs://read-only .*roles"),
        ("gs://bucket/", "is a whole bucket: name a folder in it"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_line(server, url, message):
    with pytest.raises(ValueError, match=message) as caught:
        files.check_path(url)
    assert "\n" not in str(caught.value)


def test_data_is_read_where_nothing_may_be_written(server):
    buckets.check("gs://read-only/data", "data")


def test_without_credentials_it_says_how_to_log_in(server, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    with pytest.raises(ValueError, match="no credentials for gs://private: run `gcloud auth"):
        buckets.check("gs://private/run", "run")


def test_a_bucket_that_does_not_answer_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE", 0.1)
    monkeypatch.setattr(buckets, "_ask", lambda *_: time.sleep(1))
    with pytest.raises(ValueError, match=r"gs://asleep does not answer within 0.1 s"):
        buckets.check("gs://asleep/run", "run")


def test_without_gcsfs_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="needs gcsfs: pip install"):
        buckets.check("gs://any/run", "run")


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://B/run", "gs:///run", "gs://a"])
def test_another_store_is_refused(url):
    with pytest.raises(ValueError, match=r"is neither a folder nor gs://BUCKET/FOLDER"):
        buckets.check(url, "run")


def test_a_flag_for_local_files_refuses_a_bucket():
    with pytest.raises(ValueError, match="must be on a local disk, not in a bucket"):
        command.parse_folder("gs://bucket/data")
