"""Detection of foreign images against references of its own and scikit-learn's PCA."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.decomposition import PCA

from etfzoo.data import sources
from etfzoo.errors import EtfzooError
from etfzoo.measure import ood
from etfzoo.measure.features import Features
from testing import make_classifier, make_image_folder

pytestmark = pytest.mark.small_rn18


def pooled(model, count, seed, shift=0.0):
    width = model.taps[model.spec.penultimate].shape[-1]
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(6, width))
    found = np.abs(rng.normal(size=(count, 6)) @ basis + shift + 0.1 * rng.normal(size=width))
    return Features(found.astype(np.float32), np.zeros(count, np.int64))


@pytest.mark.parametrize("head, changes", [
    ("linear", {}), ("etf", {"feature_norm": "none"}), ("etf", {"feature_norm": "l2"}),
    ("linear", {"projector_layers": 1, "projector_width": 24}),
])  # fmt: skip
def test_scores(head, changes):
    model = make_classifier(head, **changes)
    training, found = pooled(model, 500, 0), pooled(model, 60, 1, shift=1.5)
    scores = ood.Detector(model, training).scores(found)
    h = found.features.astype(np.float64)
    layer = model.get_layer("logits")
    weights = np.asarray(layer.kernel, np.float64)
    logits = np.asarray(layer(found.features), np.float64)
    np.testing.assert_allclose(scores["msp"], softmax(logits, 1).max(1), rtol=1e-9)
    np.testing.assert_allclose(scores["energy"], logsumexp(logits, 1), rtol=1e-9)
    pca = PCA(0.9, svd_solver="full").fit(training.features.astype(np.float64))
    assert 1 < len(pca.components_) < h.shape[1]
    share = np.linalg.norm(h @ pca.components_.T, axis=1) / np.linalg.norm(h, axis=1)
    np.testing.assert_allclose(scores["neco"], share * logits.max(1), rtol=1e-6)
    wanted = []
    for row, chosen in zip(h, logits.argmax(1), strict=True):
        z = row - training.features.astype(np.float64).mean(0)
        w = weights[:, chosen] * (16 if changes.get("feature_norm") == "l2" else 1)
        wanted.append(z @ w / np.sqrt(z @ z) + 1e-4 * np.abs(row).sum())
    np.testing.assert_allclose(scores["nci"], wanted, rtol=1e-6)


def test_detection_by_counting():
    rng = np.random.default_rng(3)
    known, foreign = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 150).round(1)
    found = ood.detection(known, foreign)
    pairs = (known[:, None] > foreign).mean() + 0.5 * (known[:, None] == foreign).mean()
    np.testing.assert_allclose(found["auroc"], pairs, rtol=1e-12)
    rates = [np.mean(foreign >= t) for t in np.unique(known) if np.mean(known >= t) >= 0.95]
    np.testing.assert_allclose(found["fpr95"], min(rates), rtol=1e-12)
    assert ood.detection([2, 3], [0, 1]) == {"auroc": 1.0, "fpr95": 0.0}


@pytest.mark.parametrize("layers", [0, 1])
def test_of_data_sets_and_what_cannot_be_told(tmp_path, layers):
    model = make_classifier("linear", projector_layers=layers)
    places = [make_image_folder(tmp_path / n, {"a": 9, "b": 7}, (40, 36)) for n in ("own", "other")]
    own, other = (sources.resolve(f"folder:{place}") for place in places)
    found = ood.evaluate(model, own, {"other": other, "own": own}, batch_size=4)
    assert list(found) == ["other", "own"]
    assert list(found["other"]) == ["msp", "energy", "neco", "nci"]
    for row in found["other"].values():
        assert 0 <= row["auroc"] <= 1 and 0 <= row["fpr95"] <= 1
    assert {row["auroc"] for row in found["own"].values()} == {0.5}
    constant = Features(np.ones((9, 512), np.float32), np.zeros(9, np.int64))
    with pytest.raises(EtfzooError, match="do not vary"):
        ood.Detector(model, constant)
    with pytest.raises(EtfzooError, match="no head"):
        ood.Detector(make_classifier(None), constant)
