"""Tests the network's steps for any size and resolution, with the same results in any batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax import metrics, program
from dense_jax.devices import mesh
from dense_jax.models.layers import resize
from dense_jax.models.normalization import unit
from tests.conftest import mesh_of
from tests.training.test_steps import Net, batch, init

VARIABLES = init().variables()


def bound(resolution=1.0):
    """Returns predict_step of the small network."""
    logits_step = functools.partial(
        program.logits_step, model=Net(), normalize=unit, resolution=resolution
    )
    return functools.partial(program.predict_step, logits_step=logits_step)


@pytest.mark.parametrize("resolution", [1.0, 0.5, 0.3])
def test_predictions_have_the_images_size_at_any_resolution(resolution):
    predict = bound(resolution=resolution)
    classes = predict(VARIABLES, jnp.asarray(batch()["image"][0, :11, :7]))
    assert classes.shape == (11, 7) and classes.dtype == jnp.uint8


@pytest.mark.parametrize("size", [(22, 14), (6, 4), (9, 19), (1, 1)], ids=str)
def test_resizing_is_bilinear_interpolation(size):
    image = jax.random.normal(jax.random.key(0), (11, 7, 3))
    expected = jax.image.resize(image, (*size, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize(image, size), expected, atol=2e-5)


def test_evaluation_of_an_example_does_not_depend_on_its_batch_or_device():
    examples = batch()
    confusion = functools.partial(metrics.confusion_matrix, num_classes=3)
    eval_step = functools.partial(program.eval_step, predict_step=bound(), num_classes=3)
    for num_devices, size in ((1, 8), (1, 1), (4, 4)):
        devices = mesh_of(num_devices)
        some = {name: array[:size] for name, array in examples.items()}
        counted, maps = mesh.map_examples(eval_step, devices)(
            VARIABLES, mesh.to_global(some, devices)
        )
        classes = maps["classes"]
        np.testing.assert_array_equal(maps["label"], some["label"])
        counts = counted["counts"]
        np.testing.assert_array_equal(counted["index"], some["index"])
        assert counts.shape == (size, 3, 3)
        np.testing.assert_array_equal(
            counts[0], confusion(classes[0], jnp.asarray(examples["label"][0]))
        )
        if size == 8:
            expected = counts, classes
        np.testing.assert_array_equal(counts, expected[0][:size])
        np.testing.assert_array_equal(classes, expected[1][:size])
