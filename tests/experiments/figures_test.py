"""Figures 2 and 3: their numbers, and their recipes in a process of their own."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import etfzoo
from etfzoo.data import sources
from etfzoo.data.augment import evaluation_image
from etfzoo.errors import EtfzooError
from etfzoo.experiments import figures
from etfzoo.experiments.random_features import RidgeRegression
from etfzoo.measure.features import extract
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics
from testing import leftovers, make_classifier, run_recipe

pytestmark = pytest.mark.small_rn18

TINY = ("--protocol=quickstart", "--epochs=1", "--batch_size=50")


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_picture(path, wider_than):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > wider_than and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


# Figure 2


def test_figure2_of_made_data(tmp_path):
    flags = ("--dataset=gaussian", "--a2=1,0,-1", "--draws=2", "--projections=gaussian,etf")
    flags += ("--num_features=60", f"--output={tmp_path}")
    out = run_recipe("figure2", *flags)
    assert "gaussian W, validated gamma" in out and "etf W, fixed gamma" in out
    assert_picture(tmp_path / "figure2.png", 1000)
    rows = table(tmp_path / "figure2.csv")
    assert [r["projection"] for r in rows] == ["gaussian"] * 8 + ["etf"] * 8
    names = ["-1 t^2 + t", "0 t^2 + t", "1 t^2 + t", "relu", "abs", "cos", "sin", "exp"]
    assert [r["activation"] for r in rows] == names * 2
    assert [float(rows[0][d]) for d in ("d0", "d1", "d2")] == [2, 1, 1]
    stored = dict(np.load(tmp_path / "figure2.npz"))
    for kind in ("gaussian", "etf"):
        mine = [r for r in rows if r["projection"] == kind]
        for field in ("mse_fixed", "accuracy_validated"):
            draws = stored[f"{kind}_{field}"]
            assert draws.shape == (2, 8)
            np.testing.assert_allclose([float(r[field]) for r in mine], draws.mean(0), rtol=1e-4)
            deviation = np.abs(draws[0] - draws[1]) / np.sqrt(2)
            found = [float(r[f"{field}_deviation"]) for r in mine]
            np.testing.assert_allclose(found, deviation, rtol=1e-3, atol=1e-8)
    assert json.loads(str(stored["settings"]))["num_features"] == 60
    # Means alone differ: the linear one is best and has learned something.
    mse = stored["gaussian_mse_validated"].mean(0)
    assert mse[1] < mse[[0, 2]].min() and mse[1] < 0.75 * 3 / 16

    # Again: the same files, from the draws on disk; a lost draw alone is drawn again.
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "draws").iterdir()}
    assert len(kept) == 4
    lost = sorted(kept)[1]
    (tmp_path / "draws" / lost).unlink()
    before = (tmp_path / "figure2.csv").read_bytes()
    run_recipe("figure2", *flags)
    assert (tmp_path / "figure2.csv").read_bytes() == before
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "draws").iterdir()}
    assert [name for name in kept if again[name] != kept[name]] == [lost]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("figure2", ["--dataset=gaussian", "--a2=1,2"], "needs 0"),
        ("figure2", ["--dataset=gaussian", "--a2=0"], "needs 0 and another value"),
        ("figure2", ["--dataset=digits"], "--model"),
        ("figure3", ["--models=a/x,b/x"], "--names"),
        ("figure2", ["--dataset=gaussian", "--draws=1"], "draws must be between 2 and"),
        ("figure2", ["--dataset=gaussian", "--projections=har"], "did you mean haar"),
        ("figure2", ["--dataset=gaussian", "--regularization=0"], "regularization must be between"),
        ("figure2", ["--dataset=gaussian", "--num_features=0"], "num_features must be between"),
        ("figure3", [], "--models"),
        ("figure3", ["--models=rn50_eft"], "did you mean rn50_etf"),
    ],
)
def test_bad_flags(tmp_path, recipe, flags, message):
    assert message in run_recipe(recipe, *flags, code=2, cwd=tmp_path)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.npz"))


# Features and covariances


def test_extracted_features_are_the_models(embedded_dir):
    model = make_classifier()
    source = sources.resolve("digits", str(embedded_dir))
    features, labels = extract(model, source, "train", batch_size=64)
    assert features.shape == (200, 32) and features.dtype == np.float64
    records = list(source.records("train"))
    assert labels.tolist() == [int(r["label"]) for r in records]
    images = np.stack([evaluation_image(r["image"], 32, 32, 0.875) for r in records[:5]])
    wanted = etfzoo.feature_model(model)(images)["features"]
    np.testing.assert_allclose(features[:5], wanted, rtol=1e-4, atol=1e-4)
    headless = etfzoo.models.classifier.replace_head(model, None, None)
    np.testing.assert_array_equal(extract(headless, source, "train", 64)[0], features)
    with pytest.raises(EtfzooError, match="at least 1; got 0"):
        extract(model, source, "train", 0)


def test_covariance_within_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60) * 5
    features = rng.normal(size=(60, 4)) + np.eye(4)[labels // 5]
    c = figures.Covariance.of(features, labels)

    def direct(x):
        total = np.zeros((4, 4))
        for k in np.unique(labels):
            total += np.cov(x[labels == k].T, bias=True) * np.sum(labels == k) / 60
        return total

    np.testing.assert_allclose(c.matrix, direct(features), atol=1e-12)
    assert c.trace == pytest.approx(np.trace(c.matrix) / 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert c.unit_trace == pytest.approx(np.trace(direct(unit)) / 4)
    statistics = NeuralCollapseStatistics(11, 4)
    statistics.update(features, labels)
    assert c.scatter_ratio == pytest.approx(statistics.result()["nc1_ratio"])
    # Ten times the features: only the raw trace tells.
    scaled = figures.Covariance.of(10 * features, labels)
    assert scaled.trace == pytest.approx(100 * c.trace)
    assert scaled[2:] == pytest.approx(c[2:])
    with pytest.raises(EtfzooError, match="NaN"):
        figures.Covariance.of(features * np.nan, labels)


@pytest.mark.parametrize("size, blocks", [(7, 7), (100, 100), (130, 100), (512, 100)])
def test_panels_of_a_heatmap(size, blocks):
    matrix = np.random.default_rng(0).normal(size=(size, size))
    detail, whole = figures._panels(matrix)
    np.testing.assert_array_equal(detail, matrix[:100, :100])
    assert whole.shape == (blocks, blocks)
    # Blocks of about equal size cover all: weighted by size they give the mean of everything.
    edges = np.linspace(0, size, blocks + 1).astype(int)
    sizes = np.diff(edges)
    assert np.ptp(sizes) <= 1
    np.testing.assert_allclose(sizes @ whole @ sizes / size**2, matrix.mean(), atol=1e-12)
    last = matrix[edges[-2] :, edges[0] : edges[1]].mean()
    np.testing.assert_allclose(whole[-1, 0], last, atol=1e-12)


# Figures 2 and 3 of a real training


@pytest.fixture(scope="module")
def pretrained(embedded_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "etf"
    flags = ("--dataset=digits", f"--data_dir={embedded_dir}", "--backbone=rn18", *TINY)
    run_recipe("pretrain", "--head=etf", *flags, f"--workdir={workdir}")
    return workdir


@pytest.mark.slow
def test_figures_of_a_trained_model(pretrained, embedded_dir, tmp_path):
    data = ("--dataset=shapes/outlines", f"--data_dir={embedded_dir}")
    source = sources.resolve("shapes/outlines", str(embedded_dir))
    frozen = etfzoo.load(pretrained, head=None)
    train, test = (extract(frozen, source, split) for split in ("train", "test"))

    flags = ("--a2=0,1", "--projections=haar", "--draws=2", f"--output={tmp_path / 'two'}")
    run_recipe("figure2", f"--model={pretrained}", *data, *flags)
    assert_picture(tmp_path / "two" / "figure2.png", 1000)
    # With a = 0 and a square Haar W it is plain ridge regression on the features.
    scale = np.sqrt(np.mean(np.square(train[0] - train[0].mean(0))))
    x, y = ((f - train[0].mean(0)) / scale / np.sqrt(32) for f in (train[0], test[0]))
    fit = RidgeRegression(x, np.eye(10)[train[1]])
    mse = np.mean(np.square(fit.predict(y, 0.01) - np.eye(10)[test[1]]))
    found = table(tmp_path / "two" / "figure2.csv")[0]
    assert float(found["mse_fixed"]) == pytest.approx(mse, rel=1e-3)
    assert float(found["mse_fixed_deviation"]) < 1e-6

    # Figure 3 fine-tunes the model itself; started again it takes what is there.
    flags = (*data, *TINY, "--learning_rate=0.01", f"--workdir={tmp_path / 'three'}")
    out = run_recipe("figure3", f"--models={pretrained}", *flags)
    assert "fine-tuning" in out and "frozen, trSW/trSB: etf" in out
    tuned = tmp_path / "three" / "finetuned" / "etf"
    rows = table(tmp_path / "three" / "figure3.csv")
    assert [(r["model"], r["features"]) for r in rows] == [("etf", "fine-tuned"), ("etf", "frozen")]
    assert [r["weights"] for r in rows] == [str(tuned), str(pretrained)]
    for row, model in zip(rows, (etfzoo.load(tuned), frozen), strict=True):
        wanted = figures.Covariance.of(*extract(model, source, "test"))
        found = [float(row[n]) for n in ("tr_c_over_p", "tr_c_over_p_l2", "scatter_ratio")]
        np.testing.assert_allclose(found, wanted[1:], rtol=1e-4)
        stored = np.load(tmp_path / "three" / "figure3.npz")[f"{row['features']}_etf"]
        np.testing.assert_allclose(stored, wanted.matrix, rtol=1e-3, atol=1e-5)
    assert float(rows[0]["scatter_ratio"]) != pytest.approx(float(rows[1]["scatter_ratio"]))
    assert_picture(tmp_path / "three" / "figure3.png", 600)

    # The fine-tuning's own workdir, and a copy, give the same numbers under other names.
    again, copy = tmp_path / "again", shutil.copytree(tuned, tmp_path / "copy")
    out = run_recipe(
        "figure3", f"--models={tuned},{copy}", "--names=one,two", *data, f"--workdir={again}"
    )
    assert "fine-tuning" not in out and not (again / "finetuned").exists()
    for row in table(again / "figure3.csv"):
        same = next(r for r in rows if r["features"] == row["features"])
        assert float(row["tr_c_over_p"]) == pytest.approx(float(same["tr_c_over_p"]), rel=1e-6)
    assert_picture(again / "figure3.png", 1000)
    other = ("--dataset=digits", f"--data_dir={embedded_dir}", f"--workdir={tmp_path / 'no'}")
    out = run_recipe("figure3", f"--models={tuned}", *other, code=2)
    assert "was fine-tuned on shapes/outlines, not on digits" in out
    assert leftovers(tmp_path / "no") == []


@pytest.mark.slow
def test_figure3_refuses_probes_and_unfinished_runs(tmp_path):
    from etfzoo.training.config import TrainConfig

    TrainConfig(dataset="digits", init="somewhere", head="linear").save(tmp_path / "config.json")
    flags = (f"--models={tmp_path}", "--dataset=digits", f"--workdir={tmp_path / 'out'}")
    assert "is not finished" in run_recipe("figure3", *flags, code=2)
    Path(tmp_path / "result.json").write_text(
        '{"top1": 0.5, "mean_per_class": 0.5, "examples": 2, "C": 0.1}'
    )
    assert "is a probe" in run_recipe("figure3", *flags, code=2)
