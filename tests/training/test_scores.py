"""Scores against their definitions, scikit-learn's numbers, and where they are undefined."""

import math

import numpy as np
import pytest

from galore_jax.training.scores import SCORES, accuracy, f1, matthews, pearson, spearman


def confusion(predictions, labels):
    """True positives, false positives, false negatives and true negatives of class 1."""
    pairs = list(zip(predictions, labels, strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_two_classes_are_those_of_the_confusion_matrix(seed):
    random = np.random.default_rng(seed)
    predictions, labels = random.integers(0, 2, (2, 40)).tolist()
    tp, fp, fn, tn = confusion(predictions, labels)
    assert accuracy(predictions, labels) == pytest.approx((tp + tn) / 40)
    assert f1(predictions, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predictions, labels) == pytest.approx((tp * tn - fp * fn) / scale)


def test_matthews_of_several_classes_is_the_correlation_of_their_indicators():
    random = np.random.default_rng(0)
    predictions, labels = random.integers(0, 3, (2, 50))
    x, y = (np.eye(3)[values] - np.eye(3)[values].mean(0) for values in (predictions, labels))
    covariance = lambda a, b: np.sum(a * b)  # noqa: E731
    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    assert matthews(predictions, labels) == pytest.approx(expected)


def test_correlations_are_those_of_values_and_of_ranks():
    random = np.random.default_rng(0)
    predictions = random.normal(size=30)
    labels = np.round(predictions + random.normal(size=30), 1)  # ties
    assert pearson(predictions, labels) == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    ranks = [
        (np.sum(x < x[:, None], 1) + np.sum(x <= x[:, None], 1)) for x in (predictions, labels)
    ]
    assert spearman(predictions, labels) == pytest.approx(np.corrcoef(*ranks)[0, 1])


# scikit-learn 1.9.1 gives these: f1_score with zero_division=0, matthews_corrcoef.
DEGENERATE = {
    ("f1", (0, 0, 0, 0), (0, 0, 0, 0)): 0.0,
    ("f1", (0, 0, 0, 0), (0, 1, 0, 1)): 0.0,
    ("f1", (1, 1, 1, 1), (0, 0, 0, 0)): 0.0,
    ("f1", (1, 1, 1, 1), (1, 1, 1, 1)): 1.0,
    ("matthews", (1, 1, 1, 1), (0, 1, 0, 1)): 0.0,
    ("matthews", (0, 1, 0, 1), (1, 1, 1, 1)): 0.0,
    ("matthews", (1, 1, 1, 1), (1, 1, 1, 1)): 0.0,
    ("matthews", (0, 1, 0, 1), (1, 0, 1, 0)): -1.0,
    ("accuracy", (1, 1, 1, 1), (0, 0, 0, 0)): 0.0,
    ("pearson", (2.5, 2.5, 2.5, 2.5), (0.0, 1.0, 2.0, 5.0)): 0.0,
    ("spearman", (2.5, 2.5, 2.5, 2.5), (0.0, 1.0, 2.0, 5.0)): 0.0,
    ("pearson", (0.0, 1.0, 2.0, 5.0), (2.5, 2.5, 2.5, 2.5)): 0.0,
    ("spearman", (3.0, 2.0, 1.0, 0.0), (0.0, 1.0, 2.0, 5.0)): -1.0,
}


@pytest.mark.parametrize(("case", "value"), DEGENERATE.items())
def test_degenerate_predictions_have_a_value_and_no_warning(case, value):
    name, predictions, labels = case
    with np.errstate(all="raise"):
        assert SCORES[name](predictions, labels) == pytest.approx(value)
