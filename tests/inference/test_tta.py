"""Tests that test-time augmentation is bitwise equivariant under the symmetries of a square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.inference import tta
from tests.conftest import AS_USUAL

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
CHANGES = {
    "left-right": np.fliplr,
    "top-bottom": np.flipud,
    "both": lambda x: np.rot90(x, 2),
    "quarter": np.rot90,
    "three quarters": lambda x: np.rot90(x, 3),
    "diagonal": lambda x: x.swapaxes(0, 1),
    "other diagonal": lambda x: np.rot90(x, 2).swapaxes(0, 1),
}
KEPT = {
    "flip": ["left-right"],
    "flips": ["left-right", "top-bottom", "both"],
    "turns": ["quarter", "both", "three quarters"],
    "flip,turns": list(CHANGES),
    "flips,turns,scales": list(CHANGES),
}


def logits_step(kernel, image):
    """A convolution that is not symmetric, of pixels whose sums are rounded."""
    x = jnp.asarray(image, jnp.float32)[None] / 77
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


@pytest.fixture(scope="module", params=KEPT)
def step(request):
    names = request.param.split(",")
    step = tta.make_probabilities_step(logits_step, names)
    return request.param, jax.jit(step, compiler_options=AS_USUAL)


@pytest.mark.parametrize("size", [(12, 12), (10, 15)], ids=str)
def test_the_prediction_of_a_changed_image_is_the_changed_prediction(step, size):
    names, step = step
    image = RNG.integers(0, 256, (*size, 3)).astype(np.uint8)
    probabilities = np.asarray(step(KERNEL, image))
    assert probabilities.shape == (*size, 4)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    for name in KEPT[names]:
        changed = np.asarray(step(KERNEL, np.ascontiguousarray(CHANGES[name](image))))
        np.testing.assert_array_equal(changed, CHANGES[name](probabilities), err_msg=name)


@pytest.mark.parametrize("names", [names for names in KEPT if "scales" not in names])
def test_it_is_the_mean_of_the_changed_copies(names):
    step = tta.make_probabilities_step(logits_step, names.split(","))
    image = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
    inverse = CHANGES | {"quarter": CHANGES["three quarters"], "three quarters": np.rot90}
    total = np.asarray(jax.nn.softmax(logits_step(KERNEL, image)))
    for name in KEPT[names]:
        copy = np.ascontiguousarray(CHANGES[name](image))
        total = total + inverse[name](np.asarray(jax.nn.softmax(logits_step(KERNEL, copy))))
    np.testing.assert_allclose(
        step(KERNEL, jnp.asarray(image)), total / (1 + len(KEPT[names])), rtol=1e-5
    )


def test_scales_are_a_mean_over_sizes():
    seen = []

    def one_value(variables, image):
        seen.append(image.shape[:2])
        return jnp.stack([image[..., 0] / 99.0, jnp.zeros(image.shape[:2])], axis=-1)

    image = np.full((8, 12, 1), 130, np.uint8)
    probabilities = tta.make_probabilities_step(one_value, ["scales"])(None, jnp.asarray(image))
    assert set(seen) == {(6, 9), (8, 12), (10, 15)}
    np.testing.assert_allclose(probabilities[..., 0], 1 / (1 + np.exp(-130 / 99)), rtol=1e-6)


def test_an_unknown_augmentation_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no augmentation \['flops'\]; there are: flip, flips"):
        tta.make_probabilities_step(logits_step, ["flops"])
