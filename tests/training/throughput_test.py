"""Measuring of throughput: what is counted, and the recipes that print it."""

import dataclasses
import json
import time

import numpy as np
import pytest
from PIL import Image

from etfzoo.data.pipeline import Pipeline
from etfzoo.errors import EtfzooError
from etfzoo.training import throughput
from etfzoo.training.config import TrainConfig
from testing import finish, run_recipe, start_recipe

pytestmark = pytest.mark.small_rn18


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


BENCHMARK = (
    "--backbone=rn18", "--image_size=16", "--batch_size=4", "--rounds=1", "--seconds=0.2",
)  # fmt: skip


def check_benchmark(out, path, methods):
    document = json.loads(path.read_text())
    assert set(document["versions"]) == {"etfzoo", "keras", "tensorflow"} and document["hardware"]
    assert [row["method"] for row in document["rows"]] == methods
    for row in document["rows"]:
        assert row["image_size"] == 16 and row["batch_size"] == 4 and row["jit_compile"] is False
        for what in ("training", "inference"):
            rate = row[what]
            assert rate["lowest"] <= rate["median"] <= rate["highest"]
            assert f"| {rate['median']:.1f} ({rate['lowest']:.1f} to" in out
        # 11 million float32 weights and their velocity alone
        assert row["memory_of"] == "process" and 2 * 4 * 11e6 < row["peak_memory"]
    assert document["hardware"] in out


def test_benchmark_prints_what_it_writes(tmp_path):
    path = tmp_path / "here.json"
    out = run_recipe("benchmark", *BENCHMARK, "--method=linear", f"--output={path}")
    check_benchmark(out, path, ["linear"])


@pytest.mark.slow
def test_benchmark_goes_on_when_a_combination_fails(tmp_path):
    path = tmp_path / "here.json"
    flags = ("--method=etf,linear,sw", "--num_classes=600", f"--output={path}")
    # in a process of its own: the peak is the process's, with all tests that ran before in it
    out = finish("benchmark", start_recipe("benchmark", *BENCHMARK, *flags), code=2)
    assert "1 of 3 combinations failed" in out and "rn18 etf none 16 4 auto" in out
    assert "no simplex ETF of 600 classes exists in 512 dimensions" in out
    check_benchmark(out, path, ["linear", "sw"])
    assert all(row["peak_memory"] < 4e9 for row in json.loads(path.read_text())["rows"])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--method=arcface", "unknown method 'arcface'; known: etf, linear, sw"),
        ("--batch_size=many", "batch_size must be a whole number; got 'many'"),
        ("--batch_size=2,0", "batch_size must be between 1 and 1048576; got 0"),
        ("--rounds=0", "rounds must be between 1 and 1000; got 0"),
        ("--output=/nonexistent/x.json", "cannot write /nonexistent/x.json"),
    ],
)
def test_benchmark_refuses_in_one_line(flag, message):
    assert message in run_recipe("benchmark", flag, code=2)


def test_a_run_is_input_bound_where_its_step_loses_by_its_input():
    def verdict(ready, step, both, cacheable=True):
        rates = dict(zip(("input", "step", "training"), (ready, step, both), strict=True))
        rates = {name: throughput.Rate(rate, rate, rate, 0.0) for name, rate in rates.items()}
        return throughput.verdict(rates, cacheable)

    assert verdict(300, 100, 96).startswith("not input-bound: 4 % of the step's rate is lost")
    assert verdict(300, 100, 101).startswith("not input-bound: 0 %")
    slow, shared = verdict(50, 100, 49), verdict(300, 100, 75)
    assert slow.startswith("input-bound: 51 %") and "2.0 times what arrives" in slow
    assert shared.startswith("input-bound: 25 %") and "share the processor" in shared
    assert "`cache=device`" in slow and "`cache=device`" not in verdict(50, 100, 49, False)


def test_profile_names_a_broken_image_or_leaves_it_out(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (24, 24), (9 * i, 0, 0)).save(tmp_path / name / f"{i}.jpg")
    broken = tmp_path / "cat" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    config = TrainConfig(
        f"folder:{tmp_path}", backbone="rn18", head="linear", image_size=8, batch_size=8,
        strategy="auto", train_split="train", ema=0.9, class_balance=0.9,
    )  # fmt: skip
    with pytest.raises(EtfzooError, match=r"cat/7\.jpg .* is not a readable image"):
        throughput.profile(config, rounds=1, seconds=0.2)
    config = dataclasses.replace(config, skip_corrupt=True)
    rates = throughput.profile(config, rounds=1, seconds=0.2)
    assert all(rate.median > 0 for rate in rates.values())


def test_profile_of_a_recipe_says_what_it_waits_for_and_writes_nothing(
    embedded_dir, tmp_path, monkeypatch
):
    measure = throughput.profile
    monkeypatch.setattr(
        throughput, "profile", lambda config, seconds: measure(config, rounds=1, seconds=0.2)
    )
    out = run_recipe(
        "pretrain", "--profile", "--dataset=digits", f"--data_dir={embedded_dir}",
        "--backbone=rn18", "--protocol=quickstart", "--image_size=8", "--batch_size=16",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert out.count(" images/s (") == 3
    assert "input-bound" in out and not list(tmp_path.iterdir())
