"""Tests all combinations of encoder, decoder, upsampling and skips, built with `build` only."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from dense_jax import models
from dense_jax.models.decoders import DECODERS
from dense_jax.models.decoders.unet import FUSIONS, AttentionGate
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import NORMS, Classifier, ConvNorm, mirrored
from dense_jax.models.segmenter import Encoder, Pyramid
from dense_jax.models.upsampling import UPSAMPLERS
from experiments import base
from tests.models import FAMILIES, has

NUM_CLASSES = 3
WIDTHS = (3, 4, 5, 6)  # strides 1, 2, 4, 8


def make(**fields):
    config = base.get_config().model
    config.widths = WIDTHS
    encoder, name = fields.get("encoder", "plain"), fields.get("name", "unet")
    if encoder in ENCODERS and has(ENCODERS[encoder].make, "width_multiplier"):
        config.width_multiplier = 1 / 64
    if name in DECODERS and has(DECODERS[name], "decoder_channels"):
        config.decoder_channels = 4
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return models.build(config, NUM_CLASSES)


def deep_skips(encoder):
    """The two deepest strides that the encoder's features can be fused at."""
    return make(encoder=encoder).encoder.spec.strides[-3:-1]


def fit(name, encoder, upsampling):
    """Whether the parts go together."""
    return upsampling != "max_unpool" or (name == "unet" and encoder in ("plain", "vgg16"))


def apply(model, variables, image, train=False, **options):
    """model.apply as one program."""
    return jax.jit(lambda v, x: model.apply(v, x, train=train, **options))(variables, image)


def shapes_of(model, channels=3):
    image = jax.ShapeDtypeStruct((1, 16, 16, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)


def initialize(model, channels=3):
    """Random variables of the right shapes, without compiling the model's own initialization."""
    rng = np.random.default_rng(0)
    fill = lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype)
    variables = jax.tree.map(fill, shapes_of(model, channels))
    if "batch_stats" in variables:  # variances
        variables["batch_stats"] = jax.tree.map(lambda x: abs(x) + 0.5, variables["batch_stats"])
    return variables


def logits_shape(model, variables, size):
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    assert logits.dtype == jnp.float32
    return logits.shape


PYRAMIDS = {}  # results of pyramid_shapes by encoder, which most decoders share


def pyramid_shapes(name, encoder):
    """Of an image of 2 x 3 cells of the deepest stride."""
    module = make(name=name, encoder=encoder).encoder
    stride = module.spec.strides[-1]
    image = jax.ShapeDtypeStruct((1, 2 * stride, 3 * stride, 3), jnp.float32)

    def encode(image):
        pyramid, _ = module.init_with_output(jax.random.key(0), image, train=False)
        return pyramid.features, pyramid.switches

    if repr(module) not in PYRAMIDS:
        PYRAMIDS[repr(module)] = jax.eval_shape(encode, image)
    return PYRAMIDS[repr(module)]


def assert_decodes(name, encoder, upsampling, skips):
    """The decoder turns the encoder's pyramid into logits of the image's size."""
    features, switches = pyramid_shapes(name, encoder)
    stride = max(features)
    decoder = make(name=name, encoder=encoder, upsampling=upsampling, skips=skips).decoder

    def decode(features, switches):
        pyramid = Pyramid(features, switches)
        return decoder.init_with_output(jax.random.key(0), pyramid, train=False)[0]

    logits, _ = jax.eval_shape(decode, features, switches)
    assert logits.shape == (1, 2 * stride, 3 * stride, NUM_CLASSES)


@pytest.mark.parametrize("upsampling", UPSAMPLERS)
@pytest.mark.parametrize("name", DECODERS)
def test_every_upsampling_method_decodes(name, upsampling):
    for encoder in ("plain", "vgg16") if name == "unet" else ("plain",):
        if fit(name, encoder, upsampling):
            assert_decodes(name, encoder, upsampling, deep_skips(encoder))
        else:
            with pytest.raises(ValueError, match="max_unpool"):
                make(name=name, encoder=encoder, upsampling=upsampling)


@pytest.mark.parametrize("skips", [None, ()], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_decodes_all_skips_and_none(name, skips):
    assert_decodes(name, "vgg16", "nearest", skips)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_decodes_every_encoder(name):
    """A decoder sees only the pyramid, so one encoder stands for all with the same strides."""
    encoders = {}
    for encoder in ENCODERS:
        strides = make(name=name, encoder=encoder, upsampling="nearest").encoder.spec.strides
        encoders[strides] = encoder
    for encoder in encoders.values():
        assert_decodes(name, encoder, "nearest", deep_skips(encoder))


@pytest.mark.parametrize("encoder", FAMILIES)
def test_logits_have_the_size_of_any_input(encoder):
    init = functools.partial(make(encoder=encoder).init_with_output, train=False)
    for size in [(1, 1), (33, 70)]:
        image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        logits, _ = jax.eval_shape(init, jax.random.key(0), image)
        assert (logits.shape, logits.dtype) == ((2, *size, NUM_CLASSES), jnp.float32)


@pytest.mark.parametrize(("padding", "bottleneck"), [("SAME", False), ("VALID", True)])
def test_every_size_from_1_to_32_has_logits_of_that_size(padding, bottleneck):
    """Of a network with a deepest stride of 4: each remainder, from less than one cell to eight."""
    fields = {"widths": (2, 2, 2), "convs_per_level": 1, "norm": "none", "upsampling": "nearest"}
    model = make(padding=padding, bottleneck=bottleneck, **fields)
    variables = shapes_of(model)
    for h in range(1, 17):  # and widths of 32 to 17
        assert logits_shape(model, variables, (h, 33 - h)) == (2, h, 33 - h, NUM_CLASSES)


@pytest.mark.parametrize("name", ["fcn", "unet"])
def test_padding_to_the_stride_leaves_the_visible_part_alone(name):
    model = make(name=name)
    variables = initialize(model)
    image = jax.random.normal(jax.random.key(1), (1, 13, 11, 3))
    padded = jnp.pad(image, ((0, 0), (0, 3), (0, 5), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(
        apply(model, variables, image), apply(model, variables, padded)[:, :13, :11]
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 16)], ids=str)
def test_images_are_mirrored_about_their_border_pixels(size):
    image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    around = [(3, 16 - 3 - length) for length in size]
    expected = np.pad(image, [(0, 0), *(np.maximum(0, a) for a in around), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(mirrored(jnp.asarray(image), 3, (16, 16)), expected[:, :16, :16])


def connected_strides(name, encoder, skips, **fields):
    """The strides of the features that the decoder's logits are computed from."""
    fields = {"norm": "none", "upsampling": "bilinear"} | fields
    decoder = make(name=name, encoder=encoder, skips=skips, **fields).decoder
    features, switches = pyramid_shapes(name, encoder)
    switches = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), switches)

    def decode(*maps):
        pyramid = Pyramid(dict(zip(features, maps, strict=True)), switches)
        (logits, _), _ = decoder.init_with_output(jax.random.key(0), pyramid, train=False)
        return logits

    program = jax.make_jaxpr(decode)(*features.values()).jaxpr
    _, used = partial_eval.dce_jaxpr(program, [True])
    return set(itertools.compress(features, used))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("skips", [(), (1, 4), (2,), None], ids=str)
def test_each_skip_and_no_other_connects_its_stride_to_the_output(name, skips):
    connected = connected_strides(name, "plain", skips)
    default = {1, 2, 4} & set(DECODERS[name].default_skips or (1, 2, 4))
    assert connected == {8} | (default if skips is None else set(skips))


@pytest.mark.parametrize(
    "fields",
    [{"fusion": "add"}, {"upsampling": "max_unpool"}, {"norm": "batch"}],
    ids=str,
)
def test_skips_connect_whatever_else_is_chosen(fields):
    assert connected_strides("unet", "plain", (4, 1), **fields) == {8, 4, 1}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("encoder", ["alexnet", "vgg16", "resnet18"])  # one per set of strides
def test_skips_connect_every_encoder(name, encoder):
    assert connected_strides(name, encoder, deep_skips(encoder)) == {32, *deep_skips(encoder)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "linknet"}, "model.name.*'linknet'.*'fcn', 'unet'"),
        ({"encoder": "vgg99"}, "model.encoder.*'vgg99'.*'plain'.*'vgg16'"),
        ({"upsampling": "cubic"}, "model.upsampling.*'bilinear'"),
        ({"fusion": "mul"}, "model.fusion.*'concat', 'add'"),
        ({"norm": "layer"}, "model.norm.*'batch', 'group', 'none'"),
        ({"dtype": "float64"}, "model.dtype.*'float32', 'bfloat16'"),
        ({"skips": (3,)}, "model.skips: 3 is not one of 1, 2, 4"),
        ({"skips": (8,)}, "model.skips: 8 is not one of 1, 2, 4"),
        ({"encoder": "resnet18", "skips": (1,)}, "model.skips: 1 is not one of 2, 4, 8, 16"),
        ({"skips": (2, 2)}, "twice"),
        ({"auxiliary.strides": (16,)}, "auxiliary.strides: 16 is not one of 1, 2, 4, 8"),
        ({"auxiliary.strides": (4,)}, r"auxiliary.weights=None must be one for each .*\(4,\)"),
        ({"name": "upernet", "padding": "VALID"}, "encoder loses 4 .* decoder 0.* use 'SAME'"),
        ({"widths": ()}, "model.widths"),
        ({"widths": (4, 0)}, "model.widths"),
        ({"freeze_encoder": True, "dropout": 0.5}, "model.dropout=0.5 would do nothing"),
        ({"kernel_size": 4}, "model.kernel_size=4 must be odd"),
        ({"widths": (2.5, 4)}, r"model.widths=\(2.5, 4\) must be one or more positive"),
        ({"upsampling": "bilinaer"}, "; did you mean 'bilinear'"),
        ({"padding": "REFLECT"}, "model.padding: 'REFLECT' is not one of 'SAME', 'VALID'"),
        ({"padding": "VALID", "name": "fcn"}, "encoder loses 4 .* decoder 0.* use 'SAME'"),
        ({"padding": "VALID", "encoder": "vgg16"}, "encoder loses 0 .* decoder 4.* use 'SAME'"),
        ({"width_multiplier": 0.5}, "width_multiplier=0.5: neither 'unet' nor 'plain' has it"),
        ({"zero_init": True}, "model.zero_init=True: neither 'unet' nor 'plain' has it"),
        ({"decoder_conv": "3x3"}, "decoder_conv: '3x3' is not one of 'full', 'depthwise', 'none'"),
        ({"decoder_conv": "depthwise"}, "which model.fusion='concat' changes: use 'add'"),
        ({"decoder_conv": "depthwise", "fusion": "gated"}, "fusion='gated' changes: use 'add'"),
        ({"decoder_conv": "none", "padding": "VALID"}, "Both paths must lose as much"),
        ({"encoder": "vgg16", "classifer": True}, "classifer=True: neither 'unet' nor 'vgg16'"),
        (
            {"encoder": "resnet18", "output_stride": 4},
            "output_stride: 4 is not one of 8, 16, 32",
        ),
        (
            {"encoder": "mit_b0", "output_stride": 16},
            "output_stride=16: neither 'unet' nor 'mit_b0'",
        ),
        ({"encoder": "resnet18", "drop_path": 0.1}, "drop_path=0.1: neither 'unet' nor 'resnet18'"),
        ({"gradual": True}, "model.gradual=True: neither 'unet' nor 'plain' has it"),
        ({"name": "fcn", "decoder_relu": False}, "neither 'fcn' nor 'plain' has it"),
        ({"name": "fcn", "skips": (4, 2), "score_scales": (0.1,)}, r"one for each .*\(4, 2\)"),
        ({"name": "fcn", "upsampling": "max_unpool"}, "never pooled.* Use bed_of_nails"),
        (
            {"encoder": "resnet18", "upsampling": "max_unpool"},
            r"no 2x2 max-pool.*\[1, 2, 4, 8, 16\]\. Use bed_of_nails",
        ),
        ({"upsampling_options": {"stride": 3}}, "'stride' is not one of 'init', 'kernel_size'"),
        ({"upsampling_options": {"kernel_size": 0}}, "kernel_size=0 must be at least 1"),
        ({"upsampling_options": {"init": "he"}}, "init='he' must be 'bilinear'"),
        ({"upsampling_options": {"learn": False}}, "needs init='bilinear'"),
        (
            {"upsampling": "pixel_shuffle", "upsampling_options": {"init": "bilinear"}},
            "pixel_shuffle: init='bilinear' must be 'icnr'",
        ),
        (
            {"upsampling": "nearest", "upsampling_options": {"kernel_size": 3}},
            "'kernel_size' is not one of none",
        ),
    ],
    ids=str,
)
def test_bad_fields_are_named_with_the_valid_values(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(("fusion", "norm"), [*zip(FUSIONS, NORMS, strict=True)])
def test_fusions_and_norms_train(fusion, norm):
    model = make(fusion=fusion, norm=norm)
    variables = initialize(model, channels=1)
    image = jnp.ones((2, 8, 8, 1))
    logits, mutated = apply(model, variables, image, train=True, mutable=["batch_stats"])
    assert np.all(np.isfinite(logits))
    assert bool(mutated.get("batch_stats")) == (norm == "batch")


def test_adding_fuses_in_place_and_concatenating_widens():
    def first_kernel(fusion, **fields):
        decoder = shapes_of(make(fusion=fusion, **fields))["params"]["decoder"]
        return decoder["stride2"]["conv1"]["conv"]["kernel"]

    width = WIDTHS[1]
    assert first_kernel("concat").shape[2] == 2 * width
    assert first_kernel("add").shape[2] == width
    # Features of another number of channels are projected to be added.
    assert first_kernel("concat", encoder="vgg16").shape[2] == 2 + width
    assert first_kernel("add", encoder="vgg16").shape[2] == width


def test_gates_weight_skips_by_the_features_before_upsampling_and_concatenation_widens():
    decoder = shapes_of(make(fusion="gated"))["params"]["decoder"]
    assert decoder["stride2"]["conv1"]["conv"]["kernel"].shape[2] == 2 * WIDTHS[1]
    gate = {name: layer["kernel"].shape for name, layer in decoder["gate2"].items()}
    hidden = WIDTHS[1] // 2
    assert gate["theta"] == (2, 2, WIDTHS[1], hidden)  # the skip
    assert gate["phi"] == (1, 1, WIDTHS[2], hidden)  # the features of stride 4


class TestAttentionGate:
    skip, coarse = jax.random.normal(jax.random.key(0), (1, 4, 6, 5)), jnp.ones((1, 2, 3, 7))

    def test_it_weights_pixels_by_additive_attention_at_the_coarser_resolution(self):
        """Equation 1 of arXiv 1804.03999; theta's stride is 2."""
        gate, rng = AttentionGate(), np.random.default_rng(0)
        coarse = rng.normal(size=self.coarse.shape).astype(np.float32)
        shapes = jax.eval_shape(gate.init, jax.random.key(0), self.skip, coarse)
        variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
        theta, phi, psi = (variables["params"][name] for name in ("theta", "phi", "psi"))
        expected = np.zeros((2, 3))
        for i, j in np.ndindex(2, 3):
            window = self.skip[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            hidden = np.tensordot(window, theta["kernel"], 3)
            hidden += coarse[0, i, j] @ phi["kernel"][0, 0] + phi["bias"]
            score = np.maximum(0, hidden) @ psi["kernel"][0, 0] + psi["bias"]
            expected[i, j] = 1 / (1 + np.exp(-score[0]))
        expected = jax.image.resize(expected, (4, 6), "bilinear")[..., None]
        y = jax.jit(gate.apply)(variables, self.skip, coarse)
        np.testing.assert_allclose(y[0], expected * self.skip[0], rtol=1e-4, atol=1e-6)

    def test_it_starts_open(self):
        init = jax.jit(AttentionGate().init_with_output)
        y, variables = init(jax.random.key(1), 1e-3 * self.skip, 1e-3 * self.coarse)
        np.testing.assert_allclose(y, 0.95 * 1e-3 * self.skip, rtol=0.01)
        shapes = {name: layer["kernel"].shape for name, layer in variables["params"].items()}
        assert shapes == {"theta": (2, 2, 5, 2), "phi": (1, 1, 7, 2), "psi": (1, 1, 2, 1)}


@pytest.mark.parametrize("name", ["fcn", "unet"])
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    single, half = make(name=name), make(name=name, dtype="bfloat16")
    variables = initialize(half)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    expected, logits = apply(single, variables, image), apply(half, variables, image)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("encoder", ["alexnet", "vgg16", "googlenet", "resnet18"])
def test_every_encoder_computes_in_bfloat16_near_float32(encoder):
    fields = {"encoder": encoder, "name": "fcn", "skips": (), "upsampling": "nearest"}
    image = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    variables = initialize(make(**fields))
    # Unit gain: what a deep network with larger weights computes would be chaotic.
    unit = lambda x: x * (2 / x[..., 0].size) ** 0.5 / 0.3 if x.ndim == 4 else x
    variables["params"] = jax.tree.map(unit, variables["params"])
    logits = {}
    for dtype in ("float32", "bfloat16"):
        logits[dtype] = apply(make(**fields, dtype=dtype), variables, image)
        assert logits[dtype].dtype == jnp.float32
    scale = float(jnp.abs(logits["float32"]).max())
    assert scale > 0
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.1 * scale)


def loss_and_gradients(model, variables, image):
    """Of a training step's forward pass, with dropout and batch statistics."""

    def loss(params):
        logits, mutated = model.apply(
            variables | {"params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(7)},
        )
        return (logits**2).mean(), mutated

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize(
    "fields",
    [
        {"widths": (3, 4), "convs_per_level": 1},
        {"encoder": "alexnet", "name": "fcn", "skips": ()},
        {"encoder": "resnet18", "name": "fcn", "skips": ()},
    ],
    ids=str,
)
def test_rematerialization_changes_neither_values_nor_gradients(fields):
    image = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    plain, remat = (make(remat=remat, dropout=0.5, **fields) for remat in (False, True))
    variables = initialize(plain)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes_of(remat))
    expected = loss_and_gradients(plain, variables, image)
    for a, b in zip(
        jax.tree.leaves(loss_and_gradients(remat, variables, image)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", FAMILIES)
def test_every_stage_of_an_encoder_is_rematerialized(encoder, monkeypatch):
    """One checkpoint per stage of the encoder, seen in the program."""
    stages, stage = [], Encoder.stage
    monkeypatch.setattr(Encoder, "stage", lambda *parts: stages.append(parts) or stage(*parts))
    model = make(encoder=encoder, remat=True, upsampling="nearest", name="fcn", skips=())
    variables = shapes_of(model)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    stages.clear()
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, image)
    found = sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in program.eqns)
    assert found == len(stages) > 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"encoder": "resnet18"},
        {"encoder": "vgg16", "name": "fcn"},
    ],
    ids=str,
)
def test_dropout_is_at_the_deepest_features_and_only_in_training(fields):
    model = make(dropout=0.5, norm="none", **fields)
    variables = initialize(model)
    image = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))

    @functools.partial(jax.jit, static_argnames="train")
    def encode(train, key):
        return model.apply(
            variables,
            image,
            method=lambda m, x: m.encoder(x, train=train),
            rngs={"dropout": key},
        ).features

    deepest = model.encoder.spec.strides[-1]
    keys = jax.random.key(0), jax.random.key(1)
    still, first, second = encode(False, keys[0]), encode(True, keys[0]), encode(True, keys[1])
    assert np.any(first[deepest] != second[deepest])
    assert np.mean(first[deepest] == 0) > np.mean(still[deepest] == 0)
    for stride in set(still) - {deepest}:
        np.testing.assert_array_equal(first[stride], still[stride])


def test_a_frozen_encoder_has_no_gradient_and_keeps_its_statistics():
    model = make(widths=(3, 4), freeze_encoder=True)
    variables = initialize(model)
    image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    (_, mutated), gradients = loss_and_gradients(model, variables, image)
    assert not any(np.any(g) for g in jax.tree.leaves(gradients["encoder"]))
    assert any(np.any(g) for g in jax.tree.leaves(gradients["decoder"]))
    before, after = variables["batch_stats"], mutated["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), after["decoder"], before["decoder"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["fcn", "unet"])
@pytest.mark.parametrize("encoder", FAMILIES)
def test_encoders_keep_their_contract(encoder, name):
    spec = make(encoder=encoder, name=name).encoder.spec
    features, switches = pyramid_shapes(name, encoder)
    stride = spec.strides[-1]
    assert tuple(sorted(features)) == spec.strides
    for s, x in features.items():
        assert x.shape[1:3] == (2 * stride // s, 3 * stride // s)
    assert tuple(sorted(switches)) == spec.switch_strides
    for s, winners in switches.items():
        b, h, w, c = features[s].shape
        assert winners.shape == (b, h // 2, w // 2, c)


# Parameters of the published networks: FCN's table 1 (arXiv 1411.4038) says 57 M, 134 M and 6 M
# with 21 classes, U-Net's paper none, but its figure 1 gives 31.03 M with biases and 2 classes.
@pytest.mark.parametrize(
    ("fields", "num_classes", "millions"),
    [
        ({"name": "fcn", "encoder": "alexnet", "skips": (), "norm": "none"}, 21, 57.1),
        ({"name": "fcn", "encoder": "vgg16", "skips": (), "norm": "none"}, 21, 134.3),
        ({"name": "fcn", "encoder": "googlenet", "skips": ()}, 21, 5.6),
        ({"widths": (64, 128, 256, 512, 1024), "norm": "none", "padding": "VALID"}, 2, 31.03),
    ],
    ids=["alexnet", "vgg16", "googlenet", "unet"],
)
def test_published_networks_have_their_number_of_parameters(fields, num_classes, millions):
    config = base.get_config().model
    config.upsampling = "bilinear" if fields.get("name") == "fcn" else "transposed_conv"
    with config.ignore_type():
        config.update(fields)
    params = shapes_of(models.build(config, num_classes), channels=3)["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    digits = 2 if millions == 31.03 else 1
    assert round(count / 1e6, digits) == millions


UNPADDED = {"padding": "VALID", "norm": "none", "widths": (3, 4, 5, 6, 7)}


class TestPaperUNet:
    """The network of figure 1 (arXiv 1505.04597): 572 x 572 in, 388 x 388 out."""

    def test_572_gives_388_through_23_convolutions(self):
        model = make(**UNPADDED)
        variables = shapes_of(model, channels=1)
        tile = model.clone(has_context=True)
        assert logits_shape_of_gray(tile, variables, 572) == (1, 388, 388, NUM_CLASSES)
        convolutions = [
            path
            for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
            if path[-1].key == "kernel"
        ]
        assert len(convolutions) == 23
        assert model.context == (572 - 388) // 2

    def test_context_is_what_is_mirrored_without_it(self):
        model = make(**UNPADDED)
        variables = initialize(model, channels=1)
        image = jax.random.normal(jax.random.key(0), (1, 22, 5, 1))
        m = model.context
        mirrored = jnp.pad(image, ((0, 0), (m, m), (m, m), (0, 0)), mode="reflect")
        inner = apply(model.clone(has_context=True), variables, mirrored)
        np.testing.assert_allclose(inner, apply(model, variables, image), rtol=1e-5)

    @pytest.mark.parametrize(
        "upsampling", ["transposed_conv", "nearest", "bed_of_nails", "max_unpool"]
    )
    def test_a_tile_sees_what_the_whole_image_does(self, upsampling):
        """Overlap-tile (figure 2): no pixel of a core depends on where the tile was cut."""
        model = make(**UNPADDED, upsampling=upsampling)
        variables = initialize(model, channels=1)
        model, m = model.clone(has_context=True), model.context
        image = jax.random.normal(jax.random.key(0), (1, 52 + 2 * m, 36 + 2 * m, 1))
        whole = apply(model, variables, image)
        # Cut at a multiple of the deepest stride: pooling windows are the same ones.
        tile = apply(model, variables, image[:, 16 : 36 + 2 * m, : 20 + 2 * m])
        np.testing.assert_allclose(tile, whole[:, 16:36, :20], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "fields",
        [*({"upsampling": name} for name in UPSAMPLERS), *({"fusion": name} for name in FUSIONS)],
        ids=str,
    )
    def test_any_upsampling_and_fusion_fits(self, fields):
        model = make(**UNPADDED, **fields)
        assert logits_shape(model, shapes_of(model), (9, 14)) == (2, 9, 14, NUM_CLASSES)


def logits_shape_of_gray(model, variables, length):
    image = jax.ShapeDtypeStruct((1, length, length, 1), jnp.float32)
    return jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image).shape


@pytest.mark.parametrize("size", [6, 7])
def test_the_convolutional_classifier_is_a_fully_connected_one(size):
    """On a map of the training size, at the pixel whose window is all of it."""
    classifier = Classifier(features=5, kernel_size=size)
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    y, variables = classifier.init_with_output(jax.random.key(1), x, train=False)
    fc6, fc7 = (variables["params"][name]["kernel"] for name in ("fc6", "fc7"))
    hidden = jax.nn.relu(x.reshape(2, -1) @ fc6.reshape(-1, 5))
    expected = jax.nn.relu(hidden @ fc7[0, 0])
    np.testing.assert_allclose(y[:, size // 2, size // 2], expected, rtol=1e-4, atol=1e-5)
    # And around it the same weights slide over the map, with zeros beyond its edge.
    before = size // 2
    padding = ((before, size - 1 - before),) * 2
    slid = jax.lax.conv_general_dilated(
        x, fc6, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(y, jax.nn.relu(jax.nn.relu(slid) @ fc7[0, 0]), atol=1e-4)


def test_segnet_basic_is_a_set_of_fields():
    """Four 7x7 convolutions down, four up, one classifier; no layer at the bottom."""
    model = make(
        widths=(4, 4, 4, 4),
        convs_per_level=1,
        kernel_size=7,
        bottleneck=False,
        decoder_relu=False,
        upsampling="max_unpool",
        skips=(),
    )
    params = shapes_of(model)["params"]
    kernels = [x.shape for x in jax.tree.leaves(params) if x.ndim == 4]
    assert sorted(kernels) == [(1, 1, 4, 3), (7, 7, 3, 4), *[(7, 7, 4, 4)] * 7]
    # Behind its norm, a convolution's output keeps its sign.
    image = jnp.ones((1, 16, 16, 3))
    logits, state = apply(model, initialize(model), image, capture_intermediates=True)
    decoded = state["intermediates"]["decoder"]["stride1"]["__call__"][0]
    assert np.any(decoded < 0) and logits.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("conv", ["depthwise", "none"])
def test_a_decoder_may_filter_each_channel_by_itself_or_not_at_all(conv):
    make_one = functools.partial(make, fusion="add", upsampling="bilinear", convs_per_level=1)
    full, lighter = (
        shapes_of(make_one(decoder_conv=how))["params"]["decoder"] for how in ("full", conv)
    )
    for stride, width in ((4, 5), (2, 4), (1, 3)):
        assert full[f"stride{stride}"]["conv1"]["conv"]["kernel"].shape == (3, 3, width, width)
        if conv == "none":
            assert f"stride{stride}" not in lighter
        else:
            kernel = lighter[f"stride{stride}"]["conv1"]["conv"]["kernel"]
            assert kernel.shape == (3, 3, 1, width)
    assert len(full) - len(lighter) == (3 if conv == "none" else 0)


def test_a_depthwise_decoder_keeps_channels_apart():
    fields = {"decoder_conv": "depthwise", "skips": (), "upsampling": "nearest", "norm": "none"}
    decoder = make(**fields, widths=(3, 3), convs_per_level=1, decoder_relu=False).decoder
    kernel = jnp.arange(27.0).reshape(3, 3, 1, 3)
    conv = {"kernel": kernel, "bias": jnp.zeros(3)}
    head = {"kernel": jnp.eye(3)[None, None], "bias": jnp.zeros(3)}
    variables = {"params": {"stride1": {"conv1": {"conv": conv}}, "head": head}}
    x = jnp.zeros((1, 4, 4, 3)).at[..., 1].set(1.0)
    y, _ = decoder.apply(variables, Pyramid({2: x, 1: jnp.zeros((1, 8, 8, 3))}), train=False)
    np.testing.assert_allclose(y[0, 4, 4], [0, kernel[..., 0, 1].sum(), 0])


class TestFCNScores:
    def test_gradually_means_by_two_whatever_is_fused(self):
        fields = {"name": "fcn", "upsampling": "transposed_conv", "skips": (2,)}
        at_once, gradual = (
            shapes_of(make(**fields, gradual=gradual))["params"]["decoder"]
            for gradual in (False, True)
        )
        assert {name: at_once[name]["kernel"].shape[0] for name in ("up2", "up1")} == {
            "up2": 4,
            "up1": 2,
        }
        sizes = {name: gradual[name]["kernel"].shape[0] for name in ("up4", "up2", "up1")}
        assert set(sizes.values()) == {2}
        assert gradual.keys() - at_once.keys() == {"up4"}

    def test_zero_init_gives_zero_scores_everywhere(self):
        features, _ = pyramid_shapes("fcn", "plain")
        pyramid = Pyramid(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), features))
        for zero_init in (True, False):
            decoder = make(name="fcn", zero_init=zero_init, upsampling="bilinear").decoder
            init = jax.jit(lambda key, d=decoder: d.init_with_output(key, pyramid, train=False))
            (logits, _), _ = init(jax.random.key(0))
            assert np.any(logits) != zero_init

    def test_scales_multiply_the_features_of_their_skip(self):
        fields = {"name": "fcn", "upsampling": "bilinear", "skips": (4, 2)}
        scaled, plain = make(**fields, score_scales=(0.5, 0.25)), make(**fields)
        variables = initialize(plain)
        image = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
        expected = apply(scaled, variables, image)
        for stride, scale in ((4, 0.5), (2, 0.25)):
            score = variables["params"]["decoder"][f"score{stride}"]
            score["kernel"] = scale * score["kernel"]
        logits = apply(plain, variables, image)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_models_submodules_are_the_encoder_and_the_decoder():
    """The names that pretrained weights, freezing and the encoder's learning rate rely on."""
    assert set(shapes_of(make())["params"]) == {"encoder", "decoder"}


@pytest.mark.parametrize(("padding", "margin"), [("SAME", 0), (2, 0), ("VALID", 2)])
def test_a_convolution_may_be_dilated(padding, margin):
    """Its taps are that many pixels apart."""
    conv = ConvNorm(3, padding=padding, norm="none", activation=None, dilation=2)
    x = jax.random.normal(jax.random.key(0), (1, 9, 8, 2))
    y, variables = conv.init_with_output(jax.random.key(1), x, train=False)
    kernel = variables["params"]["conv"]["kernel"]
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = sum(
        padded[:, 2 * i : 2 * i + 9, 2 * j : 2 * j + 8] @ kernel[i, j] for i, j in np.ndindex(3, 3)
    )
    middle = (slice(None), slice(margin, 9 - margin), slice(margin, 8 - margin))
    np.testing.assert_allclose(y, expected[middle], rtol=1e-4, atol=1e-5)
