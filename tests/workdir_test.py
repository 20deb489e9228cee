"""Names of what lies in a run's folder."""

import json
import os

import pytest

from etfzoo.errors import EtfzooError
from etfzoo.workdir import Workdir, folder_name


def test_names_of_data_sets_are_names_of_folders(tmp_path):
    assert folder_name("imagenet_resized/64x64") == "imagenet_resized_64x64"
    long = ["folder:" + "x/" * 3000 + end for end in ("a", "b")] + ["é" * 300, "\udce9" * 300]
    names = [folder_name(name) for name in long]
    assert len(set(names)) == len(long) and names == [folder_name(name) for name in long]
    for name in names:
        assert len(os.fsencode(name)) <= 120
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{}", "null", '{"top1": 1.5, "mean_per_class": 1, "examples": 9}', "[" * 10**5]
    + [
        '{"top1": "0.5", "mean_per_class": 1, "examples": 9}',
        '{"mean_per_class": 0.5, "examples": 9}',
    ]
    + ['{"top1": NaN, "mean_per_class": 1, "examples": 9}', '{"top1": 0.5, "mean_per_class": 1}'],
)
def test_damaged_results(tmp_path, content, caplog):
    workdir = Workdir(tmp_path)
    assert workdir.read_result() is None and workdir.usable_result() is None
    workdir.write_result(good := {"top1": 0.5, "mean_per_class": 0.4, "examples": 9, "C": 1e-5})
    assert workdir.read_result() == workdir.usable_result() == good
    workdir.result.write_text(content)
    with pytest.raises(EtfzooError, match="result.json is"):
        workdir.read_result()
    assert workdir.usable_result() is None and "result.json is" in caplog.text


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"learning_rate": "1", "weight_decay": 0}]'])
def test_damaged_selections(tmp_path, content):
    workdir = Workdir(tmp_path)
    workdir.selection.write_text('[{"learning_rate": 1, "weight_decay": 0, "top1": -Infinity}]')
    assert workdir.read_selection()[0]["learning_rate"] == 1
    workdir.selection.write_text(content)
    with pytest.raises(EtfzooError, match="selection.json is damaged: it is no list of candidates"):
        workdir.read_selection()


@pytest.mark.parametrize("line", ["1", "{}", '{"epoch": [], "train_loss": 1}', '{"epoch": 1'])
def test_damaged_histories(tmp_path, line):
    workdir = Workdir(tmp_path)
    good = {"epoch": 1, "train_loss": 0.5}
    workdir.metrics_jsonl.write_text(json.dumps(good) + "\n")
    assert workdir.history() == [good]
    workdir.metrics_jsonl.write_text(json.dumps(good) + "\n" + line)
    with pytest.raises(EtfzooError, match="metrics.jsonl"):
        workdir.history()
