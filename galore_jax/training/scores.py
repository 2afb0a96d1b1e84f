"""Scores of predictions, as GLUE and scikit-learn define them.

Where a score is undefined it is 0: no correlation with constant scores, no precision without a
positive prediction. scikit-learn says the same of F1 and of Matthews' coefficient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats


def accuracy(predictions: Any, labels: Any) -> float:
    """Computes the part of predictions that are right.

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def f1(predictions: Any, labels: Any) -> float:
    """Computes the harmonic mean of precision and recall of class 1.

    >>> f1([1, 0, 1, 1], [1, 0, 0, 1])
    0.8
    """
    said, true = np.asarray(predictions) == 1, np.asarray(labels) == 1
    both, either = np.sum(said & true), np.sum(said) + np.sum(true)
    return float(2 * both / either) if either else 0.0


def matthews(predictions: Any, labels: Any) -> float:
    r"""Computes Matthews' correlation coefficient, of two classes or more.

    With the confusion matrix's trace c, sum s, and sums $p_k$ of predictions and $t_k$ of labels,

    $$\frac{c s - \sum_k p_k t_k}{\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}.$$

    >>> round(matthews([1, 0, 1, 1], [1, 0, 0, 1]), 4)
    0.5774
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    classes = np.union1d(predictions, labels)
    said = np.array([np.sum(predictions == k) for k in classes], np.float64)
    true = np.array([np.sum(labels == k) for k in classes], np.float64)
    total, right = float(len(labels)), float(np.sum(predictions == labels))
    scale = (total**2 - said @ said) * (total**2 - true @ true)
    return float((right * total - said @ true) / np.sqrt(scale)) if scale > 0 else 0.0


def pearson(predictions: Any, labels: Any) -> float:
    """Computes Pearson's correlation; 0 where either is constant.

    >>> round(pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.5]), 4)
    0.9979
    """
    return _correlation(scipy.stats.pearsonr, predictions, labels)


def spearman(predictions: Any, labels: Any) -> float:
    """Computes Spearman's correlation of ranks; 0 where either is constant.

    >>> spearman([1.0, 2.0, 3.0], [2.0, 4.0, 6.5])
    1.0
    """
    return _correlation(scipy.stats.spearmanr, predictions, labels)


def _correlation(correlate: Callable[..., Any], predictions: Any, labels: Any) -> float:
    x, y = (np.asarray(values, np.float64) for values in (predictions, labels))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(correlate(x, y)[0])


SCORES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""The scores by name."""

# Of each task, the score of the paper's Table 4 first.
SCORES_OF_TASK: dict[str, tuple[str, ...]] = {
    "cola": ("matthews", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("f1", "accuracy"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
}
