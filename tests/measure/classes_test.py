"""Tests of matching classes by name, each beside the same images evaluated class by class."""

import dataclasses
import json

import keras
import numpy as np
import pytest

import etfzoo
from etfzoo.data import sources
from etfzoo.data.augment import evaluation_image
from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy, classes
from etfzoo.models.classifier import build_classifier
from testing import make_image_folder, randomize, run_recipe

pytestmark = pytest.mark.small_rn18
COUNTS = {"ant": 5, "bee": 6, "cat": 7}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"), COUNTS, (40, 36))


@pytest.fixture(scope="module")
def source(root):
    return sources.resolve(f"folder:{root}")


def make(names, head="linear", classes=None):
    return randomize(
        build_classifier(
            "rn18", classes or len(names), head, input_shape=(32, 32, 3), class_names=names
        )
    )


def by_name(model, source):
    """Names of the true class of each image, and the model's logit of each of its own classes."""
    records = list(source.records("train"))
    images = np.stack([evaluation_image(r["image"], 32, 32, 0.875) for r in records])
    logits = np.asarray(model(images), np.float64)
    truth = [source.class_names[int(r["label"])] for r in records]
    return truth, [dict(zip(model.spec.class_names, row, strict=True)) for row in logits]


@pytest.mark.parametrize(
    "names",
    [
        ("ant", "bee", "cat"),
        ("cat", "ant", "bee"),
        ("dog", "cat", "eel", "bee", "fox", "ant"),
        ("cat", "g", "f", "e", "d", "bee", "c", "ant", "b", "a"),
    ],
    ids=["same", "another order", "some of six", "some of ten"],
)
def test_accuracies_are_those_of_the_names(source, names):
    model = make(names)
    out = accuracy.evaluate(model, source, "train", batch_size=5)
    truth, logits = by_name(model, source)
    own = [{name: row[name] for name in source.class_names} for row in logits]
    assert [source.class_names[i] for i in out.labels] == truth
    assert [source.class_names[i] for i in out.predicted] == [max(r, key=r.get) for r in own]
    wanted = [
        np.log(np.sum(np.exp(list(row.values())))) - row[t]
        for t, row in zip(truth, own, strict=True)
    ]
    np.testing.assert_allclose(out.loss, wanted, rtol=1e-3, atol=1e-5)
    assert out.in_top5.all()  # of three classes, however many the model has
    summary = accuracy.summary(out, source.num_classes)
    right = np.mean([max(r, key=r.get) == t for t, r in zip(truth, own, strict=True)])
    assert summary["top1"] == pytest.approx(right)


def test_a_part_is_said_and_a_whole_is_the_model_itself(source, monkeypatch):
    said = []
    monkeypatch.setattr(classes, "notify", lambda text, *args: said.append(text % args))
    model = make(("cat", "ant", "bee"))
    assert classes.on_classes(model, np.arange(3)) is model and not said
    classes.on_classes(model, classes.places(model.spec, source))
    assert not said
    model = make(("cat", "ant", "bee", "dog"))
    network = classes.on_classes(model, classes.places(model.spec, source))
    assert network.output_shape == (None, 3)
    assert len(said) == 1 and "has 3 of the model's 4 classes" in said[0]


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("ant", "bee", "dog"),
            r"the model has 3 classes, .* has 3, others \(dog, ant, bee; cat, ant, bee\): "
            r"fine-tune the model on this data set first, or pass `ignore_class_names` if they are",
        ),
        (("ant", "bee"), r"has 2 classes, .* has 3, others \(ant, bee; cat, ant, bee\): fine-tune"),
        (("ant", "ant", "bee"), "others"),
        (("Ant", "bee", "cat"), r"\(Ant, bee, cat; ant, bee, cat\)"),
        (
            tuple("abcdefgh"),
            r"\(a, b, c, d, ...; ant, bee, cat\): fine-tune the model on this data",
        ),
        (("n" * 500, "bee", "cat"), rf"\({'n' * 30}, bee"),
    ],
)
def test_other_names_are_refused_with_both_lists(source, names, message):
    with pytest.raises(EtfzooError, match=message) as error:
        accuracy.evaluate(make(names), source)
    assert ("ignore_class_names" in str(error.value)) == (len(names) == 3)
    assert len(str(error.value)) < 600


def test_who_means_it_ignores_the_names(source):
    model = make(("x", "y", "z"))
    out = accuracy.evaluate(model, source, "train", ignore_class_names=True)
    truth, logits = by_name(model, source)
    order = dict(zip("xyz", source.class_names, strict=True))
    assert [source.class_names[i] for i in out.predicted] == [
        order[max(row, key=row.get)] for row in logits
    ]
    # ... also where they could be matched: then it is the order that counts
    places = classes.places(make(("cat", "ant", "bee")).spec, source, ignore_names=True)
    np.testing.assert_array_equal(places, np.arange(3))
    with pytest.raises(EtfzooError, match="has 2 classes, data set .* has 3: fine-tune"):
        classes.places(make(("x", "y")).spec, source, ignore_names=True)


def test_without_names_the_numbers_must_agree(source):
    spec = make(None, classes=3).spec
    np.testing.assert_array_equal(classes.places(spec, source), np.arange(3))
    with pytest.raises(EtfzooError, match="has 4 classes, data set .* has 3: fine-tune"):
        classes.places(make(None, classes=4).spec, source)
    with pytest.raises(EtfzooError, match="the model has no head, and .* has 3 classes"):
        classes.places(dataclasses.replace(spec, num_classes=None, head=None), source)


def test_collapse_measures_take_the_head_in_the_order_of_the_data(root, tmp_path):
    """nc4 counts where the head and the nearest class mean choose alike: here it is computed."""
    model = make(("cat", "ant", "bee"), head="etf")
    source = sources.resolve(f"folder:{root}")
    truth, logits = by_name(model, source)
    features = keras.Model(model.input, model.taps["features"])
    records = list(source.records("train"))
    images = np.stack([evaluation_image(r["image"], 32, 32, 0.875) for r in records])
    x = np.asarray(features(images), np.float64)
    means = {name: x[[t == name for t in truth]].mean(0) for name in source.class_names}
    nearest = [min(means, key=lambda n: np.linalg.norm(row - means[n])) for row in x]
    chosen = [max(row, key=row.get) for row in logits]
    wanted = np.mean([a != b for a, b in zip(nearest, chosen, strict=True)])

    folder = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    flags = (f"--model={folder}", f"--dataset=folder:{root}", "--split=train", "--feature_cache=")
    run_recipe("neural_collapse", *flags, "--output=a.json", cwd=tmp_path)
    found = json.loads((tmp_path / "a.json").read_text())["splits"]["train"]
    assert found["nc4"] == pytest.approx(wanted)
    other = etfzoo.publish(make(("cat", "ant", "dog")), tmp_path / "rn18_linear.x")
    flags = (f"--model={other}", *flags[1:], "--output=b.json")
    out = run_recipe("neural_collapse", *flags, cwd=tmp_path)
    assert "nc3 and nc4 are left out: the model has 3 classes" in out
    assert "--ignore_class_names" in out
    assert "nc4" not in json.loads((tmp_path / "b.json").read_text())["splits"]["train"]
