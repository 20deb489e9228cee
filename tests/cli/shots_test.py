"""evaluate.py by the number of training images of each class."""

import csv
import dataclasses
import json

import pytest

import etfzoo
from etfzoo.training.config import TrainConfig
from testing import make_classifier, make_image_folder, run_recipe, save_run

pytestmark = pytest.mark.small_rn18
NAMES = ("ant", "bee", "cat")  # of a tail at 8: 128, 45 and 16 training images


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
        return tmp_path / "run"

    return made


def evaluate(handle, data, tmp_path, *flags, **options):
    out = run_recipe(
        "evaluate", f"--model={handle}", f"--dataset=folder:{data}",
        f"--output={tmp_path / 'report'}", *flags, **options,
    )  # fmt: skip
    if options:
        return out, None
    return out, json.loads((tmp_path / "report/metrics.json").read_text()).get("shots")


def of_a_tail(tmp_path):
    with open(tmp_path / "report/per_class.csv", newline="") as file:
        shares = [float(row["accuracy"]) for row in csv.DictReader(file)]
    return {
        name: {"accuracy": pytest.approx(share, abs=5e-5), "classes": 1}
        for name, share in zip(("many", "medium", "few"), shares, strict=True)
    }


def test_a_model_that_learned_a_tail(make_run, photos, tmp_path):
    run = make_run(8)
    out, found = evaluate(run, photos, tmp_path)
    assert found == of_a_tail(tmp_path)
    assert f"medium-shot {100 * found['medium']['accuracy']:.2f} % (1 classes)" in out
    out, found = evaluate(run, photos, tmp_path, "--noshots")
    assert found is None and "-shot" not in out


def test_a_published_model_that_learned_a_tail(model, photos, tmp_path):
    config = dataclasses.asdict(TrainConfig(f"folder:{photos.name}", imbalance=8))
    folder = etfzoo.publish(model, tmp_path / "rn18_etf.x", provenance={"config": config})
    _, found = evaluate(folder, photos, tmp_path)
    assert found == of_a_tail(tmp_path)
    strange = etfzoo.publish(model, tmp_path / "rn18_etf.y", provenance={"config": {"x": 1}})
    assert evaluate(strange, photos, tmp_path)[1] is None
    out, _ = evaluate(strange, photos, tmp_path, "--shots", code=2)
    assert "no training configuration" in out


def test_a_model_that_learned_no_tail(make_run, model, photos, tmp_path):
    run = make_run(1)
    out, found = evaluate(run, photos, tmp_path)
    assert found is None and "-shot" not in out
    out, found = evaluate(run, photos, tmp_path, "--shots")
    assert found["many"]["classes"] == 3 and "many-shot" in out and "few-shot" not in out
    assert found["few"] == found["medium"] == {"accuracy": None, "classes": 0}
    unknown = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    assert evaluate(unknown, photos, tmp_path)[1] is None
    out, _ = evaluate(unknown, photos, tmp_path, "--shots", code=2)
    assert "does not tell what it was trained on: leave out --shots" in out


def test_another_data_set_than_the_one_that_was_trained_on(make_run, photos, tmp_path):
    run = make_run(8, "digits")
    out, found = evaluate(run, photos, tmp_path)
    assert found is None and "-shot" not in out
    assert f"the long tail that was trained on is not looked at: {run} was trained on digits" in out
    out, _ = evaluate(run, photos, tmp_path, "--shots", code=2)
    assert f"was trained on digits, not on folder:{photos}: leave out --shots" in out
