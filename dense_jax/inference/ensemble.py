"""Averages the class probabilities of networks that differ in their weights alone."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from dense_jax.regions import Regions


def network_logits(
    variables: Any, *image: Array, logits_step: Callable, num_networks: int
) -> Float[Array, "networks h w c"]:
    """Returns the logits of each network for one image.

    variables: Those of all networks, stacked along a new first axis. For a single network, its own.
    image: The arguments of `logits_step` but for the variables.
    """
    if num_networks == 1:
        return logits_step(variables, *image)[None]
    return jax.lax.map(lambda network: logits_step(network, *image), variables)


def pool(
    logits: Float[Array, "networks h w c"], regions: Regions | None = None
) -> Float[Array, "h w c"]:
    """Returns logits whose probabilities (see `outputs`) are the mean of the networks'.

    A single network's logits stay as they are.
    """
    if len(logits) == 1:
        return logits[0]
    if regions:
        inside, outside = (
            jax.nn.logsumexp(jax.nn.log_sigmoid(z), axis=0) for z in (logits, -logits)
        )
        return inside - outside
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - math.log(len(logits))


def mean_entropy(
    logits: Float[Array, "networks h w c"], regions: Regions | None = None
) -> Float[Array, "h w"]:
    """Returns the mean over networks (and regions) of the entropy of the probabilities, in nats.

    The entropy of the mean probabilities is larger. The difference is the mutual information of the
    class and the network (Depeweg et al. 2018, "Decomposition of uncertainty in Bayesian deep
    learning", equation 3): it is 0 where the networks agree, however much each of them doubts.
    """
    entr = jax.scipy.special.entr
    if regions:  # logits may be infinite, which a softmax does not allow
        entropies = entr(jax.nn.sigmoid(logits)) + entr(jax.nn.sigmoid(-logits))
        return entropies.mean(axis=(0, -1))
    return entr(jax.nn.softmax(logits)).sum(axis=-1).mean(axis=0)
