"""How well objects are told apart: Rand and information scores of one image, in numpy.

Both take two maps of objects [h, w], 0 for none and k for object k, and compare which pixels belong
together; numbers need not agree. They are the scores of the ISBI 2012 challenge (Arganda-Carreras et
al. 2015, "Crowdsourcing the creation of image segmentation algorithms for connectomics"), at equal
weight of splits and mergers. Only the pixels of the label's objects count; a pixel there that is in
no predicted object is an object by itself. The challenge's final ranking thinned borders before
scoring; these functions do not. 1 is best; NaN without an object in the label. Never uses jax.
"""

import math

import numpy as np

from dense_jax.labels import Objects


def rand_score(prediction: Objects, label: Objects) -> float:
    """Returns the F-score of the pairs of pixels that both maps put into one object, in [0, 1].

    sum p_ij^2 / (sum s_i^2 / 2 + sum t_j^2 / 2), with p_ij the fraction of pixels in object i of the
    prediction and j of the label, s and t their sums.
    """
    if not np.any(label):
        return math.nan
    joint, predicted, true = (np.sum(f**2) for f in _fractions(prediction, label))
    return float(2 * joint / (predicted + true))


def information_score(prediction: Objects, label: Objects) -> float:
    """Returns the mutual information over the mean of the entropies, in [0, 1].

    I / (H(s) / 2 + H(t) / 2), I = H(s) + H(t) - H(p), with p, s and t as in `rand_score`. 1 if both
    maps have one object.
    """
    if not np.any(label):
        return math.nan
    joint, predicted, true = (-np.sum(f * np.log(f)) for f in _fractions(prediction, label))
    entropy = predicted + true
    return float(2 * (entropy - joint) / entropy) if entropy > 0 else 1.0


def _fractions(prediction: Objects, label: Objects) -> list[np.ndarray]:
    """Returns p_ij where it is not 0, s_i and t_j."""
    inside = label > 0
    guess, truth = prediction[inside].astype(np.int64), label[inside].astype(np.int64)
    alone = guess == 0
    guess[alone] = guess.max(initial=0) + 1 + np.arange(np.sum(alone))
    pair = guess * (truth.max(initial=0) + 1) + truth
    return [np.unique(ids, return_counts=True)[1] / len(ids) for ids in (pair, guess, truth)]
