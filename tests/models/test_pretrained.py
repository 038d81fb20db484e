"""Tests that published weights are imported completely and compute the same as in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dense_jax.models import pretrained
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.normalization import NORMALIZATIONS

NETWORKS = {  # torchvision's name: our encoder and its norm
    "alexnet": ("alexnet", "none"),
    "vgg16": ("vgg16", "none"),
    "vgg16_bn": ("vgg16", "batch"),
    "googlenet": ("googlenet", "batch"),
    "resnet18": ("resnet18", "batch"),
    "resnet34": ("resnet34", "batch"),
    "resnet50": ("resnet50", "batch"),
}


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
        return pretrained.load(str(path), "vgg16", norm, shapes_of(encoder))

    return tensors, load


@pytest.fixture(scope="module")
def torch_encoders():
    pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    from tests.models import torch_encoders

    return torch_encoders


def save_torch(model, folder):
    path = folder / "model.safetensors"
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, path)
    return str(path)


def assert_close(ours, theirs):
    """theirs: a torch tensor [b, c, h, w]."""
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(ours)[:, : theirs.shape[1], : theirs.shape[2]]
    np.testing.assert_allclose(ours / theirs.std(), theirs / theirs.std(), atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_features_equal_torchs(network, torch_encoders, tmp_path):
    import torch

    name, norm = NETWORKS[network]
    model = torch_encoders.make(network, 1 / 8)
    encoder = ENCODERS[name].make(width_multiplier=1 / 8, norm=norm)
    file = save_torch(model, tmp_path)
    variables = pretrained.load(file, name, norm, shapes_of(encoder))
    image = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    features = jax.jit(functools.partial(encoder.apply, train=False))(variables, image).features
    expected = torch_encoders.features(model, torch.from_numpy(image.transpose(0, 3, 1, 2)))
    assert features.keys() == expected.keys()
    for stride, theirs in expected.items():
        assert_close(features[stride], theirs)


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_the_convolutional_classifier_is_the_fully_connected_one(name, torch_encoders, tmp_path):
    """At the training size, 224 pixels, in the pixel whose window is the whole feature map."""
    import torch

    model = torch_encoders.make(name, 1 / 16)
    encoder = ENCODERS[name].make(
        width_multiplier=1 / 16, norm="none", classifier=True, taps="after_pool"
    )
    file = save_torch(model, tmp_path)
    variables = pretrained.load(file, name, "none", shapes_of(encoder))
    image = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    features = jax.jit(functools.partial(encoder.apply, train=False))(variables, image).features
    theirs = torch.from_numpy(image.transpose(0, 3, 1, 2))
    pooled = torch_encoders.features(model, theirs)[32]
    expected = torch_encoders.classifier_features(model, pooled)
    assert features[32].shape[1:3] == (7, 7)
    assert_close(features[32][:, 3:4, 3:4], expected[:, :, None, None])
    if name == "vgg16":  # what FCN fuses: pool3 and pool4
        for stride in (8, 16):
            assert_close(features[stride], torch_encoders.pools(model, theirs)[stride])


@pytest.mark.parametrize(
    ("network", "name", "shape"),
    [
        ("vgg16", "features.28.weight", (512, 512, 3, 3)),
        ("vgg16_bn", "features.40.bias", (512,)),
        ("vgg16_bn", "features.41.running_var", (512,)),
        ("alexnet", "features.10.weight", (256, 256, 3, 3)),
        ("googlenet", "conv3.bn.running_mean", (192,)),
        ("googlenet", "inception4e.branch3.1.conv.weight", (128, 32, 3, 3)),
        ("googlenet", "inception5b.branch4.1.bn.weight", (128,)),
        ("resnet18", "layer4.1.bn2.running_var", (512,)),
        ("resnet34", "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
        ("resnet34", "layer3.5.conv1.weight", (256, 256, 3, 3)),
        ("resnet50", "layer1.0.downsample.1.bias", (256,)),
        ("resnet50", "layer4.2.conv3.weight", (2048, 512, 1, 1)),
        ("resnet50", "bn1.weight", (64,)),
    ],
)
def test_the_names_and_shapes_are_torchvisions(network, name, shape):
    assert expected_tensors(*NETWORKS[network])[name].shape == shape


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


def test_a_torch_file_needs_torch_and_holds_nothing_but_tensors(vgg, tmp_path, torch_encoders):
    import torch

    tensors, _ = vgg
    path = tmp_path / "vgg16.pth"
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    arrays = pretrained.read(str(path))
    assert arrays.keys() == tensors.keys()
    np.testing.assert_array_equal(arrays["features.0.weight"], tensors["features.0.weight"])
    half = {"a": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    torch.save(half, path)
    np.testing.assert_array_equal(pretrained.read(str(path))["a"], [1, 1])
    for other in ({"model": print}, {"epoch": 3, "state_dict": half}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"vgg16\.pth' cannot be read"):
            pretrained.read(str(path))
    for damaged in (b"", b"PK nothing"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"vgg16\.pth' cannot be read"):
            pretrained.read(str(path))


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
        loaded.append(pretrained.load(path, "vgg16", "none", shapes_of(encoder)))
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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.npz", "there is no such file"),
        ("weights.h5", r"must end in one of \.safetensors, \.npz, \.pth, \.pt or be hf://"),
        ("hf://vgg16", "must be hf://OWNER/NAME/FILE"),
    ],
)
def test_a_file_that_cannot_be_found_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        pretrained.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    np.save(tmp_path / "one.npy", np.zeros(3))
    for damaged in (b"nothing of the kind", b"", (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"weights{suffix}' cannot be read"):
            pretrained.read(str(path))


def test_a_file_on_the_hub_is_downloaded_once(vgg, tmp_path, monkeypatch):
    import huggingface_hub

    tensors, _ = vgg
    save_file(tensors, tmp_path / "model.safetensors")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert pretrained.read("hf://timm/vgg16.tv_in1k/model.safetensors").keys() == tensors.keys()
    assert asked == [("timm/vgg16.tv_in1k", "model.safetensors")]

    def fail(repository, file):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match="cannot be downloaded: no connection"):
        pretrained.read("hf://timm/vgg16.tv_in1k/model.safetensors")


def test_an_encoder_without_published_weights_is_named():
    with pytest.raises(ValueError, match="encoder 'plain' has no published weights, only alexnet"):
        pretrained.load("vgg.npz", "plain", "batch", {})


def test_the_normalization_that_goes_with_the_weights():
    gray = jnp.full((2, 2, 1), 0.5 * 255, jnp.float32)
    imagenet = NORMALIZATIONS[ENCODERS["resnet50"].normalization](gray)
    np.testing.assert_allclose(
        imagenet[0, 0], [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225], 1e-4
    )
    # torchvision's googlenet undoes ImageNet's normalization and maps to -1..1.
    np.testing.assert_allclose(NORMALIZATIONS[ENCODERS["googlenet"].normalization](gray), 0)
