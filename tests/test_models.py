"""Every model x upsampling x skips, through `build` alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax import models
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import max_pool
from dense_jax.models.upsampling import UPSAMPLERS, enlarge_bilinear
from experiments import base

NUM_CLASSES = 3
WIDTHS = (3, 4, 5, 6)  # strides 1, 2, 4, 8


def make(**fields):
    config = base.get_config().model
    config.widths = WIDTHS
    with config.ignore_type():
        config.update(fields)
    return models.build(config, NUM_CLASSES)


def initialise(model, channels=3):
    """Random variables of the right shapes, without compiling the model's own initialisation."""
    image = jax.ShapeDtypeStruct((1, 16, 16, channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    variables = jax.tree.map(fill, shapes)
    if "batch_stats" in variables:  # variances
        variables["batch_stats"] = jax.tree.map(lambda x: abs(x) + 0.5, variables["batch_stats"])
    return variables


def logits_shape(model, variables, size):
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    assert logits.dtype == jnp.float32
    return logits.shape


@pytest.mark.parametrize("upsampling", UPSAMPLERS)
@pytest.mark.parametrize("name", models.MODELS)
def test_logits_have_the_size_of_any_input(name, upsampling):
    model = make(name=name, upsampling=upsampling)
    variables = initialise(model)
    for size in [(1, 1), (7, 9), (16, 24), (33, 2), (1, 70)]:
        assert logits_shape(model, variables, size) == (2, *size, NUM_CLASSES)


def test_every_size_from_1_to_70_is_padded_to_the_stride_and_cropped_back():
    class Encoder(nn.Module):
        strides = (1, 32)

        def __call__(self, image, *, train):
            assert image.shape[1] % 32 == image.shape[2] % 32 == 0
            return image

    class Decoder(nn.Module):
        def __call__(self, pyramid, *, train):
            return pyramid

    model = models.Segmenter(Encoder(), Decoder())
    for h in range(1, 71):
        assert logits_shape(model, {}, (h, 71 - h)) == (2, h, 71 - h, 3)


@pytest.mark.parametrize("name", models.MODELS)
def test_padding_to_the_stride_leaves_the_visible_part_alone(name):
    model = make(name=name)
    variables = initialise(model)
    image = jax.random.normal(jax.random.key(1), (1, 13, 11, 3))
    padded = jnp.pad(image, ((0, 0), (0, 3), (0, 5), (0, 0)), mode="edge")
    np.testing.assert_array_equal(
        model.apply(variables, image, train=False),
        model.apply(variables, padded, train=False)[:, :13, :11],
    )


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("skips", [(), (4,), (1, 4), (2,), None], ids=str)
def test_each_skip_and_no_other_connects_its_stride_to_the_output(name, skips):
    model = make(name=name, skips=skips, norm="none")
    variables = initialise(model)
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    pyramid = model.apply(variables, image, method=lambda m, x: m.encoder(x, train=False))

    def output(features):
        decode = lambda m: m.decoder(pyramid.replace(features=features), train=False)
        return model.apply(variables, method=decode).std()

    gradients = jax.grad(output)(dict(pyramid.features))
    connected = {stride for stride, g in gradients.items() if np.any(g)}
    assert connected == {8, *((1, 2, 4) if skips is None else skips)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "segformer"}, "model.name.*'segformer'.*'fcn', 'unet'"),
        ({"encoder": "vgg99"}, "model.encoder.*'vgg99'.*'plain'"),
        ({"upsampling": "cubic"}, "model.upsampling.*'bilinear'"),
        ({"fusion": "mul"}, "model.fusion.*'concat', 'add'"),
        ({"norm": "layer"}, "model.norm.*'batch', 'group', 'none'"),
        ({"dtype": "float64"}, "model.dtype.*'float32', 'bfloat16'"),
        ({"skips": (3,)}, "model.skips: 3 is not one of 1, 2, 4"),
        ({"skips": (8,)}, "model.skips: 8 is not one of 1, 2, 4"),
        ({"skips": (2, 2)}, "twice"),
        ({"widths": ()}, "model.widths"),
        ({"widths": (4, 0)}, "model.widths"),
        ({"pretrained": "vgg.npz"}, "model.pretrained"),
        ({"upsampling_options": {"stride": 3}}, "'stride' is not one of 'kernel_size'"),
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


@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_fusions_and_norms_train(fusion, norm):
    model = make(fusion=fusion, norm=norm)
    variables = initialise(model, channels=1)
    logits, mutated = model.apply(
        variables, jnp.ones((2, 8, 8, 1)), train=True, mutable=["batch_stats"]
    )
    assert np.all(np.isfinite(logits))
    assert bool(mutated.get("batch_stats")) == (norm == "batch")


def test_adding_fuses_in_place_and_concatenating_widens():
    def head_inputs(fusion):
        return initialise(make(fusion=fusion))["params"]["decoder"]["stride1"]["Conv_0"]["kernel"]

    assert head_inputs("concat").shape[2] == 2 * WIDTHS[0]
    assert head_inputs("add").shape[2] == WIDTHS[0]


@pytest.mark.parametrize("name", models.MODELS)
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    single, half = make(name=name), make(name=name, dtype="bfloat16")
    variables = initialise(half)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    expected = single.apply(variables, image, train=False)
    logits = half.apply(variables, image, train=False)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_encoders_keep_their_contract():
    for make_encoder in ENCODERS.values():
        encoder = make_encoder(widths=WIDTHS)
        stride = encoder.strides[-1]
        image = jnp.ones((1, 2 * stride, 3 * stride, 3))
        pyramid, _ = encoder.init_with_output(jax.random.key(0), image, train=False)
        assert tuple(pyramid.features) == encoder.strides == tuple(sorted(encoder.strides))
        for s, x in pyramid.features.items():
            assert x.shape[1:3] == (2 * stride // s, 3 * stride // s)
        for s, winners in pyramid.switches.items():
            b, h, w, c = pyramid.features[s].shape
            assert winners.shape == (b, h // 2, w // 2, c)


def test_max_pool_equals_flax_and_switches_point_at_the_maximum():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    pooled, switches = max_pool(x)
    np.testing.assert_array_equal(pooled, nn.max_pool(x, (2, 2), (2, 2)))
    b, i, j, c = np.indices(pooled.shape)
    row, column = np.divmod(np.asarray(switches), 2)
    np.testing.assert_array_equal(np.asarray(x)[b, 2 * i + row, 2 * j + column, c], pooled)


@pytest.mark.parametrize("upsampling", UPSAMPLERS)
@pytest.mark.parametrize("factor", [2, 4])
def test_upsamplers_enlarge_by_their_factor(upsampling, factor):
    up = UPSAMPLERS[upsampling](features=5, factor=factor)
    y, _ = up.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4, 6)))
    assert y.shape == (2, 3 * factor, 4 * factor, 5)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_bilinear_has_half_pixel_centres(size, factor):
    x = jax.random.normal(jax.random.key(0), (1, size, 3, 2))
    expected = jax.image.resize(x, (1, factor * size, 3, 2), "bilinear")
    np.testing.assert_allclose(enlarge_bilinear(x, factor, axis=1), expected, atol=1e-6)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_interpolation_keeps_constants(upsampling):
    up = UPSAMPLERS[upsampling](features=1)
    y, _ = up.init_with_output(jax.random.key(0), jnp.ones((1, 3, 3, 4)))
    np.testing.assert_allclose(y, np.broadcast_to(y[0, 0, 0, 0], y.shape), rtol=1e-6)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("factor", [2, 4])
def test_transposed_conv_scatters_each_pixel_through_its_kernel(kernel, factor):
    """The definition: every input pixel adds its value times the kernel around its output pixels."""
    up = UPSAMPLERS["transposed_conv"](features=3, factor=factor, kernel_size=kernel)
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 2))
    y, variables = up.init_with_output(jax.random.key(1), x)
    weight = np.asarray(variables["params"]["ConvTranspose_0"]["kernel"])
    first = -((kernel - factor + 1) // 2)  # torch's `padding` is cut off at the start
    expected = np.zeros((3 * factor, 4 * factor, 3))
    for i, j, u, v in np.ndindex(3, 4, kernel, kernel):
        row, column = i * factor + u + first, j * factor + v + first
        if 0 <= row < expected.shape[0] and 0 <= column < expected.shape[1]:
            # ConvTranspose stores the kernel mirrored.
            expected[row, column] += np.asarray(x[0, i, j]) @ weight[kernel - 1 - u, kernel - 1 - v]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
