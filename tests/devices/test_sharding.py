"""Tests that losses and confusion matrices are the same on any number of devices."""

import functools
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.conformance import CASES, golden_input
from dense_jax.losses import LOSSES
from dense_jax.metrics import confusion_matrix
from tests.conftest import REPOSITORY
from tests.test_losses import loss_of


def measure(logits: jax.Array, labels: jax.Array) -> tuple[dict, jax.Array]:
    """Every loss with its gradient, and the confusion matrix."""
    losses = {name: jax.value_and_grad(loss_of(name))(logits, labels) for name in LOSSES}
    return losses, confusion_matrix(logits.argmax(axis=-1), labels, 3)


def compare() -> None:
    """A batch of 8 images over 1, 2, 4 and 8 devices; then each image by itself, 8 at once."""
    logits, labels = (np.concatenate(x) for x in zip(*map(golden_input, CASES), strict=True))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    one_device = jax.jit(measure)
    expected = one_device(logits, labels)
    for n in (1, 2, 4, 8):
        mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        batch = jax.device_put((logits, labels), sharding)
        jax.tree.map(close, jax.jit(measure)(*batch), expected)

    images = logits[:, None], labels[:, None]
    of_images = [one_device(*image) for image in zip(*images, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *of_images)
    jax.tree.map(close, jax.jit(jax.vmap(measure))(*jax.device_put(images, sharding)), expected)
    jax.tree.map(close, jax.pmap(measure)(*images), expected)


# 17. segmentation_models.pytorch#207, #226, DABNet#8: mean IoU depends on the batch size
def test_any_number_of_devices_gives_the_same():
    """In a process of its own: the other tests have four devices."""
    code = (
        "import jax; from tests.devices.test_sharding import compare; "
        "jax.config.update('jax_num_cpu_devices', 8); compare()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
