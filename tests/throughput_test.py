"""Measuring of throughput: what is counted, and the recipes that print it."""

import json
import time

import numpy as np
import pytest

from etfzoo import throughput
from etfzoo.config import TrainConfig
from etfzoo.data.pipeline import Pipeline
from testing import run_recipe


def test_works_take_turns_and_all_their_images_count():
    calls = []

    def work(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return np.zeros(())

        return run

    rates = throughput.measure(
        {"a": work("a", 0.01), "b": work("b", 0.04)}, images=5, rounds=3, seconds=0.1
    )
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["a", "b"] * 4  # calibration first
    for name, seconds in (("a", 0.01), ("b", 0.04)):
        rate = rates[name]
        # A sleep may take longer than asked for, never less.
        assert 0 < rate.lowest <= rate.median <= rate.highest <= 5 / seconds
        assert rate.first_seconds >= seconds
    assert calls.count("a") > calls.count("b")


def test_profile_finds_an_input_that_is_slow(embedded_dir, monkeypatch):
    import tensorflow as tf

    def slow(self, *args, **kwargs):
        def late(*batch):
            with tf.control_dependencies([tf.py_function(lambda: time.sleep(0.3), [], [])]):
                return tuple(tf.identity(x) for x in batch)

        return training(self, *args, **kwargs).map(late)

    training = Pipeline.training
    monkeypatch.setattr(Pipeline, "training", slow)
    config = TrainConfig(
        "digits", str(embedded_dir), backbone="rn18", image_size=8, batch_size=8, strategy="auto"
    )
    rates = throughput.profile(config, rounds=2, seconds=0.6)
    assert rates["input"].median <= 8 / 0.3 < rates["step"].median
    assert rates["training"].median <= 8 / 0.3


def test_benchmark_prints_what_it_writes(tmp_path):
    path = tmp_path / "here.json"
    out = run_recipe(
        "benchmark", "--backbone=rn18", "--method=etf,sw", "--image_size=16", "--batch_size=4",
        "--num_classes=7", "--rounds=1", "--seconds=0.2", f"--output={path}",
    )  # fmt: skip
    document = json.loads(path.read_text())
    assert set(document["versions"]) == {"etfzoo", "keras", "tensorflow"} and document["hardware"]
    assert [row["method"] for row in document["rows"]] == ["etf", "sw"]
    for row in document["rows"]:
        assert row["image_size"] == 16 and row["batch_size"] == 4
        for what in ("training", "inference"):
            rate = row[what]
            assert rate["lowest"] <= rate["median"] <= rate["highest"]
            assert f"| {rate['median']:.1f} ({rate['lowest']:.1f} to" in out
        # 11 million float32 weights and their velocity alone
        assert row["memory_of"] == "process" and 2 * 4 * 11e6 < row["peak_memory"] < 16e9
    assert document["hardware"] in out


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--method=arcface", "unknown method 'arcface'; known: etf, linear, sw"),
        ("--batch_size=many", "--batch_size takes numbers"),
        ("--backbone=rn18", "no simplex ETF of 1000 classes exists in 512 dimensions"),
    ],
)
def test_benchmark_refuses_in_one_line(flag, message):
    assert message in run_recipe("benchmark", flag, code=2)


def test_profile_of_a_recipe_says_what_it_waits_for_and_writes_nothing(embedded_dir, tmp_path):
    out = run_recipe(
        "pretrain", "--profile", "--dataset=digits", f"--data_dir={embedded_dir}",
        "--backbone=rn18", "--protocol=quickstart", "--image_size=8", "--batch_size=16",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert out.count(" images/s (") == 3
    assert "input-bound" in out and not list(tmp_path.iterdir())
