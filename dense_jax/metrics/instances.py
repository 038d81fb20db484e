"""Object metrics for one image: Rand and information scores, in NumPy.

Both scores take two object maps [h, w], in which 0 means no object and k > 0 means object k. They
compare which pixels belong together, so the maps may number objects differently. The scores are
from the ISBI 2012 challenge (Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image
segmentation algorithms for connectomics"), with equal weights for splits and mergers.

Only the pixels inside the label's objects count. A pixel without a predicted object is treated as a
predicted object of one pixel. The challenge's final ranking thinned borders before scoring; these
functions do not. The best score is 1. If the label has no object, the score is NaN. This module
never imports jax.
"""

import math

import numpy as np

from dense_jax.labels import Objects


def rand_score(prediction: Objects, label: Objects) -> float:
    """Returns the F-score for grouping pairs of pixels into the same object, in [0, 1].

    The score is (sum p_ij^2) / ((sum s_i^2 + sum t_j^2) / 2). p_ij is the fraction of pixels that
    are in object i of the prediction and in object j of the label. s_i is the sum of p_ij over j,
    and t_j is the sum of p_ij over i.
    """
    if not np.any(label):
        return math.nan
    joint, predicted, true = (np.sum(f**2) for f in _fractions(prediction, label))
    return float(2 * joint / (predicted + true))


def information_score(prediction: Objects, label: Objects) -> float:
    """Returns the mutual information of the maps divided by their mean entropy, in [0, 1].

    The score is I / ((H(s) + H(t)) / 2). H is the entropy, and I = H(s) + H(t) - H(p) is the mutual
    information. p, s and t are defined in `rand_score`. If both maps have a single object, the
    score is 1.
    """
    if not np.any(label):
        return math.nan
    joint, predicted, true = (-np.sum(f * np.log(f)) for f in _fractions(prediction, label))
    entropy = predicted + true
    return float(2 * (entropy - joint) / entropy) if entropy > 0 else 1.0


def _fractions(prediction: Objects, label: Objects) -> list[np.ndarray]:
    """Returns the nonzero p_ij, s_i and t_j that `rand_score` defines."""
    inside = label > 0
    guess, truth = prediction[inside].astype(np.int64), label[inside].astype(np.int64)
    alone = guess == 0
    guess[alone] = guess.max(initial=0) + 1 + np.arange(np.sum(alone))
    pair = guess * (truth.max(initial=0) + 1) + truth
    return [np.unique(ids, return_counts=True)[1] / len(ids) for ids in (pair, guess, truth)]
