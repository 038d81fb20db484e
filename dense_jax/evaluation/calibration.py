"""Measures the probabilities of a network or an ensemble, and finds its temperature.

Dividing all logits by a temperature T > 0 makes a network more (T < 1) or less (T > 1) sure, and
leaves the predicted class as it is (Guo et al. 2017, "On calibration of modern neural networks",
section 4.2). T has the lowest negative log-likelihood on a split. In an ensemble, T divides the
logits of each network, and the likelihood is that of the mean of their probabilities, because the
mean of calibrated networks is not calibrated (Rahaman and Thiery 2021, "Uncertainty quantification
and deep ensembles").

Of a network of regions, one temperature is for all of them. Each also gets a threshold of its own,
the one of the highest Dice on the same split, of probabilities that have the temperature.

The steps are like `program.eval_step`, for `scoring.score`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from dense_jax import outputs
from dense_jax.inference.ensemble import network_logits, pool
from dense_jax.metrics import aggregation, probabilities
from dense_jax.metrics.calibration import TEMPERATURES, best_temperature
from dense_jax.program import Variables, count
from dense_jax.regions import Regions

CALIBRATED = "calibrated_"


def lanes(num_networks: int, *, is_calibrated: bool) -> list[str]:
    """Returns the prefixes of the names of what is measured, in the order of `eval_step`.

    The first, "", is the network or the ensemble as trained. Next is what has the temperature. The
    last are the single networks of an ensemble as trained, "network0_" and so on.
    """
    singles = [f"network{k}_" for k in range(num_networks)] if num_networks > 1 else []
    return ["", *([CALIBRATED] if is_calibrated else []), *singles]


def eval_step(
    variables: tuple[Variables, tuple[Array, Array] | None],
    example: Mapping[str, Array],
    *,
    logits_step: Callable[..., Array],
    num_networks: int,
    regions: Regions | None = None,
) -> tuple[dict[str, Array], dict[str, UInt8[Array, "..."]]]:
    """Returns what is counted of one example for each of `lanes`, and its classes and label.

    variables: Those of `network_logits`, and (the temperature, the thresholds of regions) or None.

    The first result is {"index": the example's index, "counts": those of `program.count`
    [lanes, ...], and the results of `probabilities.sums` [lanes, ...]}.
    """
    networks, fitted = variables
    logits = _logits(networks, example, logits_step, num_networks)
    pooled = pool(logits, regions)
    usual = jnp.asarray(regions.thresholds if regions else (), jnp.float32)
    measured = [(pooled, usual)]
    if fitted is not None:
        temperature, thresholds = fitted
        measured.append((pool(logits / temperature, regions), thresholds))
    if num_networks > 1:
        measured += [(network, usual) for network in logits]
    label = example["label"].astype(jnp.int32)

    def measure(lane: tuple[Array, Array]) -> dict[str, Array]:
        scores, thresholds = lane
        own = regions and regions._replace(thresholds=thresholds)
        counts = count(outputs.decide(scores, own), label, scores.shape[-1], own)
        return {"counts": counts, **probabilities.sums(scores, outputs.targets(label, regions))}

    maps = {"classes": outputs.decide(pooled, regions), "label": label.astype(jnp.uint8)}
    stacked = jax.tree.map(lambda *lanes: jnp.stack(lanes), *measured)
    return {"index": example["index"], **jax.lax.map(measure, stacked)}, maps


def nll_step(
    variables: Variables,
    example: Mapping[str, Array],
    *,
    logits_step: Callable[..., Array],
    num_networks: int,
    regions: Regions | None = None,
) -> tuple[dict[str, Array], None]:
    """Returns {"index", "nll": the sum of -log p[y] over valid pixels at each of TEMPERATURES}."""
    logits = _logits(variables, example, logits_step, num_networks)
    label = outputs.targets(example["label"].astype(jnp.int32), regions)
    if regions:  # a pixel is one of two classes for each region
        logits = jnp.stack([jnp.zeros_like(logits), logits], axis=-1)
        logits = logits.reshape(*logits.shape[:2], -1, 2)
        label = label.reshape(len(label), -1)
    sums = probabilities.nll(logits, label, jnp.asarray(TEMPERATURES, jnp.float32))
    return {"index": example["index"], "nll": sums}, None


def threshold_step(
    variables: tuple[Variables, Array],
    example: Mapping[str, Array],
    *,
    logits_step: Callable[..., Array],
    num_networks: int,
    regions: Regions,
) -> tuple[dict[str, Array], None]:
    """Returns {"index", "counts": those of `probabilities.by_threshold`}.

    variables: Those of `network_logits`, and the temperature.
    """
    networks, temperature = variables
    logits = _logits(networks, example, logits_step, num_networks) / temperature
    masks = outputs.targets(example["label"].astype(jnp.int32), regions)
    p = jax.nn.sigmoid(pool(logits, regions))
    return {"index": example["index"], "counts": probabilities.by_threshold(p, masks)}, None


def _logits(
    variables: Variables, example: Mapping[str, Array], logits_step: Callable, num_networks: int
) -> Array:
    image = [example[name] for name in ("image", "levels") if name in example]
    return network_logits(variables, *image, logits_step=logits_step, num_networks=num_networks)


def by_lane(sums: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the statistics of each lane of `eval_step`, [n, ...], named LANEconfusion_matrices,
    LANEnll, LANEbrier and LANEreliability, given the sums over each image's tiles."""
    reliability = np.concatenate([sums["binned"], sums["probability"][..., None]], axis=-1)
    parts = {
        "confusion_matrices": sums["counts"],
        "nll": sums["nll"],
        "brier": sums["brier"],
        "reliability": reliability,
    }
    return {
        f"{lane}{name}": values[:, k]
        for k, lane in enumerate(names)
        for name, values in parts.items()
    }


def fit(nll: np.ndarray) -> tuple[float, list[float]]:
    """Returns the temperature and its 95 % interval over images, given nll [n, temperatures]."""
    resampled = best_temperature(aggregation.resampled_sums(nll))
    interval = aggregation.interval(resampled).tolist() if len(nll) > 1 else [np.nan, np.nan]
    return float(best_temperature(nll.sum(axis=0))), interval


def gains(
    measured: Mapping[str, np.ndarray], num_networks: int, paths: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns {score: {"networks": of each network, "gain": ..., "interval": its 95 % interval}}.

    The gain is the ensemble's score minus the mean of the networks' scores, over the same images.
    """
    prefixes = lanes(num_networks, is_calibrated=False)
    statistics = [
        aggregation.image_statistics(
            {
                name: measured[f"{prefix}{name}"]
                for name in ("confusion_matrices", "nll", "brier", "reliability")
            }
        )
        for prefix in prefixes
    ]
    scores = [aggregation.score(aggregation.add_up(part)) for part in statistics]
    resampled = [aggregation.resampled_scores(part) for part in statistics]
    found = {}
    for name in paths:
        whole, *singles = (np.asarray(part[name]) for part in resampled)
        networks = [float(part[name]) for part in scores[1:]]
        found[f"eval/{name}"] = {
            "networks": networks,
            "gain": scores[0][name] - np.mean(networks),
            "interval": aggregation.interval(whole - np.mean(singles, axis=0)).tolist(),
        }
    return found
