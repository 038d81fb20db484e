"""Tests that seeds trained together give the same runs as seeds trained separately."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dense_jax import evaluate, storage, train
from dense_jax.devices import mesh
from dense_jax.workdir import files
from dense_jax.workdir.record import RunRecord
from tests.conftest import mesh_of
from tests.test_train import Killed, assert_same_run, interrupt, kill, make_config, saved

pytestmark = pytest.mark.usefixtures("shared_programs")


def make_job(tiny_folder, num_seeds):
    config = make_config(tiny_folder)
    config.seed, config.num_seeds = 3, num_seeds
    return config


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_folder):
    """Two seeds, two devices each. (The README has four, a device each.)"""
    path = tmp_path_factory.mktemp("job")
    train.train(make_job(tiny_folder, 2), str(path))
    return path


def test_a_seed_is_as_if_alone(job, tiny_folder, tmp_path, monkeypatch):
    """To float tolerance: XLA orders some sums of one program otherwise than of the other."""
    config = make_job(tiny_folder, 1)
    config.seed = 4
    devices = mesh_of(jax.device_count() // 2)
    monkeypatch.setattr(mesh, "make_mesh", lambda *_: devices)
    train.train(config, str(tmp_path / "alone"))
    there, alone = job / "seed=4", tmp_path / "alone"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), saved(there), saved(alone)
    )
    ours, theirs = (files.read_records(run / "metrics.jsonl") for run in (there, alone))
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-4)
    assert files.read(there, "config.json") == files.read(alone, "config.json")


def test_seeds_differ_and_are_runs_like_any_other(job, tiny_folder):
    finals = [files.read(job / f"seed={k}", "result.json")["final"] for k in (3, 4)]
    assert finals[0] != finals[1]
    scores = evaluate.evaluate(str(job / "seed=4"), checkpoint="latest", boundaries=False)
    assert scores["eval/mean_iou"] == finals[1]["eval/mean_iou"]


def test_a_finished_job_says_so(job, tiny_folder, capsys):
    train.train(make_job(tiny_folder, 2), str(job))
    assert capsys.readouterr().out.count("is finished") == 2


def test_killed_and_started_again_ends_bitwise_the_same(job, tiny_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(make_job(tiny_folder, 2), str(tmp_path))
    train.train(make_job(tiny_folder, 2), str(tmp_path))
    for seed in (3, 4):
        assert_same_run(tmp_path / f"seed={seed}", job / f"seed={seed}")


@pytest.mark.parametrize("step", [2, 6])
def test_killed_while_some_have_saved(job, tiny_folder, tmp_path, monkeypatch, step):
    """All go on from the step that all have: for the first save, from the start."""
    save = RunRecord.save
    with monkeypatch.context() as patch:

        def save_or_die(self, at, state):
            if at == step and self.config.seed == 4:
                kill()
            save(self, at, state)

        patch.setattr(RunRecord, "save", save_or_die)
        with pytest.raises(Killed):
            train.train(make_job(tiny_folder, 2), str(tmp_path))
    train.train(make_job(tiny_folder, 2), str(tmp_path))
    for seed in (3, 4):
        assert_same_run(tmp_path / f"seed={seed}", job / f"seed={seed}")


def test_one_that_has_gone_on_alone_is_not_thrown_back(job, tiny_folder, tmp_path):
    shutil.copytree(job / "seed=3", tmp_path / "seed=3")
    with pytest.raises(ValueError, match=r"seed=3 was begun without .*seed=4"):
        train.train(make_job(tiny_folder, 2), str(tmp_path))


def test_a_finished_seed_is_not_thrown_back(job, tiny_folder, tmp_path):
    """One of its two checkpoints is where the others are."""
    shutil.copytree(job, tmp_path, dirs_exist_ok=True)
    (tmp_path / "seed=4" / "result.json").unlink()
    shutil.rmtree(tmp_path / "seed=4" / "checkpoints" / "latest" / "6")
    with pytest.raises(
        ValueError, match=r"seed=3 is at step 6, but another seed at 4.*--config.seed=3"
    ):
        train.train(make_job(tiny_folder, 2), str(tmp_path))
    assert [*(tmp_path / "seed=3" / "checkpoints" / "latest").glob("6")]


def test_the_workdir_of_a_job_is_not_one_of_a_run(job, tiny_folder):
    with pytest.raises(ValueError, match="has the workdirs of several seeds"):
        train.train(make_job(tiny_folder, 1), str(job))


def test_the_workdir_of_a_run_is_not_one_of_a_job(tiny_folder, tmp_path):
    storage.write_json(tmp_path / "config.json", make_job(tiny_folder, 1).to_dict())
    with pytest.raises(ValueError, match="is the workdir of one run"):
        train.train(make_job(tiny_folder, 2), str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_seeds": 3}, "num_seeds=3 cannot share 4 devices"),
        ({"num_seeds": 0}, "num_seeds=0 must be in"),
        ({"num_seeds": 2, "batch_size": 3}, "number of devices, 2, for each of num_seeds=2"),
    ],
)
def test_seeds_must_share_the_devices_evenly(tiny_folder, tmp_path, fields, message):
    config: ConfigDict = make_job(tiny_folder, 1)
    config.update(fields)
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_seed_that_is_not_finite_stops_all_and_is_named(tiny_folder, tmp_path):
    config = make_job(tiny_folder, 2)
    config.optimizer.learning_rate = 1e38
    config.optimizer.grad_clip_norm = 0.0
    with pytest.raises(FloatingPointError, match=r"is not finite in .*seed="):
        train.train(config, str(tmp_path))
