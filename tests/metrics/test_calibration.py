"""Tests scores of probabilities against references in NumPy, and that no batch changes them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from dense_jax import metrics
from dense_jax.devices import mesh
from dense_jax.evaluation import calibration as steps
from dense_jax.metrics import calibration, probabilities
from dense_jax.metrics.calibration import NUM_BINS, TEMPERATURES, ProbabilitySums
from tests.conftest import mesh_of

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (23, 17, 4)).astype(np.float32)
LABEL = np.where(RNG.random((23, 17)) < 0.5, LOGITS.argmax(-1), RNG.integers(0, 4, (23, 17)))
LABEL[:5, :9] = 255
RESOLUTION = 1 / (2 * NUM_BINS * probabilities.NUM_LEVELS)


def sums_of(logits, label):
    sums = probabilities.sums(jnp.asarray(logits), jnp.asarray(label))
    sums = {name: np.asarray(array, np.float64) for name, array in sums.items()}
    reliability = np.concatenate([sums["binned"], sums["probability"][..., None]], axis=-1)
    return ProbabilitySums(sums["nll"], sums["brier"], reliability)


def error(p, is_hit):
    """netcal's ECE: bins are open on the left, each weighted by its share of the samples."""
    bins = np.clip(np.digitize(p, np.linspace(0, 1, NUM_BINS + 1), right=True) - 1, 0, NUM_BINS - 1)
    chosen = [bins == m for m in range(NUM_BINS) if np.any(bins == m)]
    return sum(np.mean(m) * abs(is_hit[m].mean() - p[m].mean()) for m in chosen)


def reference(logits, label):
    """The scores by the formulas of scikit-learn (log_loss, brier_score_loss) and netcal."""
    valid = label < logits.shape[-1]
    y = np.eye(logits.shape[-1])[label[valid]]
    p = scipy.special.softmax(logits[valid].astype(np.float64), axis=-1)
    return {
        "nll": -np.log(p[y == 1]).mean(),
        "brier": np.square(p - y).sum(axis=-1).mean(),
        "ece": error(p.max(axis=-1), p.argmax(axis=-1) == label[valid]),
        "classwise_ece": [error(p[:, c], y[:, c]) for c in range(logits.shape[-1])],
    }


def test_the_scores_are_those_of_other_libraries():
    expected = reference(LOGITS, LABEL)
    scores = metrics.summarize_probabilities(sums_of(LOGITS, LABEL), "probability")
    for name in ("nll", "brier"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("ece", "classwise_ece"):
        np.testing.assert_allclose(scores[name], expected[name], atol=RESOLUTION)
    assert scores["mean_classwise_ece"] == pytest.approx(np.mean(scores["classwise_ece"]))


def test_the_histograms_hold_every_valid_pixel_once():
    reliability = sums_of(LOGITS, LABEL).reliability
    valid = LABEL < 4
    np.testing.assert_array_equal(reliability[..., 0].sum(axis=1), valid.sum())
    hits = [
        *(np.sum(LABEL == c) for c in range(4)),
        np.sum(LOGITS.argmax(-1)[valid] == LABEL[valid]),
    ]
    np.testing.assert_array_equal(reliability[..., 1].sum(axis=1), hits)
    confidence = scipy.special.softmax(LOGITS[valid], axis=-1).max(axis=-1)
    bins = np.ceil(confidence * NUM_BINS).astype(int) - 1
    np.testing.assert_array_equal(reliability[-1, :, 0], np.bincount(bins, minlength=NUM_BINS))


def test_ignored_pixels_count_nowhere_whatever_their_logits():
    wild = LOGITS.copy()
    wild[LABEL == 255] = [1e30, -1e30, 0, 1e30]
    for once, other in zip(sums_of(LOGITS, LABEL), sums_of(wild, LABEL), strict=True):
        np.testing.assert_array_equal(once, other)
    nothing = sums_of(LOGITS, np.full_like(LABEL, 255))
    assert not any(map(np.any, nothing))
    scores = metrics.summarize_probabilities(nothing, "probability")
    assert np.isnan(scores["nll"]) and np.isnan(scores["ece"])


def test_a_sure_network_is_finite():
    label = np.array([[0, 1]])
    sums = sums_of(np.array([[[1e4, 0], [1e4, 0]]], np.float32), label)
    assert sums.nll == 1e4 and sums.brier == 2
    assert calibration.errors(sums.reliability)[-1] == pytest.approx(0.5, abs=RESOLUTION)


def test_results_do_not_depend_on_the_number_of_devices():
    examples = {
        "image": RNG.normal(0, 2, (8, 6, 7, 3)).astype(np.float32),
        "label": RNG.integers(0, 3, (8, 6, 7)),
        "index": np.arange(8),
    }
    options = {"logits_step": lambda network, image: image * network["scale"], "num_networks": 2}
    networks = {"scale": np.array([1, 0.5], np.float32)}
    found = []
    for devices in (mesh_of(1), mesh_of(4)):
        batch = mesh.to_global(examples, devices)
        step = mesh.map_examples(functools.partial(steps.eval_step, **options), devices)
        grid = mesh.map_examples(functools.partial(steps.nll_step, **options), devices)
        fitted = np.float32(1.3), np.zeros(0, np.float32)  # no thresholds
        counted, _ = step((networks, fitted), batch)
        found.append(counted | {"grid": grid(networks, batch)[0]["nll"]})
    assert found[0]["nll"].shape == (8, 4)
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])


@pytest.mark.parametrize("scale", [0.3, 1, 4])
def test_the_temperature_minimizes_the_likelihood(scale):
    logits, valid = scale * LOGITS[LABEL < 4].astype(np.float64), LABEL < 4

    def nll(temperature):
        logs = scipy.special.log_softmax(logits / temperature, axis=-1)
        return -np.take_along_axis(logs, LABEL[valid][:, None], axis=-1).sum()

    expected = scipy.optimize.minimize_scalar(nll, (0.5, 2), method="brent").x
    found = calibration.best_temperature(np.array([nll(t) for t in TEMPERATURES]))
    assert found == pytest.approx(expected, rel=3e-3)
    assert nll(found) - nll(expected) < 1e-5 * nll(expected)


def test_a_temperature_beyond_those_tried_is_their_end():
    slopes = np.stack([TEMPERATURES, -TEMPERATURES])
    np.testing.assert_array_equal(calibration.best_temperature(slopes), TEMPERATURES[[0, -1]])
