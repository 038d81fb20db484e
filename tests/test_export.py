"""An exported file gives what the network in its workdir does, to the last bit, and needs no Flax."""

import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jaxtyping
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax import export, exported, load, predict, train, workdir
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.run import assemble
from experiments import base
from tests.conftest import REPOSITORY

NUM_CLASSES = 3
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _unchecked_shapes():
    """Annotations like "h/2" are compared with numbers; here they would meet symbols."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A workdir trained for one step, whose tiles are smaller than its images."""
    path = tmp_path_factory.mktemp("run")
    config = base.get_config()
    config.num_steps = 1
    config.batch_size = 4
    config.model.widths = (2, 3)
    config.data.name = "folder"
    config.data.root = str(tiny_folder)
    config.data.crop_size = (8, 8)
    config.eval.tile_size = (16, 12)
    config.eval.margin = 2
    config.eval.num_pictures = 0
    train.train(config, str(path))
    return path


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.zip"
    export.export(str(run), path)
    return path


def assembled(**fields):
    """A config's run and random weights of its model."""
    config = base.get_config()
    config.model.widths = (2, 3)
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    if config.model.encoder != "plain":
        config.model.width_multiplier = 1 / 64
    made = assemble(config, NUM_CLASSES, 3)
    shapes = traverse_util.flatten_dict(made.shapes().variables(), sep="/")
    # Positive, for there are variances.
    return made, {
        name: RNG.uniform(0.1, 0.5, x.shape).astype(x.dtype) for name, x in shapes.items()
    }


def images(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    "fields",
    [
        *({"model.upsampling": name} for name in UPSAMPLERS),
        *({"model.encoder": name} for name in ENCODERS if name != "plain"),
        *({"model.name": "fcn", "model.encoder": name} for name in ENCODERS),
        {"model.norm": "group", "model.fusion": "add", "model.decoder_conv": "depthwise"},
        {"model.bottleneck": False},
    ],
    ids=str,
)
def test_every_part_exports_for_any_number_and_size_of_images(fields):
    made, weights = assembled(**fields)
    (logits,) = export.trace(made, weights, 3).out_avals
    assert str(logits) == f"float32[b,h,w,{NUM_CLASSES}]"


@pytest.mark.parametrize(
    "fields",
    [
        {"model.norm": "group"},
        {"model.dtype": "bfloat16", "model.upsampling": "max_unpool"},
        {"data.resolution": 0.6, "model.upsampling": "bilinear"},
        {"data.resolution": 1.5, "model.padding": "VALID"},
        {"model.padding": "VALID"},
        {"model.name": "fcn", "model.encoder": "alexnet"},
        {"model.encoder": "resnet18", "model.normalisation": "imagenet"},
    ],
    ids=str,
)
def test_the_program_is_the_network_to_the_last_bit(fields):
    made, weights = assembled(**fields)
    variables = traverse_util.unflatten_dict(weights, sep="/")
    program = jax.export.deserialize(bytearray(export.trace(made, weights, 3).serialize()))
    live, reread = jax.jit(made.logits_step), jax.jit(program.call)
    least = 2 * made.context
    for height, width in ((1, 1), (7, 34)):
        two = images(2, least + height, least + width, 3)
        for image, logits in zip(two, reread(weights, two), strict=True):
            expected = np.asarray(live(variables, image))
            assert np.ptp(expected) > 0
            np.testing.assert_array_equal(logits, expected)


def test_weights_are_no_part_of_the_program():
    made, weights = assembled(**{"model.widths": (64, 96)})
    size_of_weights = sum(array.nbytes for array in weights.values())
    assert len(export.trace(made, weights, 3).serialize()) < size_of_weights / 10


@pytest.mark.parametrize("size", [(1, 1), (16, 12), (23, 41)], ids=str)
def test_a_file_predicts_what_its_workdir_does(run, file, size):
    of_run, of_file = load(run), load(file)
    image = images(*size, 1)
    np.testing.assert_array_equal(of_file(image), of_run(image))
    assert of_file.class_names == of_run.class_names == ("dark", "bright")
    np.testing.assert_array_equal(of_file.palette, of_run.palette)
    for field in ("num_channels", "value_range", "tile_size", "margin", "context", "batch_size"):
        assert getattr(of_file, field) == getattr(of_run, field)
    assert load(file, "1").class_names == of_run.class_names
    with pytest.raises(ValueError, match=r"'latest' in .*model.zip: it was exported at step 1"):
        load(file, "latest")


def test_predict_takes_a_file(run, file, tiny_folder, tmp_path):
    pattern = str(tiny_folder / "images/test/*.png")
    for path, output in ((run, "run"), (file, "file")):
        assert predict.predict(str(path), pattern, tmp_path / output) == []
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert len(names) == 11  # and the legend
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


def run_without(modules, code, folder):
    """Runs Python where these modules cannot be imported, and gives the labels it saves."""
    code = f"import sys; sys.modules |= dict.fromkeys({modules!r})\n{code}\nnp.save('labels.npy', labels)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return np.load(folder / "labels.npy")


def test_loading_needs_neither_flax_nor_the_models_code(file, run, tmp_path):
    image = images(9, 31, 1)
    np.save(tmp_path / "image.npy", image)
    code = f"""
import numpy as np
from dense_jax import load
labels = load({str(file)!r})(np.load("image.npy"))
"""
    ours = [
        f"dense_jax.{room}" for room in ("models", "run", "train", "steps", "losses", "normalise")
    ]
    labels = run_without(["flax", "optax", "orbax", *ours], code, tmp_path)
    np.testing.assert_array_equal(labels, load(run)(image))


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """A folder with what docs/export.md speaks of, and its blocks of Python."""
    folder = tmp_path_factory.mktemp("documented")
    config = base.get_config()
    config.num_steps = 1
    config.model.widths = (2, 3)
    config.data.crop_size = (8, 8)
    config.eval.num_pictures = 0
    path = folder / "runs" / "unet_dice"
    train.train(config, str(path))
    export.export(str(path), folder / "unet_dice.zip")
    Image.fromarray(images(64, 64, 3)).save(folder / "photo.jpg")  # smaller than the run's images
    page = (REPOSITORY / "docs" / "export.md").read_text()
    return folder, re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_documented_code_runs_without_this_package(documented):
    folder, (_, code, _) = documented
    labels = run_without(["flax", "dense_jax"], code, folder)
    image = np.array(Image.open(folder / "photo.jpg"))
    predictor = load(folder / "runs/unet_dice").using(tile_size=image.shape[:2], margin=0)
    np.testing.assert_array_equal(labels, predictor(image))


def test_the_documented_conversion_gives_the_same_labels(documented):
    pytest.importorskip("jax2onnx")
    folder, (_, _, code) = documented
    code += """
import numpy as np
import onnxruntime
from PIL import Image
model = onnxruntime.InferenceSession("unet_dice.onnx")
(logits,) = model.run(["logits"], {"image": np.array(Image.open("photo.jpg"))})
labels = logits.argmax(axis=-1)
"""
    labels = run_without([], code, folder)
    image = np.array(Image.open(folder / "photo.jpg"))
    predictor = load(folder / "runs/unet_dice").using(tile_size=image.shape[:2], margin=0)
    np.testing.assert_array_equal(labels, predictor(image))


def test_the_file_says_what_it_is(run, file):
    with zipfile.ZipFile(file) as archive:
        about = json.loads(archive.read("model.json"))
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    assert about["dataset"] == workdir.read(run, "dataset.json")
    assert about["config"] == workdir.read(run, "config.json")
    assert about["trained_with"]["versions"]["jax"] == about["exported_with"]["versions"]["jax"]
    assert (about["step"], about["normalisation"], about["context"]) == (1, "unit", 0)
    assert about["licence"].startswith("not stated") and "folder" in about["licence"]


def test_nothing_is_overwritten_unless_told(run, tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.zip"
    about = export.export(str(run), path, licence="CC0")
    assert about["licence"] == "CC0"
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"model.zip exists: pass --overwrite"):
        export.export("no workdir", path)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(zipfile.ZipFile, "writestr", full)
        export.export(str(run), path, overwrite=True)
    assert path.read_bytes() == written
    export.export(str(run), path, licence="CC BY", overwrite=True)
    assert exported.read(path).about["licence"] == "CC BY"


def test_a_folder_of_seeds_is_refused_by_name(run, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").mkdir()
    for act in (lambda: export.export(str(tmp_path), tmp_path / "a.zip"), lambda: load(tmp_path)):
        with pytest.raises(
            ValueError, match=r"several seeds: name one of them, .*seed=0, .*seed=1"
        ):
            act()


def rewritten(file, path, **changes):
    """A copy of an exported file with other values in its model.json."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "model.json":
                content = json.dumps(json.loads(content) | changes)
            new.writestr(name, content)


def test_what_is_no_exported_file_is_said(file, tmp_path):
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"params/") + 2000] ^= 1
    for content in (b"", b"text", whole[:-100], whole[: len(whole) // 2], flipped):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.zip is damaged, or no file of dense_jax.export"):
            load(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("00000_a.png", b"")
    rewritten(file, tmp_path / "another.zip", format="something else")
    for name in ("other.zip", "another.zip"):
        with pytest.raises(ValueError, match="damaged, or no file"):
            load(tmp_path / name)
    rewritten(file, tmp_path / "newer.zip", format_version=2)
    with pytest.raises(ValueError, match=r"has version 2 .* reads up to 1: use a newer"):
        load(tmp_path / "newer.zip")
    with pytest.raises(ValueError, match="nowhere does not exist: it must be a workdir or a file"):
        load(tmp_path / "nowhere")
