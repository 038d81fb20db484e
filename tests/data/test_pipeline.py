"""Tests that batches do not depend on the number of hosts and workers or on the first step."""

import itertools
import os
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest

from dense_jax.data import Field, Synthetic
from dense_jax.data.pipeline import eval_batches, fit, train_batches
from dense_jax.data.targets import with_border_weights
from dense_jax.labels import IGNORE_LABEL
from dense_jax.metrics import confusion_matrix
from tests.conftest import REPOSITORY

CANVAS = (8, 12)
NUM_EXAMPLES = 7


class Scenes(Synthetic):
    """Images with one axis longer and one shorter than the canvas; counts what it makes."""

    made = 0

    def __init__(self):
        super().__init__("", "train", size=(11, 9), num_examples=NUM_EXAMPLES)

    def __getitem__(self, i):
        self.made += 1
        return super().__getitem__(i)


BORDERED = with_border_weights(Scenes(), weight=10.0, sigma=2.0, classes=("square", "thread"))


def take(num_batches, *, source=None, canvas=CANVAS, seed=3, batch_size=4, **options):
    source = source or Scenes()
    stream = train_batches(source, canvas=canvas, seed=seed, batch_size=batch_size, **options)
    batches = list(itertools.islice(stream, num_batches))
    stream.close()
    return batches


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype.kind == b[key].dtype.kind
            np.testing.assert_array_equal(a[key], b[key])


def test_shapes_and_types():
    (batch,) = take(1)
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "image": ((4, 8, 12, 3), "uint8"),
        "label": ((4, 8, 12), "uint8"),
        "size": ((4, 2), "int32"),
        "index": ((4,), "uint32"),
        "name": ((4,), "<U11"),
    }
    np.testing.assert_array_equal(batch["size"], np.tile([8, 9], (4, 1)))
    assert (batch["label"][:, :, 9:] == IGNORE_LABEL).all()
    assert (batch["label"][:, :, :9] < 6).all()


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_the_batches_of_one_host(num_hosts):
    hosts = [take(5, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    together = [
        {key: np.concatenate([batch[key] for batch in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    assert_equal(together, take(5))


def test_batches_of_one_hold_the_same_examples():
    fours = {key: np.concatenate([batch[key] for batch in take(2)]) for key in take(1)[0]}
    ones = take(8, batch_size=1)
    assert_equal([{key: np.concatenate([b[key] for b in ones]) for key in fours}], [fours])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_started_at_a_step_it_goes_on_as_if_never_stopped(step):
    assert_equal(take(7)[step:], take(7 - step, step=step))
    assert_equal(
        take(7, host=1, num_hosts=2)[step:], take(7 - step, step=step, host=1, num_hosts=2)
    )


def test_border_weights_come_with_the_label_and_change_nothing_else():
    batches = take(7, source=BORDERED)
    borders = [batch["border"] for batch in batches]
    assert borders[0].dtype == np.float32 and np.max(borders) > 1
    for border, batch in zip(borders, batches, strict=True):
        assert (border[np.isin(batch["label"], (2, 4, IGNORE_LABEL))] == 0).all()
    without = [{key: batch[key] for key in batch if key != "border"} for batch in batches]
    assert_equal(without, take(7))
    twos = take(14, source=BORDERED, batch_size=2)
    np.testing.assert_array_equal(
        np.concatenate([batch["border"] for batch in twos]), np.concatenate(borders)
    )


def test_each_epoch_is_another_permutation():
    epochs = np.concatenate([batch["name"] for batch in take(7, batch_size=4)]).reshape(4, -1)
    for epoch in epochs:
        assert len(set(epoch)) == NUM_EXAMPLES
    assert len({tuple(epoch) for epoch in epochs}) > 1
    numbers = np.concatenate([batch["index"] for batch in take(7)])
    np.testing.assert_array_equal(numbers, np.arange(28))


def test_the_seed_decides_order_and_windows():
    assert_equal(take(2, seed=5), take(2, seed=5))
    names = [np.concatenate([b["name"] for b in take(7, seed=s)]).tolist() for s in (5, 6)]
    assert names[0] != names[1]


REPEATS = np.array([1.0, 1.0, 3.0, 1.0, 1.7, 1.0, 1.0])


def test_an_epoch_repeats_examples_by_their_weights():
    """An image is drawn as often as expected, or once more or less; on average, exactly so."""
    num_epochs, expected = 400, NUM_EXAMPLES * REPEATS / REPEATS.sum()
    rows = [{"row": i} for i in range(NUM_EXAMPLES)]
    options = {"source": rows, "canvas": None, "batch_size": NUM_EXAMPLES, "repeats": REPEATS}
    epochs = [batch["row"] for batch in take(num_epochs, **options)]
    counts = np.array([np.bincount(epoch, minlength=NUM_EXAMPLES) for epoch in epochs])
    assert np.all((counts == np.floor(expected)) | (counts == np.ceil(expected)))
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=4 * 0.5 / num_epochs**0.5)
    first = np.mean([epoch[0] == 2 for epoch in epochs])  # the order is shuffled, too
    assert abs(first - expected[2] / NUM_EXAMPLES) < 0.1


def test_repeats_are_the_same_on_any_hosts_from_any_step_and_in_workers():
    whole = take(5, repeats=REPEATS)
    assert_equal(whole[2:], take(3, step=2, repeats=REPEATS, workers=1))
    hosts = [take(5, host=host, num_hosts=2, repeats=REPEATS) for host in range(2)]
    names = [np.concatenate([a["name"], b["name"]]) for a, b in zip(*hosts, strict=True)]
    np.testing.assert_array_equal(names, [batch["name"] for batch in whole])
    assert any(np.any(a["name"] != b["name"]) for a, b in zip(whole, take(5), strict=True))


def test_windows_differ_between_epochs():
    """An example that is larger than the canvas is not always cut at the same place."""
    seen = {}
    for batch in take(14):
        for name, label in zip(batch["name"], batch["label"], strict=True):
            seen.setdefault(name, set()).add(label.tobytes())
    assert max(map(len, seen.values())) > 1


def test_little_is_read_ahead():
    source = Scenes()
    stream = train_batches(source, canvas=CANVAS, seed=0, batch_size=2)
    next(stream)
    stream.close()
    assert source.made <= 2 * 6


def test_the_message_of_a_source_is_the_last_line_of_its_error():
    class Broken(Scenes):
        def __getitem__(self, i):
            raise ValueError("a.png: broken")

    with pytest.raises(ValueError) as error:
        take(1, source=Broken())
    assert traceback.format_exception(error.value)[-1] == "ValueError: a.png: broken\n"


@pytest.mark.parametrize("make", [train_batches, eval_batches])
def test_batch_size_must_be_divisible_by_hosts(make):
    options = {"canvas": CANVAS, "seed": 0} if make is train_batches else {}
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by 3 hosts"):
        make(Scenes(), batch_size=4, num_hosts=3, **options)


def test_one_pixel_images():
    source = Synthetic("", "train", size=(1, 1), num_examples=1)
    batch = next(train_batches(source, canvas=(1, 1), seed=0, batch_size=2))
    assert batch["image"].shape == (2, 1, 1, 3)


def tiles(num_tiles):
    return [
        {
            "image": np.full((2, 3, 1), k, np.uint8),
            "label": np.full((2, 3), k % 5, np.int32),
            "index": np.int64(k),
        }
        for k in range(num_tiles)
    ]


@pytest.mark.parametrize("num_tiles", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("batch_size, num_hosts", [(1, 1), (3, 1), (4, 2), (8, 4)])
def test_each_tile_once_in_equally_many_batches(num_tiles, batch_size, num_hosts):
    hosts = [
        list(eval_batches(tiles(num_tiles), batch_size=batch_size, host=host, num_hosts=num_hosts))
        for host in range(num_hosts)
    ]
    assert {len(batches) for batches in hosts} == {int(np.ceil(num_tiles / batch_size))}
    seen = []
    for batch in itertools.chain(*hosts):
        assert batch["image"].shape == (batch_size // num_hosts, 2, 3, 1)
        assert batch["label"].dtype == np.uint8
        real = batch["index"] >= 0
        seen += batch["index"][real].tolist()
        assert (batch["label"][real] == batch["index"][real, None, None] % 5).all()
        assert (batch["image"][real, :, :, 0] == batch["index"][real, None, None]).all()
        assert (batch["label"][~real] == IGNORE_LABEL).all()
        assert (batch["index"][~real] == -1).all()
    assert seen == list(range(num_tiles))  # hosts hold contiguous blocks


# 30. pytorch#22584, #25162, deit#24: what a distributed sampler repeats is counted twice
# 31. MONAI#5357: hosts with fewer batches than others wait for ever
# 32. flax#527, #1850, #2116: a last batch that is not full weighs differently
@pytest.mark.parametrize("num_hosts", [1, 3, 4, 8])
@pytest.mark.parametrize("num_tiles", [1, 7, 16, 25])
def test_any_number_of_hosts_counts_the_same_matrix(num_tiles, num_hosts):
    rng = np.random.default_rng(0)
    guesses = rng.integers(0, 3, (num_tiles, 4, 5, 1)).astype(np.uint8)
    labels = rng.choice([0, 1, 2, IGNORE_LABEL], guesses.shape[:3])
    examples = [
        {"image": guess, "label": label, "index": np.int64(k)}
        for k, (guess, label) in enumerate(zip(guesses, labels, strict=True))
    ]
    hosts = [
        list(eval_batches(examples, batch_size=2 * num_hosts, host=host, num_hosts=num_hosts))
        for host in range(num_hosts)
    ]
    assert len({len(batches) for batches in hosts}) == 1
    counts = sum(
        confusion_matrix(batch["image"][..., 0], batch["label"], 3)
        for batch in itertools.chain(*hosts)
    )
    expected = np.zeros((3, 3), int)
    valid = labels != IGNORE_LABEL
    np.add.at(expected, (labels[valid], guesses[valid][:, 0]), 1)
    np.testing.assert_array_equal(counts, expected)


def test_evaluation_in_worker_processes():
    stream = eval_batches(tiles(5), batch_size=2, workers=1)
    assert np.concatenate([batch["index"] for batch in stream]).tolist() == [0, 1, 2, 3, 4, -1]
    stream.close()


@pytest.mark.parametrize("size", [(3, 4), (3, 9), (9, 2), (7, 8), (1, 1)])
def test_fit_keeps_a_window_and_ignores_the_rest(size):
    canvas = (5, 6)
    numbers = np.arange(size[0] * size[1]).reshape(size)
    example = {"image": numbers[..., None].astype(np.uint8), "label": numbers, "name": "x"}
    example["border"] = numbers.astype(np.float32)
    fitted = fit(example, canvas, np.random.default_rng(0), [Field("border", fill=200.0)])
    h, w = fitted["size"]
    assert (h, w) == (min(size[0], 5), min(size[1], 6))
    label, image = fitted["label"], fitted["image"][..., 0]
    assert label.shape == image.shape == canvas
    np.testing.assert_array_equal(label[:h, :w], image[:h, :w])
    assert (np.diff(label[:h, :w], axis=0) == size[1]).all()  # one connected window
    assert (np.diff(label[:h, :w], axis=1) == 1).all()
    outside = np.ones(canvas, bool)
    outside[:h, :w] = False
    assert (label[outside] == IGNORE_LABEL).all() and (image[outside] == 0).all()
    np.testing.assert_array_equal(fitted["border"], np.where(outside, 200, label))
    np.testing.assert_array_equal(example["label"], numbers)  # the input is left alone


def test_fit_reaches_every_window():
    example = {"image": np.zeros((3, 5, 1), np.uint8), "label": np.arange(15).reshape(3, 5)}
    rng = np.random.default_rng(0)
    corners = {int(fit(example, (2, 3), rng)["label"][0, 0]) for _ in range(200)}
    assert corners == {0, 1, 2, 5, 6, 7}


def test_workers_end_when_training_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, multiprocessing\n"
        "from absl import flags\n"
        "from dense_jax.data import pipeline, synthetic\n"
        "if __name__ == '__main__':\n"
        "    flags.FLAGS.mark_as_parsed()\n"
        "    source = synthetic.Synthetic('', 'train', size=(8, 8))\n"
        "    batches = pipeline.train_batches(\n"
        "        source, canvas=(8, 8), seed=0, batch_size=2, workers=1)\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The workers share the pipe: reading it to the end waits for them to end.
    killed = subprocess.run(
        [sys.executable, script],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout.split(), "no worker was running"
