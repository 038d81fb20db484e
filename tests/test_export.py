"""Tests that an exported file predicts bitwise the same as its workdir, without Flax."""

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors import numpy as safetensors

import dense_jax.inference
from dense_jax import export, load, predict, train, trained
from dense_jax.inference import exported
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.program import assemble
from dense_jax.training.initial import initial_weights
from dense_jax.workdir import files
from experiments import base
from tests.conftest import AS_USUAL, REPOSITORY
from tests.models import FAMILIES, has

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
NUM_CLASSES = 3
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir trained for one step, whose tiles are smaller than its images.

    It has the path, and there will be the file, that docs/export.md speaks of.
    """
    path = tmp_path_factory.mktemp("documented") / "runs" / "unet_dice"
    config = base.get_config()
    config.num_steps = 1
    config.batch_size = 4
    config.model.widths = (2, 3)
    with config.ignore_type():
        config.model.auxiliary.update(strides=(2,), weights=(0.4,))
    config.data.crop_size = (8, 8)
    config.eval.tile_size = (32, 40)
    config.eval.margin = 2
    config.eval.num_pictures = 0
    train.train(config, str(path))
    return path


@pytest.fixture(scope="module")
def file(run):
    path = run.parents[1] / "unet_dice.zip"
    export.export(str(run), path)
    return path


def assembled(**fields):
    """The program of a config, and random weights of its model."""
    config = base.get_config()
    config.model.widths = (2, 3)
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    if has(ENCODERS[config.model.encoder].make, "width_multiplier"):
        config.model.width_multiplier = 1 / 64
    made = assemble(config, NUM_CLASSES)
    shapes = traverse_util.flatten_dict(made.variables(3), sep="/")
    # Positive, because there are variances.
    return made, {
        name: RNG.uniform(0.1, 0.5, x.shape).astype(x.dtype) for name, x in shapes.items()
    }


def images(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    "fields",
    [
        *({"model.upsampling": name} for name in UPSAMPLERS),
        *({"model.encoder": name} for name in FAMILIES if name != "plain"),
        {"model.name": "fcn", "model.encoder": "alexnet"},
        *({"model.name": name, "model.skips": (1,)} for name in DECODERS),
        {"model.norm": "group", "model.fusion": "add", "model.decoder_conv": "depthwise"},
        {"model.bottleneck": False},
        {"model.fusion": "gated"},
    ],
    ids=str,
)
def test_every_part_exports_for_any_number_and_size_of_images(fields):
    made, weights = assembled(**fields)
    (logits,) = export.trace(made, weights, 3).out_avals
    assert str(logits) == f"float32[b,h,w,{NUM_CLASSES}]"


# Sizes: beyond the context that a network without padding needs.
SMALLEST, LONG = (1, 1), (7, 34)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"model.norm": "group"}, [SMALLEST, LONG]),
        ({"model.dtype": "bfloat16", "model.upsampling": "max_unpool"}, [LONG]),
        ({"data.resolution": 0.6, "model.upsampling": "bilinear"}, [SMALLEST]),
        ({"data.resolution": 1.5, "model.padding": "VALID"}, [LONG]),
        ({"model.padding": "VALID"}, [SMALLEST, LONG]),
        ({"model.name": "fcn", "model.encoder": "alexnet"}, [LONG]),
        ({"model.encoder": "resnet18", "model.normalization": "imagenet"}, [LONG]),
    ],
    ids=str,
)
def test_the_program_is_the_network_to_the_last_bit(fields, sizes):
    made, weights = assembled(**fields)
    variables = traverse_util.unflatten_dict(weights, sep="/")
    program = jax.export.deserialize(bytearray(export.trace(made, weights, 3).serialize()))
    jit = functools.partial(jax.jit, compiler_options=AS_USUAL)
    live, reread = jit(made.logits_step), jit(program.call)
    least = 2 * made.context
    for height, width in sizes:
        two = images(2, least + height, least + width, 3)
        for image, logits in zip(two, reread(weights, two), strict=True):
            expected = np.asarray(live(variables, image))
            assert np.ptp(expected) > 0
            np.testing.assert_array_equal(logits, expected)


def test_auxiliary_heads_are_not_exported(file):
    weights = safetensors.load(members_of(file)["weights.safetensors"])
    assert {name.split("/")[1] for name in weights} == {"encoder", "decoder"}


def test_weights_are_no_part_of_the_program():
    made, weights = assembled(**{"model.widths": (64, 96)})
    size_of_weights = sum(array.nbytes for array in weights.values())
    assert len(export.trace(made, weights, 3).serialize()) < size_of_weights / 10


@pytest.mark.parametrize("size", [(1, 1), (32, 40), (70, 81)], ids=str)
def test_a_file_predicts_what_its_workdir_does(run, file, size):
    from_run, from_file = load(run), load(file)
    image = images(*size, 3)
    np.testing.assert_array_equal(from_file(image), from_run(image))
    np.testing.assert_array_equal(from_file.palette, from_run.palette)
    for field in (
        *("class_names", "num_channels", "dtype", "value_range", "ladder"),
        *("tile_size", "margin", "context", "batch_size"),
    ):
        assert getattr(from_file, field) == getattr(from_run, field)


def test_a_file_has_one_checkpoint(run, file):
    assert load(file, "1").class_names == load(run).class_names
    with pytest.raises(ValueError, match=r"'latest' in .*unet_dice.zip: it was exported at step 1"):
        load(file, "latest")


def test_predict_takes_a_file(run, file, tmp_path):
    Image.fromarray(images(20, 30, 3)).save(tmp_path / "a.png")
    for path, output in ((run, "run"), (file, "file")):
        assert predict.predict(str(path), str(tmp_path / "a.png"), tmp_path / output) == []
    for name in ("a.png", "a_overlay.png", "legend.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


def run_without(modules, code, folder):
    """Runs Python where these modules cannot be imported; returns the labels that it saves."""
    code = f"import sys; sys.modules |= dict.fromkeys({modules!r})\n{code}\nnp.save('labels.npy', labels)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return np.load(folder / "labels.npy")


def test_loading_needs_neither_flax_nor_the_models_code(file, run, tmp_path):
    image = images(9, 31, 3)
    np.save(tmp_path / "image.npy", image)
    code = f"""
import numpy as np
from dense_jax import load
labels = load({str(file)!r})(np.load("image.npy"))
"""
    ours = [f"dense_jax.{room}" for room in ("models", "program", "trained", "training", "losses")]
    labels = run_without(["flax", "optax", "orbax", *ours], code, tmp_path)
    np.testing.assert_array_equal(labels, load(run)(image))


@pytest.fixture(scope="module")
def documented(file):
    """The folder with what docs/export.md speaks of, and its blocks of Python."""
    Image.fromarray(images(64, 64, 3)).save(file.parent / "photo.jpg")
    page = (REPOSITORY / "docs" / "export.md").read_text()
    return file.parent, re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_documented_code_runs_without_this_package(documented, run):
    folder, (_, code, _) = documented
    labels = run_without(["flax", "dense_jax"], code, folder)
    image = np.array(Image.open(folder / "photo.jpg"))
    predictor = load(run).using(tile_size=image.shape[:2], margin=0)
    np.testing.assert_array_equal(labels, predictor(image))


@pytest.fixture(scope="module")
def runtime():
    """onnxruntime, or skips the test."""
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


def test_the_documented_code_runs_an_onnx_file(runtime, documented, run):
    folder, (_, _, code) = documented
    export.export_onnx(str(run), folder / "unet_dice.onnx", image_size=(64, 64))
    labels = run_without(["jax", "dense_jax"], code, folder)
    image = np.array(Image.open(folder / "photo.jpg"))
    predictor = load(run).using(tile_size=image.shape[:2], margin=0)
    np.testing.assert_array_equal(labels[0], predictor(image))


def test_an_onnx_file_has_the_probabilities_of_any_number_of_images(runtime, run, tmp_path):
    path, calibration = tmp_path / "unet.onnx", tmp_path / "calibration.json"
    fingerprint = trained.load(run, "best").fingerprint
    fitted = {"temperature": 2.0, "steps": [1], "fingerprint": fingerprint}
    calibration.write_text(json.dumps(fitted))
    options = {"image_size": (19, 34), "result": "probabilities"}
    about = export.export_onnx(str(run), path, calibration=str(calibration), **options)
    session = runtime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("images", ["batch", 19, 34, 3])
    predictor = load(run, calibration=calibration).using(tile_size=(19, 34), margin=0)
    for number in (1, 3):
        photos = images(number, 19, 34, 3)
        (probabilities,) = session.run(None, {"images": photos})
        expected = np.stack([predictor.probabilities(photo) for photo in photos])
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == about["dataset"]["class_names"]
    assert json.loads(metadata["colors"]) == about["dataset"]["palette"]
    assert metadata["license"] == about["license"] and "synthetic" in metadata["license"]
    with pytest.raises(ValueError, match=r"unet.onnx exists: pass --overwrite"):
        export.export_onnx("no workdir", path, image_size=(19, 34))


def test_an_onnx_file_needs_a_size_and_a_package(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "dense_jax.inference.onnx_graph", raising=False)
    monkeypatch.delattr(dense_jax.inference, "onnx_graph", raising=False)
    with pytest.raises(ValueError, match="ONNX files need a package: pip install"):
        export.export_onnx(str(run), tmp_path / "a.onnx", image_size=(8, 8))
    with pytest.raises(ValueError, match=r"pass --image_size=HEIGHT,WIDTH .* tiles of 32,40"):
        export.export_onnx(str(run), tmp_path / "a.onnx", image_size=None)
    assert not list(tmp_path.iterdir())


def test_a_program_that_jax_no_longer_accepts_is_built_anew(file, tmp_path, caplog):
    image = images(33, 50, 3)
    program = jax.export.deserialize(bytearray(members_of(file)["program.bin"]))
    code = program.mlir_module_serialized.replace(b"ML\xefR", b"XXXX", 1)
    content = bytes(dataclasses.replace(program, mlir_module_serialized=code).serialize())
    about = changed(file, "program_sha256", hashlib.sha256(content).hexdigest())
    path = rewritten(file, tmp_path / "old.zip", program=content, model=about)
    np.testing.assert_array_equal(load(path)(image), load(file)(image))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dense_jax"]
    assert re.search(r"old.zip was written by jax [\d.]+, .* built anew from its config", line)
    other = json.loads(about)
    other["config"]["model"]["widths"] = [2, 4]
    path = rewritten(file, path, model=json.dumps(other), program=content)
    with pytest.raises(ValueError, match=r"nor can its network be built anew: its weights are not"):
        load(path)


def test_the_file_says_what_it_is(run, file):
    with zipfile.ZipFile(file) as archive:
        about = json.loads(archive.read("model.json"))
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    assert about["dataset"] == files.read(run, "dataset.json")
    assert about["config"] == files.read(run, "config.json")
    assert about["trained_with"]["versions"]["jax"] == about["exported_with"]["versions"]["jax"]
    assert (about["step"], about["normalization"], about["context"]) == (1, "unit", 0)
    assert about["license"].startswith("not stated") and "synthetic" in about["license"]


@pytest.mark.parametrize("source", ["{file}", "hf://me/unet/unet_dice.zip"])
def test_a_run_begins_with_the_network_of_a_file(run, file, source, monkeypatch):
    """Without reading the program, which may be of another version of JAX."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(file))
    there = trained.load(run, "best")
    there.config.model.initialize_from = source.format(file=file)
    arrays, origin = initial_weights(there.config, there.program, there.dataset)
    expected = traverse_util.flatten_dict(there.variables, sep="/")
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    anew = ["batch_stats/auxiliary", "params/auxiliary"]  # exported files have no such heads
    assert (origin["step"], origin["anew"]) == (1, anew)
    assert origin["license"].startswith("not stated")


def test_nothing_is_overwritten_unless_told(run, file, tmp_path, monkeypatch):
    program = jax.export.deserialize(bytearray(members_of(file)["program.bin"]))
    monkeypatch.setattr(export, "trace", lambda *_, **__: program)
    path = tmp_path / "new" / "model.zip"
    about = export.export(str(run), path, license="CC0")
    assert about["license"] == "CC0"
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"model.zip exists: pass --overwrite"):
        export.export("no workdir", path)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(zipfile.ZipFile, "writestr", full)
        export.export(str(run), path, overwrite=True)
    assert path.read_bytes() == written and list(path.parent.iterdir()) == [path]
    export.export(str(run), path, license="CC BY", overwrite=True)
    assert exported.read(path).about["license"] == "CC BY"


def test_a_folder_of_seeds_is_refused_by_name(run, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").mkdir()
    for act in (lambda: export.export(str(tmp_path), tmp_path / "a.zip"), lambda: load(tmp_path)):
        with pytest.raises(
            ValueError, match=r"several seeds: name one of them, .*seed=0, .*seed=1"
        ):
            act()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_folder_is_refused_before_the_workdir_is_read(tmp_path, overwrite):
    with pytest.raises(ValueError, match="is a folder: pass a file as --output"):
        export.export("no workdir", tmp_path, overwrite=overwrite)


def members_of(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(file, path, compression=zipfile.ZIP_STORED, /, **members):
    """A copy of an exported file in which members are replaced, or left out where None is given."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members_of(file).items():
            if (content := members.get(name.partition(".")[0], content)) is not None:
                archive.writestr(name, content)
    return path


def changed(file, field, value):
    """model.json with another value of a field."""
    about = json.loads(members_of(file)["model.json"])
    *parents, last = field.split(".")
    functools.reduce(operator.getitem, parents, about)[last] = value
    return json.dumps(about)


def test_a_file_that_is_damaged_newer_or_missing_is_refused(file, tmp_path):
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"params/") + 2000] ^= 1
    for content in (b"", b"text", whole[:-100], whole[: len(whole) // 2], flipped):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.zip is damaged, or no file of dense_jax.export"):
            load(tmp_path / "bad.zip")
    for version in (2, 0, "1", None, True, [1]):
        content = changed(file, "format_version", version)
        newer = rewritten(file, tmp_path / "newer.zip", model=content)
        with pytest.raises(ValueError, match=r"newer.zip has version .* reads up to 1: use the d"):
            load(newer)
    with pytest.raises(ValueError, match="nowhere does not exist: it must be a workdir or a file"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("member", ["model", "program", "weights"])
@pytest.mark.parametrize(
    "content", [None, b"", b"garbage" * 50, bytes(1000), b"[" * 100_000, b"[]", b"null", b"{}"]
)
def test_every_damaged_member_is_refused(file, tmp_path, member, content):
    path = rewritten(file, tmp_path / "bad.zip", **{member: content})
    with pytest.raises(ValueError, match=r"^[^\n]*bad.zip (is damaged|was written by jax)[^\n]*$"):
        exported.read(path)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("format", [None, "something else"]),
        ("dataset", [None, [], {}]),
        ("dataset.class_names", [None, [], [1, 2], ["one"], "ab"]),
        (
            "dataset.palette",
            [None, [], [[0, 0, 0]], [[0, 0]] * 2, [[0, 0, -1]] * 2, [[0.5] * 3] * 2],
        ),
        ("dataset.num_channels", [0, 2, None, "1", 1.0]),
        ("dataset.dtype", [None, "int8", "uint16"]),
        ("dataset.levels", [5, [], [[1]], [[1, 2, 3], [4, 5, math.nan]], [["a"], ["b"]]]),
        ("dataset.ladder", [None, [], [8, 8], [[8]], [[0, 8]], "ab"]),
        ("dataset.value_range", [5, [1, 1], ["a", "b"], [0, math.nan], [0, math.inf]]),
        ("dataset.regions", [5, {}, {"a": ["nothing"]}]),
        ("context", [-1, None, 0.5]),
        ("tile_size", [None, 8, [8], [0, 8], [8, 8, 8], "ab"]),
        ("margin", [-1, None, "2"]),
        ("batch_size", [0, -3, None, 2.5, 10**12]),
        ("step", [None, "x"]),
        ("exported_with", [None, [], {"versions": {}}]),
        ("program_sha256", [None, "0" * 64]),
    ],
)
def test_every_impossible_field_is_refused(file, tmp_path, field, values):
    for value in values:
        path = rewritten(file, tmp_path / "bad.zip", model=changed(file, field, value))
        with pytest.raises(ValueError, match=r"bad.zip is damaged, or no file of dense_jax.export"):
            exported.read(path)


def test_runs_and_files_from_before_there_were_regions_are_read(run, file, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    dataset = json.loads((copy / "dataset.json").read_text())
    del dataset["regions"]
    (copy / "dataset.json").write_text(json.dumps(dataset))
    assert trained.load(copy, "best").dataset == dataset | {"regions": None}
    about = json.loads(members_of(file)["model.json"])
    del about["thresholds"], about["dataset"]["regions"]
    path = rewritten(file, tmp_path / "old.zip", model=json.dumps(about))
    assert load(path).regions is None


def test_weights_that_are_not_those_of_the_program_are_refused(file, tmp_path):
    weights = safetensors.load(members_of(file)["weights.safetensors"])
    name = "params/decoder/head/bias"
    others = {k: x for k, x in weights.items() if k != name}
    for wrong in (
        others,
        weights | {"more": np.zeros(2, np.float32)},
        {**others, "renamed": weights[name]},
        weights | {name: weights[name][:1]},
        weights | {name: weights[name].astype(np.float64)},
        weights | {name: weights[name] * np.float32(math.nan)},
        weights | {name: weights[name] + np.float32(math.inf)},
    ):
        path = rewritten(file, tmp_path / "bad.zip", weights=safetensors.save(wrong))
        with pytest.raises(ValueError, match=r"bad.zip is damaged.* its weights are not"):
            exported.read(path)


def test_members_that_could_grow_or_are_encrypted_are_refused(file, tmp_path):
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = rewritten(file, tmp_path / "bad.zip", compression)
        with pytest.raises(ValueError, match=r"bad.zip is damaged.* its model.json is compressed"):
            exported.read(path)
    content = bytearray(file.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.zip is damaged.*encrypted"):
        exported.read(path)
