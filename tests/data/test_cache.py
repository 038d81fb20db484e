"""Tests that caches in host and device memory give the same batches as no cache."""

import gc
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dense_jax import data
from dense_jax.data import cache
from dense_jax.data.cache import Cached
from dense_jax.devices import mesh
from dense_jax.training import device_cache
from tests.conftest import mesh_of
from tests.data.test_pipeline import BORDERED, CANVAS, NUM_EXAMPLES, Scenes, assert_equal, take

WHOLE = (12, 12)  # a canvas that Scenes fit


def mapped() -> set[str]:
    """Returns the caches that this process has mapped, as device and inode."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {" ".join(line.split()[3:5]) for line in lines if "memfd:dense_jax" in line}


def load(source, canvas=WHOLE, num_devices=4):
    devices = mesh_of(num_devices)
    shapes = {
        "image": jax.ShapeDtypeStruct((4, *canvas, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((4, *canvas), np.uint8),
        "size": jax.ShapeDtypeStruct((4, 2), np.int32),
        "index": jax.ShapeDtypeStruct((4,), np.uint32),
    }
    shapes |= {f.name: jax.ShapeDtypeStruct((4, *canvas), f.dtype) for f in source.fields}
    return devices, *device_cache.load(source, shapes, devices)


def test_each_example_is_decoded_once_and_stays_what_it_is():
    source = Scenes()
    cached = Cached(source)
    for i in [*range(NUM_EXAMPLES)] * 2:
        example, expected = cached[i], Scenes()[i]
        assert example["name"] == expected["name"]
        for key in ("image", "label"):
            np.testing.assert_array_equal(example[key], expected[key])
            assert example[key].dtype == np.uint8 and not example[key].flags.writeable
    assert source.made == NUM_EXAMPLES == len(cached)
    np.testing.assert_array_equal(cached.sizes, source.sizes)


def test_batches_are_those_without_a_cache():
    assert_equal(take(5, source=Cached(BORDERED)), take(5, source=BORDERED))


class Telling(Cached):
    """A cache that names each example after the caches which the reading process has mapped."""

    def __getitem__(self, i):
        return super().__getitem__(i) | {"name": " ".join(sorted(mapped()))}


def test_worker_processes_share_one_copy_and_change_nothing():
    gc.collect()
    before = mapped()
    cached = Telling(BORDERED)
    (ours,) = mapped() - before
    assert len(pickle.dumps(cached)) < 2000
    batches = take(4, source=cached, workers=2, step=1)
    assert {name for batch in batches for name in batch.pop("name")} == {ours}
    expected = take(5, source=BORDERED)[1:]
    assert_equal(batches, [{k: v for k, v in batch.items() if k != "name"} for batch in expected])


@pytest.mark.parametrize(
    "source, batch_size, num_devices",
    [(Scenes(), 4, 1), (BORDERED, 8, 1), (BORDERED, 4, 4), (Scenes(), 8, 4)],
)
def test_gathered_batches_are_those_of_the_host(source, batch_size, num_devices):
    devices, resident, rows = load(source, num_devices=num_devices)
    assert all(array.is_fully_replicated for array in resident.values())
    gather = jax.jit(
        lambda resident, batch: device_cache.gather(resident, batch),
        in_shardings=(mesh.replicated(devices), mesh.sharded(devices)),
    )
    gathered = []
    for batch in take(5, source=rows, canvas=None, batch_size=batch_size, step=1):
        on_device = gather(resident, mesh.to_global(batch, devices))
        assert on_device["image"].sharding.is_equivalent_to(mesh.sharded(devices), 4)
        gathered.append(dict(on_device, name=batch["name"]))
        del gathered[-1]["row"]
    assert_equal(gathered, take(5, source=source, canvas=WHOLE, batch_size=batch_size, step=1))


def test_hosts_draw_their_own_rows():
    rows = [{"row": np.int32(i), "name": str(i)} for i in range(NUM_EXAMPLES)]
    whole, *hosts = (
        np.stack([batch["row"] for batch in take(5, source=rows, canvas=None, **options)])
        for options in ({}, {"host": 0, "num_hosts": 2}, {"host": 1, "num_hosts": 2})
    )
    np.testing.assert_array_equal(np.concatenate(hosts, axis=1), whole)


def test_the_memory_goes_with_the_cache():
    gc.collect()
    before = mapped(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        Cached(Scenes())[1 // 0]
    gc.collect()
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("make", [Cached, lambda source: load(source, (16, 16))])
def test_bad_examples_are_listed(tiny_folder, tmp_path, make):
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    for name in ("2", "5"):
        (root / "labels" / "train" / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 7 examples are bad:\n.*2\.png.*\n.*5\.png"):
        make(data.open_dataset("folder", str(root), "train"))


def test_what_does_not_fit_is_refused_before_it_is_decoded(monkeypatch):
    source = Scenes()
    with pytest.raises(ValueError, match=r"7 of 7 are larger than .*\(8, 12\): make it \(11, 9\)"):
        load(source, CANVAS)
    monkeypatch.setattr(device_cache, "free_memory", lambda device: 10.0)
    with pytest.raises(
        ValueError, match=r"0\.00 GB of memory for 7 examples of 12 x 12 .* on cpu:0"
    ):
        load(source)
    monkeypatch.setattr(cache, "free_memory", lambda: 7.0 * 11 * 9 * 4)
    assert len(Cached(source)) == NUM_EXAMPLES == source.made
    for refused in (lambda: Cached(BORDERED), lambda: load(source)):
        with pytest.raises(ValueError, match=r"for 7 examples.*, but only 0\.00 GB are free"):
            refused()
    assert source.made == NUM_EXAMPLES
