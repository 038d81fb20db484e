"""Tests sizes and costs of networks and steps against published and hand-counted numbers."""

import itertools
import re
import runpy
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from dense_jax import models, summary
from dense_jax.devices import tpu_compiler
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.program import assemble
from dense_jax.training import task
from experiments import base
from tests import forked
from tests.conftest import REPOSITORY
from tests.models import FAMILIES

NUM_CLASSES = 2
PUBLISHED = {  # parameters of torchvision's models, less those of the head, with 1000 classes
    "alexnet": 61_100_840 - 4097 * 1000,
    "vgg16": 138_357_544 - 4097 * 1000,
    "googlenet": 6_624_904 - 1025 * 1000,
    "resnet18": 11_689_512 - 513 * 1000,
    "resnet50": 25_557_032 - 2049 * 1000,
    "mobilenet_v3_large": 5_483_032 - 1281 * 1000 - 961 * 1280,
    "convnext_tiny": 28_589_128 - 769 * 1000 - 2 * 768,
}


def make(**fields):
    config = base.get_config().model
    with config.ignore_type():
        config.update(fields)
    return models.build(config, NUM_CLASSES)


def layers_of(model, size):
    """The shapes of the model's variables, and its layers."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    init = lambda image: model.init(jax.random.key(0), image, train=False)
    variables = jax.eval_shape(init, image)
    return variables, summary.layers(model, variables, image)


def cells(markdown):
    """The table's rows, after its header, as lists of words."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def no_flops(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(summary.cost, "flops", lambda *_: 0)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [*((encoder, "fcn") for encoder in FAMILIES), *(("plain", name) for name in DECODERS)],
)
def test_no_parameter_is_lost_or_counted_twice(encoder, name, no_flops):
    model = make(
        name=name,
        encoder=encoder,
        norm="none" if encoder in ("alexnet", "vgg16") else "batch",
        widths=(2, 3),
        upsampling_options={"init": "bilinear"},  # has a kernel of its own beside a submodule's
    )
    variables, layers = layers_of(model, (64, 64))
    assert len({layer.path for layer in layers}) == len(layers)
    found = Counter()
    for layer in layers:
        found[layer.path[0]] += layer.parameters
    for half, shapes in variables["params"].items():
        assert found[half] == sum(x.size for x in jax.tree.leaves(shapes))
    if name == "fcn" and encoder in PUBLISHED:
        assert found["encoder"] == PUBLISHED[encoder]


@pytest.fixture(scope="module")
def table():
    """Of a network that is small enough to be counted by hand."""
    model = make(name="fcn", widths=(5, 7), convs_per_level=1, upsampling="bilinear")
    return summary.layer_table(model, (8, 6), channels=4)


def test_layers_are_in_order_of_execution_with_their_shapes_and_parameters(table):
    *rows, total = [row[:3] for row in cells(table)]
    assert rows == [
        ["encoder/stride1/conv1/conv", "1 x 8 x 6 x 5", "180"],
        ["encoder/stride1/conv1/norm/batch", "1 x 8 x 6 x 5", "10"],
        ["encoder/stride2/conv1/conv", "1 x 4 x 3 x 7", "315"],
        ["encoder/stride2/conv1/norm/batch", "1 x 4 x 3 x 7", "14"],
        ["decoder/score2", "1 x 4 x 3 x 2", "16"],
        ["decoder/up1", "1 x 8 x 6 x 2", "0"],
        ["decoder/score1", "1 x 8 x 6 x 2", "12"],
    ]
    assert total == ["total", "1 x 8 x 6 x 2", "547"]
    assert table.endswith("Parameters: 519 in the encoder, 28 in the decoder.")


def test_flops_are_those_counted_by_hand(table):
    flops = {name: int(count.replace(",", "")) for name, *_, count in cells(table)}
    # Two for each product with a kernel; a 3x3 kernel meets no padding (3h - 2)(3w - 2) times.
    assert flops["encoder/stride1/conv1/conv"] == 2 * 22 * 16 * 4 * 5
    assert flops["encoder/stride2/conv1/conv"] == 2 * 10 * 7 * 5 * 7
    assert flops["decoder/score2"] == 4 * 3 * 2 * (2 * 7 + 1)
    assert flops["decoder/score1"] == 8 * 6 * 2 * (2 * 5 + 1)
    total = flops.pop("total")
    assert sum(flops.values()) < total < 1.2 * sum(flops.values())  # ReLUs, the pool and the sum


def test_auxiliary_heads_are_no_part_of_the_table(no_flops):
    auxiliary = {"strides": (2,), "weights": (0.4,)}
    plain, supervised = (
        summary.layer_table(make(widths=(2, 3), convs_per_level=1, **fields), (8, 6))
        for fields in ({}, {"auxiliary": auxiliary})
    )
    assert plain == supervised


def test_remat_changes_no_layer(no_flops):
    kept, again = (layers_of(make(widths=(2, 3), remat=remat), (8, 6)) for remat in (False, True))
    assert kept == again


def test_an_upsampler_counts_only_what_its_submodules_do_not():
    model = make(name="fcn", widths=(3, 5), convs_per_level=1, upsampling="pixel_shuffle")
    flops = {"/".join(layer.path): layer.flops for layer in layers_of(model, (8, 6))[1]}
    # A 3x3 convolution to 4 * 2 channels at stride 2; to shuffle them is no work.
    assert flops["decoder/up1/conv"] == 4 * 3 * 8 + 2 * 10 * 7 * 2 * 8
    assert flops["decoder/up1"] == 0


@pytest.mark.parametrize("upsampling", UPSAMPLERS)
def test_every_upsampling_method_is_visible(upsampling, no_flops):
    _, layers = layers_of(make(widths=(2, 3, 4), convs_per_level=1, upsampling=upsampling), (8, 8))
    shapes = {layer.path: layer.shape[1:3] for layer in layers}
    assert shapes["decoder", "up2"] == (4, 4)
    assert shapes["decoder", "up1"] == (8, 8)


def test_crossings_say_yes_exactly_where_a_model_can_be_built():
    config = base.get_config().model
    before = config.to_json_best_effort()
    markdown = summary.crossings(config)
    assert config.to_json_best_effort() == before
    (_, _, *columns), _, *_ = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()
    ]
    reasons = [line for line in markdown.splitlines() if line[:1].isdigit()]
    assert len({reason.split(". ", 1)[1] for reason in reasons}) == len(reasons)
    named = {method for column in columns for method in column.split(", ")}
    answers = {}
    for decoders, encoders, *entries in cells(markdown):
        for column, entry in zip(columns, entries, strict=True):
            methods = (
                UPSAMPLERS.keys() - named if column == "all other methods" else column.split(", ")
            )
            for names in itertools.product(
                decoders.split(", "),
                ENCODERS if encoders == "all" else encoders.split(", "),
                methods,
            ):
                assert answers.setdefault(names, entry) is entry  # no combination has two
    assert answers.keys() == {*itertools.product(DECODERS, ENCODERS, UPSAMPLERS)}
    for (name, encoder, upsampling), entry in answers.items():
        if entry == "yes":
            make(encoder=encoder, name=name, upsampling=upsampling)
        else:
            with pytest.raises(ValueError) as error:
                make(encoder=encoder, name=name, upsampling=upsampling)
            assert f"{entry}. {error.value}" in reasons
    assert {*answers.values()} == {"yes", *(str(i + 1) for i in range(len(reasons)))}


class TestPage:
    """docs/models.md, whose tables `python -m docs.generate` makes."""

    page = (REPOSITORY / "docs" / "models.md").read_text()

    def rows(self, name):
        """The rows of a table, as {first cell: other cells}."""
        (block,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", self.page, re.DOTALL)
        return {first: others for first, *others in cells(block)}

    def test_its_crossings_are_those_of_the_registries(self):
        assert summary.crossings(base.get_config().model) in self.page

    def test_it_has_a_row_for_each_method_and_variant_and_names_the_papers(self):
        variants = (
            ", ".join([method, *(f"{name}={value}" for name, value in options.items())])
            for method, options in summary.VARIANTS
        )
        assert list(self.rows("upsampling")) == [*UPSAMPLERS, *variants]
        for method in UPSAMPLERS:
            assert f"`{method}`" in self.page

    @pytest.mark.parametrize("method", UPSAMPLERS)
    def test_its_methods_cost_what_it_says(self, method):
        """All columns but the last, whose random weights take long to compile."""
        *row, _ = self.rows("upsampling")[method]
        assert [*itertools.islice(summary.upsampling_row(UPSAMPLERS[method]), len(row))] == row

    def test_it_has_a_row_for_each_encoder_with_the_license_of_its_weights(self):
        rows = self.rows("encoders")
        assert list(rows) == list(ENCODERS)
        for name, entry in ENCODERS.items():
            about = entry.weights
            weights = [about.license, about.normalization] if about else ["none", ""]
            assert rows[name][1:3] == weights
        # The others take long to trace.
        quick = cells(summary.encoder_table(base.get_config().model, ["plain", "alexnet"]))
        assert [[name, *rows[name]] for name in ("plain", "alexnet")] == quick

    def test_its_python_builds_and_calls_a_network(self, tmp_path):
        (program,) = re.findall(r"```python\n(.*?)```", self.page, re.DOTALL)
        (tmp_path / "program.py").write_text(program)

        def logits():
            names = runpy.run_path(str(tmp_path / "program.py"))
            return names["logits"], names["variables"]

        shape, variables = jax.eval_shape(logits)
        assert shape.shape == (1, 150, 200, 21)
        assert "gate2" in variables["params"]["decoder"]


@pytest.fixture(scope="module")
def needed():
    return summary.training_cost(small_config(), num_classes=3, num_channels=1)


def small_config(**fields):
    config = base.get_config()
    config.batch_size = 8
    config.model.widths = (2, 3)
    config.model.norm = "group"
    config.data.crop_size = (8, 8)
    config.data.canvas_size = (16, 12)
    config.update(fields)
    return config


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_steps_arguments_are_the_state_and_the_devices_part_of_the_batch(needed):
    config = small_config()
    state = task.bind(config, assemble(config, 3), 1).shapes()
    batch = task.batch_shapes(config, (16, 12), num_channels=1)
    assert needed["aliased"] == num_bytes(state)
    key = 8
    assert needed["arguments"] == num_bytes(state) + num_bytes(batch) // jax.device_count() + key


def test_the_peak_of_a_step_counts_donated_memory_once(needed):
    gained = needed["outputs"] - needed["aliased"]  # the metrics, and pointers to all outputs
    assert 0 < gained < 2000
    assert needed["peak"] == needed["arguments"] + needed["temporaries"] + gained


def test_twice_the_batch_needs_more_memory_and_twice_the_work_and_allocates_nothing(needed):
    before = len(jax.live_arrays())
    config = small_config(batch_size=16)
    larger = summary.training_cost(config, num_classes=3, num_channels=1)
    assert len(jax.live_arrays()) == before
    assert larger["aliased"] == needed["aliased"]
    assert larger["temporaries"] > 1.5 * needed["temporaries"]
    assert larger["flops"] == pytest.approx(2 * needed["flops"], rel=0.1)


def test_a_batch_that_a_slice_cannot_split_is_enlarged(monkeypatch):
    compiled = []
    chip = tpu_compiler.Chip(memory=16 * 10**9, peak=197e12, clock=1.5e9)
    monkeypatch.setattr(tpu_compiler, "describe", lambda *_: (jax.devices(), chip))
    monkeypatch.setattr(summary, "tpu_steps", lambda config, *_: compiled.append(config) or [])
    config = base.get_config()
    config.update(batch_size=6, num_microbatches=2)
    about = next(summary.tpu_tables(config, 3, 3, "v5e-4"))
    assert "For 4 devices" in about and "with batch_size=8 instead of 6, by" in about
    assert (compiled[0].batch_size, config.batch_size) == (8, 6)
    config.batch_size = 16
    assert "with batch_size=16, by" in next(summary.tpu_tables(config, 3, 3, "v5e-4"))


COMMANDS = {
    "changed": (
        *("--config=experiments/unet_dice.py", "--config.model.widths=(2,3)"),
        *("--config.data.crop_size=(8,8)", "--size=16,18", "--channels=1", "--num_classes=5"),
    ),
    "bad size": ("--config=experiments/unet_dice.py", "--size=10"),
}


@pytest.fixture(scope="module")
def ends():
    commands = {name: ["dense_jax.summary", *arguments] for name, arguments in COMMANDS.items()}
    return forked.run_all(commands, "dense_jax.summary", JAX_NUM_CPU_DEVICES="1")


def test_the_command_prints_the_layers_and_the_step_of_the_changed_config(ends):
    code, printed, error = ends["changed"]
    assert code == 0, error
    layers, step = printed.split("A training step of 8 images")
    rows = cells(layers)
    assert rows[0][:3] == ["encoder/stride1/conv1/conv", "1 x 16 x 18 x 2", "18"]
    assert rows[-1][:2] == ["total", "1 x 16 x 18 x 5"]
    assert "on each of 1 cpu, by XLA:CPU's analysis: a GPU's or TPU's" in step
    assert dict(cells(step))["peak"].endswith(" MB")


def test_a_bad_size_is_one_clear_error(ends):
    code, _, error = ends["bad size"]
    assert code != 0
    assert "must be HEIGHT,WIDTH in pixels" in error
    assert "Traceback" not in error
