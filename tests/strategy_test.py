"""Strategies: equal to one process, whatever the devices and workers; clear errors."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from testing import CHECKOUT, make_image_folder

BATCH, STEPS = 12, 5

_TRAIN = """
import sys, keras, numpy as np, tensorflow as tf
from etfzoo import schedules, step_tf
from etfzoo.classifier import build_classifier
from etfzoo.config import TrainConfig
from etfzoo.data.augment import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.strategy import get_strategy, is_chief, wait_for_all
from etfzoo.weights import as_arrays

name, devices, norm, sync, folder, out = sys.argv[1:]
strategy = get_strategy(name, None, int(devices) or None)
config = TrainConfig(
    dataset="folder", epochs=1, batch_size=12, learning_rate=0.02, nesterov=True, weight_decay=1e-3
)
keras.utils.set_random_seed(0)
with strategy.scope():
    model = build_classifier(
        "rn18", 4, "etf", norm, (32, 32, 3), feature_norm="bn", dtype="float64"
    )
    optimizer = keras.optimizers.SGD(
        schedules.learning_rate(config, 5), momentum=0.9, nesterov=True, name="sgd"
    )
    optimizer.build(model.trainable_variables)
step_tf.synchronize(model, sync == "sync")
pipeline = Pipeline(
    resolve("folder:" + folder), 32, 32, 1.0, 12, Augmentation("shift", flip=True), seed=3
)
stepper = step_tf.Stepper(model, optimizer, strategy, weight_decay=1e-3)
batches = iter(step_tf.distribute(strategy, lambda s: pipeline.training("train", 0, 0, s)))
sums = sum(stepper.train(batches).numpy() for _ in range(5))
arrays = as_arrays(model.variables)
arrays |= {"slot " + k: v for k, v in as_arrays(optimizer.variables).items()}
if is_chief(strategy):
    np.savez(out, sums=sums, **{k.replace("/", "|"): v for k, v in arrays.items()})
wait_for_all(strategy)
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_workers(commands, **environment):
    """Runs one process for each command, as workers of a cluster when there are several."""
    ports = free_ports(len(commands))
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    processes = []
    for index, command in enumerate(commands):
        env = os.environ | {"PYTHONPATH": str(CHECKOUT)} | environment
        if len(commands) > 1:
            task = {"type": "worker", "index": index}
            env["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [p.communicate(timeout=500) for p in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return make_image_folder(folder, dict.fromkeys("abcd", 20), size=(32, 32))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Weights and slots after five steps, by strategy; each computed once."""
    folder = tmp_path_factory.mktemp("trained")
    done = {}

    def train(name, devices, norm, sync="sync"):
        key = (name, devices, norm, sync)
        if key not in done:
            out = folder / ("_".join(map(str, key)) + ".npz")
            workers = devices if name == "multiworker" else 1
            virtual = 0 if name == "multiworker" else devices
            command = [sys.executable, "-c", _TRAIN, name, str(virtual), norm, sync, photos, out]
            for code, _, err in run_workers([list(map(str, command))] * workers):
                assert code == 0, err[-3000:]
            done[key] = dict(np.load(out))
        return done[key]

    return train


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float(np.max(np.abs(one[k] - other[k]))) for k in one)


@pytest.mark.parametrize("norm", ["bn", "sw"])
@pytest.mark.parametrize("name, devices", [("mirrored", 2), ("mirrored", 3), ("multiworker", 2)])
def test_equal_to_one_process(trained, name, devices, norm):
    one = trained("one_device", 0, norm)
    assert one["sums"][2] == BATCH * STEPS
    difference = largest_difference(one, trained(name, devices, norm))
    print(f"{name} {devices} {norm}: {difference:.1e}")
    assert difference < 1e-9


def test_without_synchronized_norms_it_differs(trained):
    one = trained("one_device", 0, "bn")
    assert largest_difference(one, trained("mirrored", 2, "bn", "alone")) > 1e-3
