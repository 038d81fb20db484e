"""Tests that a card is a workdir like any other, on a hub as well, and says what it holds."""

import http.server
import json
import re
import shutil
import threading
import urllib.parse

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from dense_jax import card, evaluate, export, load, predict, train, trained
from dense_jax.training.initial import initial_weights
from dense_jax.workdir import files
from experiments import base

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 1)).astype(np.uint8)
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A workdir with all that a card leaves out: auxiliary heads, an optimizer's state, raw weights."""
    path = tmp_path_factory.mktemp("runs") / "run"
    config = base.get_config()
    config.num_steps, config.batch_size, config.ema_decay = 1, 4, 0.5
    config.model.widths = (2, 3)
    with config.ignore_type():
        config.model.auxiliary.update(strides=(2,), weights=(0.4,))
    config.data.update(name="folder", root=str(tiny_folder), crop_size=(8, 8))
    config.eval.update(tile_size=(16, 16), margin=2, num_pictures=0)
    train.train(config, str(path))
    evaluate.evaluate(str(path), "test", boundaries=False)
    return path


def write(run, folder, **options):
    card.write(str(run), folder, export=export.export, **options)
    return folder


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return write(run, tmp_path_factory.mktemp("cards") / "dark_or_bright", license="CC BY 4.0")


def test_a_card_predicts_what_its_workdir_does(run, folder):
    expected = load(run).probabilities(IMAGE)
    assert np.ptp(expected) > 0
    for path in (folder, folder / "model.zip"):
        np.testing.assert_array_equal(load(path).probabilities(IMAGE), expected)
    before = sorted(folder.rglob("*"))
    load(folder, "1")
    assert sorted(folder.rglob("*")) == before  # a cache may be read-only
    with pytest.raises(ValueError, match=r"no checkpoint 'latest' .* one of the steps \[1\]"):
        load(folder, "latest")


def test_a_card_has_the_weights_alone(folder):
    saved = json.loads((folder / "checkpoints/best/1/default/_METADATA").read_text())
    names = {
        tuple(key["key"] for key in array["key_metadata"])
        for array in saved["tree_metadata"].values()
    }
    assert {name[0] for name in names} == {"ema"}
    assert {name[2] for name in names} == {"encoder", "decoder"}


def test_a_card_does_not_say_where_the_data_were(folder, tiny_folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        assert str(tiny_folder).encode() not in path.read_bytes(), path


def test_the_readme_says_what_the_card_holds(run, folder, tiny_folder):
    read = huggingface_hub.ModelCard.load(folder / "README.md")  # also parses what hubs read
    assert read.data.license == "cc-by-4.0" and read.data.pipeline_tag == "image-segmentation"
    evaluation = files.read(run, "evaluation_test.json")
    dataset = files.read(run, "dataset.json")
    score, (low, high) = evaluation["eval/mean_iou"], evaluation["intervals"]["eval/mean_iou"]
    result = files.read(run, "result.json")
    for text in (
        *(
            "# dark_or_bright\n",
            "2 classes: dark, bright",
            f"{score:.3f} ({low:.3f} to {high:.3f})",
        ),
        *(dataset["fingerprint"], evaluation["dataset_fingerprint"], "CC BY 4.0", "5 images"),
        *(files.read(run, "environment.json")["command"], f"{result['num_parameters']:,} param"),
        f"| {tiny_folder.name}, 7 images of train",
    ):
        assert text in read.text, text
    pictures = re.findall(r"\]\((.*?)\)", read.text)
    assert {"evaluation_test.png", "learning_curve.png"} == set(pictures)
    assert all((folder / name).is_file() for name in pictures)


def test_validation_labels_without_a_valid_pixel_have_no_score(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    result = files.read_json(copy / "result.json")
    result["best"]["eval/mean_iou"] = result["final"]["eval/mean_iou"] = None
    (copy / "result.json").write_text(json.dumps(result))
    text = (write(copy, tmp_path / "card") / "README.md").read_text()
    assert "no score after step 1 (best), no score after step 1 (final)" in text


@pytest.mark.parametrize(
    ("license", "metadata", "said"),
    [
        (None, (None, None), "not stated: whoever shares the weights must choose one"),
        ('Ours: "free"', ("other", "ours-free"), 'Ours: "free"'),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_a_name(
    run, folder, tmp_path, monkeypatch, license, metadata, said
):
    def copied(directory, path):
        shutil.copyfile(folder / "model.zip", path)
        return export.describe(trained.load(directory, "best"), directory, None)

    card.write(str(run), tmp_path / "a", license=license, export=copied)
    read = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert (read.data.license, read.data.get("license_name")) == metadata
    assert f"## License\n\n{said}" in read.text


def test_a_new_run_takes_the_weights_and_the_license_of_a_card(run, folder):
    there = trained.load(run, "best")
    there.config.model.initialize_from = str(folder)
    arrays, origin = initial_weights(there.config, there.program, there.dataset)
    assert len(arrays) > 10 and origin["license"] == "CC BY 4.0"


def changed(run, tmp_path, name, **values):
    copy = shutil.copytree(run, tmp_path / "run")
    content = files.read(copy, name)
    (copy / name).unlink()
    if values:
        (copy / name).write_text(json.dumps(content | values))
    return copy


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("evaluation_test.json", {}, r"no evaluation of step 1: run .*evaluate --workdir=.*run "),
        ("evaluation_test.json", {"step": 2}, r"no evaluation of step 1: run .* --split=test"),
        ("result.json", {}, r"run is not finished: let the command that trains there end"),
        ("config.json", {}, r"config.json is missing: --workdir must be that of a run"),
    ],
)
def test_what_a_card_lacks_is_said_before_anything_is_written(run, tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message):
        write(changed(run, tmp_path, name, **values), tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_a_folder_with_files_is_left_alone(run, tmp_path):
    (tmp_path / "precious").write_text("mine")
    for path in (tmp_path, tmp_path / "precious"):
        with pytest.raises(ValueError, match="exists: remove it, or pass another --output"):
            write(run, path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A stand-in for the hub, with the card as me/unet. Returns the list of the files asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            name = path.removeprefix("/me/unet/resolve/").partition("/")[2]  # below the revision
            if path == "/api/models/me/unet/revision/main":
                siblings = [{"rfilename": name} for name in names]
                self.reply(json.dumps({"id": "me/unet", "sha": COMMIT, "siblings": siblings}))
            elif path == f"/api/models/me/unet/tree/{COMMIT}":
                self.reply(
                    json.dumps(
                        [
                            {"type": "file", "path": name, "oid": name, "size": len(content)}
                            for name, content in names.items()
                        ]
                    )
                )
            elif path.startswith("/me/unet/resolve/") and name in names:
                asked.append(name)
                self.reply(names[name], ETag=f'"{name.replace("/", "-")}"')
            else:
                self.reply("", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def reply(self, content, status=200, **headers):
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            headers |= {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    names = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked
        server.shutdown()


def test_load_and_predict_take_a_card_from_the_hub(hub, folder, tmp_path, monkeypatch):
    predictor = load("hf://me/unet")
    np.testing.assert_array_equal(predictor(IMAGE), load(folder)(IMAGE))
    assert "of hf://me/unet" in repr(predictor)
    downloaded = {name.split("/")[0] for name in hub}
    assert downloaded == {"config.json", "dataset.json", "environment.json", "checkpoints"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the second time
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "a.png")
    for path, output in (("hf://me/unet", "hub"), (str(folder), "folder")):
        assert predict.predict(path, str(tmp_path / "a.png"), tmp_path / output) == []
    for name in ("a.png", "a_overlay.png", "legend.png"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_file_and_initial_weights_come_from_the_hub(hub, run, folder):
    np.testing.assert_array_equal(load("hf://me/unet/model.zip")(IMAGE), load(folder)(IMAGE))
    assert set(hub) == {"model.zip"}
    there = trained.load(run, "best")
    there.config.model.initialize_from = "hf://me/unet"
    _, origin = initial_weights(there.config, there.program, there.dataset)
    assert (origin["source"], origin["license"]) == ("hf://me/unet", "CC BY 4.0")


@pytest.mark.parametrize(
    ("source", "offline", "message"),
    [
        ("hf://me/other", False, "hf://me/other: the hub has no repository me/other, or you may "),
        (
            "hf://me/unet",
            True,
            "hf://me/unet: it cannot be downloaded: .* copy the folder models--me--unet ",
        ),
        ("hf://unet", False, "hf://unet: it must be hf://OWNER/NAME or hf://OWNER/NAME/FILE"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, monkeypatch, source, offline, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        load(source)
