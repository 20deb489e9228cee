"""Selection: what is fitted on what, and compared by what."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from spies import CHANGED, PICTURES, Calls, Images, Part, Strategy, network, predictions

from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy, neural_collapse
from etfzoo.measure.features import Features
from etfzoo.runtime import backend
from etfzoo.training import build, loop, search, transfer
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir


def test_a_search_compares_by_the_metric_of_the_data_set(tmp_path, monkeypatch):
    seen = []

    def train(config, workdir, pretrained):
        seen.append(config)
        return {"top1": config.learning_rate, "mean_per_class": 1 - config.learning_rate}

    monkeypatch.setattr(search, "get_strategy", lambda *args: Strategy())
    monkeypatch.setattr(search, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(loop, "train_and_evaluate", train)
    config = TrainConfig(**CHANGED | {"epochs": 20, "init": None})
    best = search.pick(config, tmp_path, (0.3, 0.1, 0.2), (0.0, 1e-3), epochs=10)
    assert (best.learning_rate, best.weight_decay) == (0.1, 0.0)
    assert best == dataclasses.replace(config, learning_rate=0.1, weight_decay=0.0)
    rows = Workdir(tmp_path).read_selection()
    assert [row["mean_per_class"] for row in rows] == pytest.approx([0.7, 0.7, 0.9, 0.9, 0.8, 0.8])
    pairs = [(c.learning_rate, c.weight_decay) for c in seen]
    assert pairs == [(rate, decay) for rate in (0.3, 0.1, 0.2) for decay in (0.0, 1e-3)]
    for candidate in seen:
        assert (candidate.train_split, candidate.eval_split) == ("fit", "select")
        assert (candidate.epochs, candidate.warmup_epochs) == (10, 0.75)
        assert (candidate.step_epochs, candidate.neural_collapse_every) == ((1, 2), 0)


def test_a_search_widens_its_grid_until_the_best_lies_inside(tmp_path, monkeypatch):
    def train(config, workdir, pretrained):
        return {"top1": 0.5, "mean_per_class": 1 - abs(config.learning_rate - 0.03)}

    monkeypatch.setattr(search, "get_strategy", lambda *args: Strategy())
    monkeypatch.setattr(search, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(loop, "train_and_evaluate", train)
    best = search.pick(TrainConfig("x"), tmp_path, (0.1, 0.3), (0.0, 1e-3), widen=True)
    assert (best.learning_rate, best.weight_decay) == (0.0333333, 0.0)
    rows = Workdir(tmp_path).read_selection()[::2]
    assert [row["learning_rate"] for row in rows] == [0.1, 0.3, 0.0333333, 0.0111111]
    assert [row["widened"] for row in rows] == [False, False, True, True]


ROLES = {"fit": 60, "select": 30, "test": 40, "train": 90}


@pytest.fixture
def frozen(monkeypatch):
    """Features of four different splits, and which of them each step of a transfer is given."""
    rng = np.random.default_rng(0)
    splits = {}
    for role, count in ROLES.items():
        labels = np.arange(count) % 5
        splits[role] = Features(rng.normal(size=(count, 4)) + labels[:, None], labels)
    name = {id(found.labels): role for role, found in splits.items()}
    calls = Calls(loaded=[])
    model = network(calls)
    monkeypatch.setattr(transfer, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(build, "make_model", lambda *args: model)
    monkeypatch.setattr(build, "make_pipeline", lambda *args: Images(calls, 48))
    monkeypatch.setattr(transfer.hardware, "write", lambda *args: None)

    def load(pipeline, split, cache):
        calls.note("load", split=split, cache=cache)
        return splits[split]

    monkeypatch.setattr(transfer.features, "Extractor", lambda model: Part(load=load))

    def noting(function, *places):
        real = getattr(transfer, function)

        def spied(*args, **kwargs):
            calls.note(function, on=tuple(name[id(args[i].labels)] for i in places))
            return real(*args, **kwargs)

        monkeypatch.setattr(transfer, function, spied)

    noting("_fit", 0)
    noting("_logits", 0)
    noting("_neighbours", 0, 1)
    score = accuracy.accuracy

    def scored(labels, predicted, num_classes, metric="top1"):
        calls.note("accuracy", on=name[id(labels)], metric=metric)
        return score(labels, predicted, num_classes, metric)

    monkeypatch.setattr(accuracy, "accuracy", scored)
    calls.model, calls.splits = model, splits
    return calls


FROZEN = {
    "init": "x", "initializer": "glorot_uniform", "zero_gamma": False, "strategy": "auto",
    "train_split": "train", "eval_split": "test", "projector_layers": 0, "projector_width": None,
    "projector_kind": "trained",
}  # fmt: skip


def test_knn_picks_k_on_the_selection_split(frozen, tmp_path):
    config = TrainConfig(**CHANGED | FROZEN)
    result = transfer.knn(config, tmp_path, (1, 5), "cache")
    assert frozen.all("load", "split") == ["fit", "select", "train", "test"]
    assert set(frozen.all("load", "cache")) == {"cache"}
    assert frozen.all("_neighbours", "on") == [("fit", "select"), ("train", "test")]
    by = [(a["on"], a["metric"]) for a in frozen["accuracy"]]
    assert by == [("select", "mean_per_class")] * 2 + [("test", "top1"), ("test", "mean_per_class")]
    assert result["examples"] == ROLES["test"]
    assert transfer.knn(config, tmp_path) == result and len(frozen["load"]) == 4  # not again
    with pytest.raises(EtfzooError, match="holds a run that is not a linear probe"):
        transfer.linear_probe(config, tmp_path)


def test_a_probe_picks_its_strength_on_the_selection_split(frozen, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(backend, "evaluation_step", lambda model: Part(model=model))
    monkeypatch.setattr(accuracy, "predict", lambda step, batches: predictions(0))
    monkeypatch.setattr(
        transfer, "CheckpointManager", lambda workdir: Part(save=lambda *a: seen.update(saved=a))
    )
    config = TrainConfig(**CHANGED | FROZEN)
    result = transfer.linear_probe(config, tmp_path, (1e-3, 1e-1, 10.0), "cache")
    assert frozen.all("_fit", "on") == [("fit",), ("train",)]
    assert set(frozen.all("_logits", "on")) == {("select",)}
    assert {(a["on"], a["metric"]) for a in frozen["accuracy"]} == {("select", "mean_per_class")}
    assert frozen.all("evaluation", "split") == ["test"]
    # The head is the probe of the training split, and that model is kept.
    x, y = frozen.splits["train"]
    wanted = LogisticRegression(C=result["C"], tol=1e-8, max_iter=10_000)
    wanted.fit((x - x.mean(0)) / x.std(0), y)
    head = frozen.model.get_layer("logits")
    kernel = wanted.coef_.T / x.std(0)[:, None]
    np.testing.assert_allclose(head.kernel, kernel, rtol=0, atol=1e-4)
    np.testing.assert_allclose(head.bias, wanted.intercept_ - x.mean(0) @ kernel, rtol=0, atol=1e-3)
    assert seen["saved"][1] is frozen.model
    # Collapse measures are those of the splits that the run is named after.
    for role in ("train", "test"):
        collected = neural_collapse.NeuralCollapseStatistics(5, 4)
        collected.update(*frozen.splits[role])
        wanted = collected.result()["nc1_ratio"]
        assert result[f"nc/{role}/nc1_ratio"] == pytest.approx(wanted)
