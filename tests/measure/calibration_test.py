"""Calibration against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from etfzoo.errors import EtfzooError
from etfzoo.experiments import plots
from etfzoo.measure import calibration


@pytest.mark.parametrize("bins, seed", [(15, 0), (10, 1), (4, 2)])
def test_against_sklearn(bins, seed):
    rng = np.random.default_rng(seed)
    certain = rng.beta(4, 2, 3000)
    right = rng.random(3000) < certain**1.7  # too certain
    found = calibration.reliability(certain.astype(np.float32), right, bins)
    accuracy, confidence = calibration_curve(right, certain, n_bins=bins)
    full = found.examples > 0
    np.testing.assert_array_equal(found.examples, np.histogram(certain, bins, (0, 1))[0])
    np.testing.assert_allclose(found.accuracy[full], accuracy, rtol=1e-12)
    np.testing.assert_allclose(found.confidence[full], confidence, rtol=1e-6)
    wanted = np.sum(found.examples[full] * np.abs(accuracy - confidence)) / 3000
    np.testing.assert_allclose(found.error, wanted, rtol=1e-6)
    assert 0.05 < found.error < 0.2 and np.isnan(found.accuracy[~full]).all()


def test_edges_belong_to_the_bin_on_their_left():
    found = calibration.reliability([0.0, 0.25, 0.5, 0.50001, 1.0], [0, 1, 1, 0, 1], bins=4)
    np.testing.assert_array_equal(found.examples, [2, 1, 1, 1])
    np.testing.assert_allclose(found.confidence, [0.125, 0.5, 0.50001, 1.0])
    np.testing.assert_allclose(found.accuracy, [0.5, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(found.error, (2 * 0.375 + 0.5 + 0.50001) / 5)


def test_a_perfect_and_a_boastful_classifier(tmp_path):
    assert calibration.reliability([1.0] * 7, [1] * 7).error == 0
    boastful = calibration.reliability([1.0] * 7, [0] * 7)
    assert boastful.error == 1
    plots.reliability_png(tmp_path / "reliability.png", boastful)
    assert (tmp_path / "reliability.png").stat().st_size > 5000


@pytest.mark.parametrize("confidence", [[], [1.2], [-0.1], [np.nan]])
def test_what_are_no_confidences(confidence):
    with pytest.raises(EtfzooError, match="at least one example|must be probabilities"):
        calibration.reliability(confidence, [True] * len(confidence))
