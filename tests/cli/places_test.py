"""Tests that each report has a place of its own, by model, version, data set and split."""

import json
import shutil

import pytest

import etfzoo
from etfzoo.cli import configs
from etfzoo.training.config import TrainConfig
from testing import make_classifier, make_image_folder, run_recipe, save_run

pytestmark = pytest.mark.small_rn18
NAMES = ("ant", "bee")


def make_run(folder, model, seed=0):
    config = TrainConfig("digits", backbone="rn18", seed=seed)
    return save_run(config, model, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models whose paths end alike: two runs, two versions, and another folder's version."""
    root = tmp_path_factory.mktemp("models")
    model = make_classifier(class_names=NAMES, num_classes=2)
    handles = [make_run(root / a / "full", model, seed) for seed, a in enumerate("ab")]
    handles += [etfzoo.publish(model, root / "x/rn18_etf.x") for _ in range(2)]
    handles += [etfzoo.publish(make_classifier(seed=2), root / "y/rn18_etf.x")]
    return handles


def test_no_two_models_have_one_label(models, monkeypatch):
    labels = [configs.model_label(str(handle)) for handle in models]
    assert len(set(labels)) == 5
    assert labels[0].startswith("full@") and labels[1].startswith("full@")
    assert [label.partition("-")[0] for label in labels[2:]] == [
        "rn18_etf.x@1", "rn18_etf.x@2", "rn18_etf.x@1",
    ]  # fmt: skip
    assert configs.model_label(models[3].parent) == labels[3]  # whose highest version it is
    monkeypatch.setenv("ETFZOO_HOME", str(models[2].parents[1]))
    assert configs.model_label("rn18_etf.x@1") == "rn18_etf.x@1"
    assert configs.model_label("rn18_etf.x") == "rn18_etf.x@2"


def test_a_run_that_is_made_again_has_another_label(models, tmp_path):
    label = configs.model_label(shutil.copytree(models[0], tmp_path / "full"))
    assert label == configs.model_label(models[0])  # a run that was moved is the same
    shutil.rmtree(tmp_path / "full")
    make_run(tmp_path / "full", make_classifier())
    assert configs.model_label(tmp_path / "full") != label
    path = tmp_path / "full/config.json"  # a run of version 0.1
    document = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in document.items() if k not in ("run", "settings")}))
    assert configs.model_label(tmp_path / "full").startswith("full@")


def test_evaluating_overwrites_nothing(models, tmp_path):
    for name in "pq":
        make_image_folder(tmp_path / name, {"ant": 6, "bee": 8})
    # Each differs from the first in one thing.
    evaluated = [(0, "p", "train"), (1, "p", "train"), (2, "p", "train")]
    evaluated += [(0, "q", "train"), (0, "p", "test")]
    for number, data, split in evaluated:
        flags = (f"--model={models[number]}", f"--dataset=folder:{data}", f"--split={split}")
        run_recipe("evaluate", *flags, cwd=tmp_path)
    found = sorted(path.parent for path in tmp_path.glob("runs/evaluate/*/*/metrics.json"))
    assert sorted(path.name for path in found) == sorted(
        f"folder_{data}_{split}" for _, data, split in evaluated
    )
    flags = (f"--model={models[0]}", "--dataset=folder:p", "--feature_cache=", "--split=train,test")
    out = run_recipe("neural_collapse", *flags, cwd=tmp_path)
    run_recipe("neural_collapse", *flags, "--ood_dataset=folder:q", cwd=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("runs/neural_collapse/full@*/*.json"))
    assert names == ["folder_p_train_test.json", "folder_p_train_test_ood_folder_q.json"]
    err = run_recipe("neural_collapse", *flags, "--tap=projected", code=2, cwd=tmp_path)
    assert "unknown tap 'projected'" in err
    assert "written to runs/neural_collapse/full@" in out


def test_collapse_of_features_and_behind_a_projector(tmp_path):
    make_image_folder(tmp_path / "p", {"ant": 6, "bee": 8})
    model = make_classifier(
        class_names=NAMES, num_classes=2, projector_layers=1, projector_width=24
    )
    folder = make_run(tmp_path / "run", model)
    flags = (f"--model={folder}", "--dataset=folder:p", "--split=train", "--feature_cache=")
    out = run_recipe("neural_collapse", *flags, cwd=tmp_path)
    assert "nc3 and nc4 are left out: the head acts on `projected`, not on `features`" in out
    out = run_recipe("neural_collapse", *flags, "--tap=projected", cwd=tmp_path)
    assert "nc3 and nc4 are left out" not in out
    found = {
        path.stem: json.loads(path.read_text())
        for path in tmp_path.glob("runs/neural_collapse/run@*/*.json")
    }
    on, behind = (found[f"folder_p_train{end}"] for end in ("", "_projected"))
    assert (on["tap"], behind["tap"]) == ("features", "projected")
    assert not {"nc3", "nc4"} & on["splits"]["train"].keys()
    assert {"nc3", "nc4"} < behind["splits"]["train"].keys()
    assert on["splits"]["train"]["nc1"] != behind["splits"]["train"]["nc1"]
