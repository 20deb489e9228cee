"""Evaluation of runs: what a cell of a sweep says is what the commands say; long tails as seen."""

import dataclasses
import json

import numpy as np
import pytest

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.measure import ood
from etfzoo.training import evaluation
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
from etfzoo.workdir import Workdir
from testing import make_classifier, make_image_folder, run_recipe, save_run

pytestmark = pytest.mark.small_rn18
NAMES = ("ant", "bee", "cat")
TAIL = [128, 45, 16]  # of 160 images at 8, of which a fifth is the test split's


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("photos"), dict.fromkeys(NAMES, 160))


@pytest.fixture(scope="module")
def model():
    return make_classifier(class_names=NAMES, num_classes=3)


@pytest.fixture
def make_run(photos, model, tmp_path):
    def made(imbalance, dataset=f"folder:{photos}"):
        config = TrainConfig(dataset, backbone="rn18", imbalance=imbalance)
        save_run(config, model, tmp_path / "run")
        return dataclasses.replace(config, init=str(tmp_path / "run"), keep_head=True)

    return made


@pytest.fixture
def strangers(embedded_dir):
    return {"data_dir": str(embedded_dir)}, ("digits",)


def test_a_job_says_what_its_command_says(make_run, strangers, tmp_path):
    data, names = strangers
    config = dataclasses.replace(make_run(8.0), **data, batch_size=64)
    job = Job(config, str(tmp_path / "cell"), "evaluate", ood_datasets=names)
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job and job.command == "evaluate"
    result = job.run()
    assert result == Workdir(tmp_path / "cell").read_result()
    run_recipe(job.command, *job.arguments())
    metrics = json.loads((tmp_path / "cell/metrics.json").read_text())
    for name in ("top1", "mean_per_class", "loss", "ece", "examples"):
        assert result[name] == metrics[name], name
    for group in ("many", "medium", "few"):
        assert result[f"shots/{group}"] == metrics["shots"][group]["accuracy"]
        assert result[f"shots/{group}_classes"] == metrics["shots"][group]["classes"] == 1
    for score, row in metrics["ood"]["digits"].items():
        for measure, value in row.items():
            assert result[f"ood/digits/{score}/{measure}"] == pytest.approx(value, abs=1e-12)


def test_it_is_done_once_and_again_for_further_strangers(make_run, photos, tmp_path, monkeypatch):
    config, workdir = make_run(8.0), tmp_path / "cell"
    first = evaluation.evaluate(config, workdir)
    assert not [name for name in first if name.startswith("ood/")]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "load", None)  # nothing is loaded for what is known
        assert evaluation.evaluate(config, workdir) == first
    other = f"folder:{photos}"
    assert evaluation.missing(first, [other]) == [other]
    second = evaluation.evaluate(config, workdir, [other])
    assert second[f"ood/{other}/msp/auroc"] == pytest.approx(0.5)  # the same images
    assert {name: second[name] for name in first} == first
    assert evaluation.missing(second, [other]) == []


def test_without_a_tail_there_are_no_shots(make_run, tmp_path):
    found = evaluation.evaluate(make_run(1.0), tmp_path / "cell")
    assert "ece" in found and not [name for name in found if name.startswith("shots")]


def test_a_model_of_something_else(make_run, photos, tmp_path):
    config = dataclasses.replace(make_run(8.0, "digits"), dataset=f"folder:{photos}")
    with pytest.raises(EtfzooError, match="was trained on digits, not on folder:"):
        evaluation.evaluate(config, tmp_path / "cell")
    assert not (tmp_path / "cell/config.json").exists()
    config = dataclasses.replace(config, init=None, keep_head=False)
    with pytest.raises(EtfzooError, match="needs a trained model"):
        evaluation.evaluate(config, tmp_path / "cell")


@pytest.mark.parametrize("published", [False, True])
def test_collapse_is_that_of_the_tail(make_run, model, photos, tmp_path, published):
    handle = make_run(8.0).init
    if published:
        config = dataclasses.asdict(TrainConfig(f"folder:{photos.name}", imbalance=8))
        handle = etfzoo.publish(model, tmp_path / "rn18_etf.x", provenance={"config": config})
    flags = [f"--model={handle}", f"--dataset=folder:{photos}", "--feature_cache="]
    out = run_recipe("neural_collapse", *flags, f"--output={tmp_path / 'nc.json'}")
    document = json.loads((tmp_path / "nc.json").read_text())
    assert document["splits"]["train"]["examples"] == sum(TAIL)
    assert document["splits"]["test"]["examples"] == 3 * 32
    assert document["imbalance"] == 8 and "long tail of split train" in out


def test_collapse_without_a_tail_is_of_all_images(make_run, photos, tmp_path):
    flags = [f"--model={make_run(1.0).init}", f"--dataset=folder:{photos}", "--feature_cache="]
    run_recipe("neural_collapse", *flags, f"--output={tmp_path / 'nc.json'}")
    document = json.loads((tmp_path / "nc.json").read_text())
    assert document["splits"]["train"]["examples"] == 3 * 128 and "imbalance" not in document


@pytest.mark.parametrize("imbalance", [1.0, 8.0])
def test_strangers_are_told_by_what_was_trained_on(
    make_run, photos, strangers, tmp_path, monkeypatch, imbalance
):
    seen = []

    class Spied(ood.Detector):
        def __init__(self, model, training):
            seen.append(np.bincount(training.labels).tolist())
            super().__init__(model, training)

    monkeypatch.setattr(ood, "Detector", Spied)
    flags = [f"--model={make_run(imbalance).init}", f"--dataset=folder:{photos}"]
    flags += [f"--data_dir={strangers[0]['data_dir']}", f"--output={tmp_path / 'r'}"]
    out = run_recipe("evaluate", *flags, f"--ood_dataset=digits,folder:{photos}")
    assert seen == [TAIL if imbalance == 8 else [128] * 3]
    found = json.loads((tmp_path / "r/metrics.json").read_text())["ood"]
    assert list(found) == ["digits", f"folder:{photos}"]
    same = [row["auroc"] for row in found[f"folder:{photos}"].values()]
    assert same == pytest.approx([0.5] * 4)  # of the same images
    assert f"digits by neco: AUROC {100 * found['digits']['neco']['auroc']:.2f} %" in out
