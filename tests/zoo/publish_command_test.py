"""Tests of recipes/publish.py as a user calls it, of the card and of what a run records."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo import files
from etfzoo.models import checkpoint
from etfzoo.runtime import hardware
from etfzoo.training import publish_run
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo import card, index, manifest, saved_model
from testing import CHECKOUT, randomize, run_recipe, save_run

NAME = "rn18_etf.digits"


def publish(*flags, code=0):
    return run_recipe("publish", *flags, code=code)


pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a finished training leaves, by the functions that write it; only nothing was learnt."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = TrainConfig("digits", "/some/place", backbone="rn18", image_size=32, epochs=1)
    model = randomize(etfzoo.build_classifier("rn18", 10, input_shape=(32, 32, 3)))
    save_run(config, model, folder, step=7)
    hardware.write(folder, 12.5)
    files.write_text(folder / "result.json", json.dumps({"top1": 0.25, "examples": 1297}))
    return folder


def change_config(workdir, **values):
    config = TrainConfig.load(workdir / "config.json")
    dataclasses.replace(config, **values).save(workdir / "config.json")


def contents(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_what_a_run_records(workdir):
    found = hardware.read(workdir)
    assert found.keys() == {"hardware", "seconds", "command"}
    assert f"{os.cpu_count()} cores" in found["hardware"] and found["seconds"] == 12.5
    document = json.dumps(found | {"command": "python first.py"})
    files.write_text(Workdir(workdir).machine, document)
    hardware.write(workdir, 12.5)  # by a process that goes on
    assert hardware.read(workdir)["command"] == "python first.py"


def test_the_command_leaves_out_the_places_of_a_machine():
    argv = [str(CHECKOUT / "recipes/pretrain.py"), "--head=etf", "--workdir=/home/me/run"]
    argv += ["--data_dir", "/data", "-workdir=x", "--dataset=folder:my photos"]
    command = hardware._command(argv)
    assert command == "python recipes/pretrain.py --head=etf '--dataset=folder:my photos'"
    assert hardware._command(["/home/me/train.py", "1"]) == "python train.py 1"


def test_a_published_command_names_no_folder_of_the_machine():
    flags = "--model=/home/me/runs/a --init ../b/ '--dataset=folder:~/my photos' --i=runs/c"
    found = publish_run._strip_local_folders(
        f"python train.py {flags} --model=https://a.b/c --o=k=/d/e"
    )
    assert found == (
        "python train.py --model=a --init b '--dataset=folder:my photos' --i=runs/c "
        "--model=https://a.b/c --o=k=e"
    )


@pytest.mark.slow
def test_from_a_workdir_to_a_name(workdir, tmp_path):
    """With the commands of the README: publish, serve the folder, load by name elsewhere."""
    zoo = tmp_path / "zoo"
    flags = f"--workdir={workdir}", f"--name={NAME}", f"--models_dir={zoo}"
    listed = f"--index={zoo}/index.json", "--url=http://127.0.0.1:9/zoo/"
    out = publish(*flags, *listed, "--licence=CC0-1.0")
    folder = zoo / NAME / "1"
    pin = manifest.sha256(folder / manifest.NAME)
    assert f"published {folder} (" in out and "the same bit for bit" in out
    assert f"http://127.0.0.1:9/zoo/{NAME}/1#sha256={pin}" in out
    assert sorted(p.name for p in zoo.iterdir()) == ["index.json", NAME]
    assert sorted(p.name for p in (zoo / NAME).iterdir()) == ["1", "README.md"]
    assert (zoo / NAME / "README.md").read_text() == (folder / "README.md").read_text()

    result = json.loads((workdir / "result.json").read_text())
    found = etfzoo.info(folder)
    assert found["metrics"] == result | {"split": "test"}
    made = found["provenance"]
    assert (made["dataset"], made["seed"], made["init"]) == ("digits", 0, None)
    assert made["config"]["epochs"] == 1 and made["command"] and "data_dir" not in made["config"]
    assert made | hardware.read(workdir) == made
    row = index.load(zoo / "index.json").models[NAME]
    assert row.licence == found["licence"] == "CC0-1.0" and row.metrics["top1"] == result["top1"]
    assert row.versions[1].urls == (f"http://127.0.0.1:9/zoo/{NAME}/1",)
    assert row.versions[1].files.keys() == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    }

    before = contents(zoo)
    message = publish(*flags, *listed, "--version=1", code=2)
    assert f"{folder} already exists; choose another --version" in message
    assert contents(zoo) == before

    entry = {"index_path": zoo / "index.json", "url": "http://127.0.0.1:9/zoo"}
    assert publish_run.publish_run(folder, NAME, zoo, **entry) == zoo / NAME / "2"
    assert set(index.load(zoo / "index.json").models[NAME].versions) == {1, 2}
    assert etfzoo.info(zoo / NAME / "2")["provenance"] == made
    assert "version 2" in (zoo / NAME / "README.md").read_text()
    model, again = checkpoint.load_model(workdir), etfzoo.load(zoo / NAME / "2")
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(model(images), again(images))


def test_licences_of_all_images_that_made_the_weights(workdir, tmp_path):
    tuned = shutil.copytree(workdir, tmp_path / "tuned")
    change_config(tuned, dataset="oxford_flowers102", init=str(workdir), eval_split="select")
    files.write_text(tuned / "result.json", json.dumps({"top1": 0.5, "examples": 9, "C": 0.1}))
    folder = publish_run.publish_run(
        tuned, "rn18_etf.flowers", tmp_path / "zoo", limits="Only flowers."
    )
    found = etfzoo.info(folder)
    assert found["licence"] == (
        "as the training images (CC BY 4.0 (UCI); none stated; made for research)"
    )
    for part in (
        "| Trained on | oxford_flowers102 |",
        "| Started from | run |",
        "| Epochs | none: the head was fitted to frozen features |",
        "| Terms of the training images | digits: CC BY 4.0 (UCI); oxford_flowers102: none stated",
        "On 9 images of the validation split:",
        "## Not good for\n\nOnly flowers.\n",
    ):
        assert part in found["card"]
    again = publish_run.publish_run(folder, "rn18_etf.again", tmp_path / "zoo")  # nothing is lost
    for what in ("licence", "provenance", "metrics"):
        assert etfzoo.info(again)[what] == found[what]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdir=x", "--model=y"], "say what to publish: --workdir=DIR or --model=HANDLE"),
        (["--workdir=nowhere", f"--name={NAME}"], "unknown model 'nowhere'"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    assert message in publish(*flags, f"--models_dir={tmp_path}/zoo", code=2)
    assert not os.listdir(tmp_path)


def test_what_is_refused(workdir, tmp_path):
    zoo = tmp_path / "zoo"
    unfinished = shutil.copytree(workdir, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    (tmp_path / "bad.json").write_text("[]")
    photos = shutil.copytree(workdir, tmp_path / "photos")
    change_config(photos, dataset="folder:/home/me/photos")
    tuned = shutil.copytree(workdir, tmp_path / "tuned")
    change_config(tuned, init="/home/me/gone")
    for arguments, options, message in [
        ((unfinished, NAME), {}, "is not finished"),
        ((workdir, "rn50_etf.digits"), {}, "is no name for this model: it is a rn18 with bn and"),
        ((workdir, "rn18_linear.digits"), {}, "is no name for this model"),
        ((workdir, "rn18_sw.digits"), {}, "is no name for this model"),
        ((workdir, NAME), {"url": "http://x"}, "belong into an index: say which with `index`"),
        ((workdir, NAME), {"default": True}, "belong into an index: say which with `index`"),
        ((photos, NAME), {}, "the terms of folder:photos are not known: say under which licence"),
        (
            (tuned, NAME),
            {},
            "the terms of digits or of gone, its start, are not known",
        ),
        ((workdir, NAME), {"index_path": tmp_path / "bad.json", "url": "http://x"}, "is no index"),
        (
            (workdir, NAME),
            {"index_path": tmp_path / "new.json", "url": "ftp://x/y"},
            "addresses that can be loaded begin with",
        ),
        (
            (workdir, NAME),
            {"index_path": tmp_path / "new.json", "url": "https://me@x/y"},
            "put the login of an address into",
        ),
        (
            (workdir, NAME),
            {"index_path": tmp_path / "new.json", "url": "https://x/y#sha256=1"},
            "is no address of a folder of models",
        ),
        ((workdir, NAME), {"version": 2**63}, "version must be a positive integer below"),
        ((workdir, NAME), {"version": 0}, "version must be a positive integer"),
        ((workdir, NAME), {"storage": "int8"}, "storage"),
    ]:
        with pytest.raises(etfzoo.EtfzooError, match=message):
            publish_run.publish_run(*arguments, zoo, **options)
        assert not zoo.exists() or not os.listdir(zoo), message


@pytest.mark.parametrize(
    "step, existing",
    [
        ("check", False),
        ("index", True),
        pytest.param("check", True, marks=pytest.mark.slow),
        pytest.param("card", False, marks=pytest.mark.slow),
        pytest.param("card", True, marks=pytest.mark.slow),
        pytest.param("index", False, marks=pytest.mark.slow),
    ],
)
def test_on_failure_nothing_is_left(workdir, tmp_path, monkeypatch, step, existing):
    zoo = tmp_path / "zoo"
    entry = {"index_path": zoo / "index.json", "url": "http://x"}
    zoo.mkdir()
    if existing:
        publish_run.publish_run(workdir, NAME, zoo, **entry)
    before = contents(zoo)
    text = (zoo / NAME / "README.md").read_text() if existing else None

    def fail(*args, **kwargs):
        raise etfzoo.EtfzooError("it failed")

    if step == "check":  # a real difference: one weight is written otherwise
        stored = saved_model._stored

        def off(variable, storage):
            value = stored(variable, storage)
            return tf.Variable(value + 1) if variable.path == "conv1_bn/beta" else value

        monkeypatch.setattr(saved_model, "_stored", off)
    elif step == "card":
        real = files.atomic

        def write(path, content):  # only the card's place cannot be written
            if path == zoo / NAME / "README.md":
                fail()
            with real(path) as file:
                file.write(content.encode())

        monkeypatch.setattr(files, "write_text", write)
    else:
        monkeypatch.setattr(index, "add", fail)
    message = "1 weights differ, conv1_bn/beta" if step == "check" else "it failed"
    with pytest.raises(etfzoo.EtfzooError, match=message):
        publish_run.publish_run(workdir, NAME, zoo, **entry)
    monkeypatch.undo()
    after = contents(zoo)
    assert after.keys() == before.keys()
    if existing:
        assert (zoo / NAME / "README.md").read_text() == text
        assert set(index.load(zoo / "index.json").models[NAME].versions) == {1}


def test_the_card_of_a_model_of_which_nothing_is_known(tmp_path):
    model = randomize(etfzoo.build_classifier("rn18", 3, input_shape=(32, 32, 3)))
    text = (etfzoo.publish(model, tmp_path / "rn18_etf.x") / "README.md").read_text()
    for title in ("Trained on", "Started from", "Command", "Seed", "Hardware", "Training time"):
        assert f"| {title} | unknown |" in text
    assert "| Epochs | unknown |\n" in text and "Terms of the training images" not in text
    assert "| Licence of the weights | unknown |" in text
    assert "## Accuracy\n\nUnknown.\n" in text and "%" not in text
    assert "fixed ETF head, 3 classes, RGB images of 32 x 32 pixels" in text


def test_the_card_shows_what_is_known(tmp_path):
    spec = etfzoo.build_classifier("rn18", None, head=None, input_shape=(None, None, 3)).spec
    metadata = {
        "spec": spec,
        "provenance": {
            "dataset": "a|b",
            "init": "rn18_etf.in1k",
            "command": "python x.py",
            "hardware": "2 x GPU",
            "seconds": 7261,
            "title": "two letters",
            "epochs": 14,
            "licences": {"a|b": "CC0", "c": "for research"},
            "limits": "Only digits.",
        },
        "metrics": {"top1": 0.125, "examples": 8, "split": "test"},
    }
    text = card.text("rn18_etf.x", 4, metadata)
    for part in (
        "# rn18_etf.x, version 4",
        "no head: pooled features, RGB images of any size",
        "| Trained on | a\\|b: two letters |",
        "| Epochs | 14 |",
        "| Terms of the training images | a\\|b: CC0; c: for research |",
        "| Started from | rn18_etf.in1k |",
        "| Training time | 2 h 1 min |",
        "On 8 images of the test split:\n\n- Top-1: 12.50 %\n",
        "## Good for\n\n- A start for fine-tuning on other images of about any size, by",
        "## Not good for\n\nOnly digits.\n",
    ):
        assert part in text
    assert "decode_predictions" not in text and "long tail" not in text


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"imbalance": 100.0}, "digits; of its training images a long tail, 100 times as many of "),
        ({"imbalance": 1.0}, "digits |"),
        ({}, "digits |"),
        (None, "digits |"),
        ({"imbalance": "many"}, "digits |"),  # by a stranger
    ],
)
def test_the_card_names_the_imbalance(config, shown):
    spec = etfzoo.build_classifier("rn18", 10, input_shape=(32, 32, 3)).spec
    metadata = {"spec": spec, "provenance": {"dataset": "digits", "config": config}}
    assert f"| Trained on | {shown}" in card.text("rn18_etf.x", 1, metadata)
