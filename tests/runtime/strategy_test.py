"""Strategies: equal to one process on any devices and workers; nothing lost; clear errors."""

import json
import signal
import socket
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.runtime import cluster as clusters
from etfzoo.runtime import step_tf
from etfzoo.runtime.strategy import best_here, get_strategy, is_chief, num_workers
from testing import CHECKOUT, finish_workers, last_checkpoint, make_image_folder, start_workers

BATCH, STEPS = 12, 5

_TRAIN = """
import sys, keras, numpy as np, tensorflow as tf, testing
from etfzoo.measure import accuracy as evaluation
from etfzoo.runtime import step_tf
from etfzoo.training import schedules
from etfzoo.models.classifier import build_classifier
from etfzoo.training.config import TrainConfig
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.runtime.strategy import best_here, get_strategy, is_chief, wait_for_all
from etfzoo.models.weights import as_arrays

name, devices, norm, sync, folder, out = sys.argv[1:]
strategy = get_strategy(name, None, int(devices) or None)
config = TrainConfig(
    "folder", epochs=1, batch_size=12, learning_rate=0.02, nesterov=True, weight_decay=1e-3
)
keras.utils.set_random_seed(0)
with testing.small_rn18(), strategy.scope():
    model = build_classifier(
        "rn18", 4, "etf", norm, (32, 32, 3), feature_norm="bn", dtype="float64"
    )
    optimizer = keras.optimizers.SGD(
        schedules.learning_rate(config, 5), momentum=0.9, nesterov=True, name="sgd"
    )
    optimizer.build(model.trainable_variables)
step_tf.synchronize(model, sync == "sync")
source = resolve("folder:" + folder)
pipeline = Pipeline(source, 32, 32, 1.0, 12, Augmentation("shift", flip=True), seed=3)
stepper = step_tf.Stepper(model, optimizer, strategy, weight_decay=1e-3)
batches = iter(step_tf.distribute(strategy, lambda s: pipeline.training("train", 0, 0, s)))
sums = sum(stepper.train(batches).numpy() for _ in range(5))
arrays = as_arrays(model.variables)
arrays |= {"slot " + k: v for k, v in as_arrays(optimizer.variables).items()}
predictions = evaluation.evaluate(model, source, "test", 12, strategy)._asdict()
shares = next(iter(step_tf.distribute(strategy, lambda s: pipeline.training("train", 0, 0, s))))
shares = strategy.experimental_local_results(shares[0])
arrays |= {"images of device": np.array([len(share) for share in shares])}
assert len({share.device for share in shares}) == len(shares)
if is_chief(strategy):
    arrays |= {"sums": sums} | {"prediction " + k: v for k, v in predictions.items()}
    np.savez(out, **{k.replace("/", "|"): v for k, v in arrays.items()})
wait_for_all(strategy)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    # A fifth of each class is the test split: 19 images, which 2, 3 and 12 do not divide.
    counts = {"a": 21, "b": 24, "c": 25, "d": 26}
    return make_image_folder(tmp_path_factory.mktemp("photos"), counts, size=(32, 32))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Weights, slots and predictions after five steps, by strategy; each computed once."""
    folder = tmp_path_factory.mktemp("trained")
    done = {}

    def train(name, devices, norm, sync="sync"):
        key = (name, devices, norm, sync)
        if key not in done:
            out = folder / ("_".join(map(str, key)) + ".npz")
            workers, virtual = (devices, 0) if name == "multiworker" else (1, devices)
            finish_workers(
                start_workers(["-c", _TRAIN, name, virtual, norm, sync, photos, out], workers)
            )
            done[key] = dict(np.load(out))
        return done[key]

    return train


def largest_difference(one, other):
    """Over all weights and slots."""
    skipped = ("sums", "images of device", "prediction ")
    names = [n for n in one if not n.startswith(skipped)]
    assert one.keys() == other.keys() and len(names) > 60
    return max(float(np.max(np.abs(one[n] - other[n]))) for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "sw"])
@pytest.mark.parametrize("name, devices", [("mirrored", 2), ("mirrored", 3), ("multiworker", 2)])
def test_equal_to_one_process(trained, name, devices, norm):
    one, several = trained("one_device", 0, norm), trained(name, devices, norm)
    assert largest_difference(one, several) < 1e-9
    local = 1 if name == "multiworker" else devices
    assert several["images of device"].tolist() == [BATCH // devices] * local
    np.testing.assert_allclose(several["sums"], one["sums"], rtol=1e-9)
    assert one["sums"][2] == BATCH * STEPS
    # Evaluation: every example once, in the same order, with the same outcome.
    assert len(one["prediction labels"]) == 19
    for column in ("labels", "predicted", "in_top5"):
        np.testing.assert_array_equal(several[f"prediction {column}"], one[f"prediction {column}"])
    np.testing.assert_allclose(several["prediction loss"], one["prediction loss"], rtol=1e-8)


@pytest.mark.slow
def test_without_synchronized_norms_it_differs(trained):
    one = trained("one_device", 0, "bn")
    assert largest_difference(one, trained("mirrored", 2, "bn", "alone")) > 1e-3


def test_synchronization_is_never_saved(small_network, tmp_path):
    model = etfzoo.build_classifier("rn18", 4, "etf", "sw", (32, 32, 3), feature_norm="bn")

    def synchronized(model):
        return [x.name for x in model.layers if getattr(x, "synchronized", False)]

    assert not synchronized(model)
    step_tf.synchronize(model, True)
    assert len(synchronized(model)) == 9 and "logits" in synchronized(model)
    model.save(tmp_path / "model.keras")
    etfzoo.publish(model, tmp_path / "published")
    assert not synchronized(keras.models.load_model(tmp_path / "model.keras"))
    assert not synchronized(etfzoo.load(tmp_path / "published"))


def pretraining(workdir, data_dir, *flags):
    return [
        CHECKOUT / "recipes/pretrain.py", "--strategy=multiworker", "--dataset=digits",
        f"--data_dir={data_dir}", "--backbone=rn18", "--protocol=quickstart", "--epochs=2",
        "--image_size=16", "--batch_size=50", "--checkpoint_every=2",
        f"--workdir={workdir}", *flags,
    ]  # fmt: skip


def final(workdir):
    return last_checkpoint(workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two workers, which prepare their data themselves."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "data").mkdir()
    outputs = finish_workers(start_workers(pretraining(folder / "run", folder / "data"), 2))
    return folder, outputs


@pytest.mark.slow
def test_two_workers_from_the_recipe_to_a_published_model(whole):
    folder, ((out, _), (other, _)) = whole
    run = folder / "run"
    assert "Epoch 2/2 - 4/4" in out and "Epoch" not in other  # progress at the chief only
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[-1]["examples"] == 1297
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.npz",
        "step-0000000006.npz",
        "step-0000000008.npz",
    ]
    etfzoo.publish(etfzoo.load(run), folder / "rn18_etf.digits")
    loaded = etfzoo.load(folder / "rn18_etf.digits")
    arrays, _ = final(run)
    np.testing.assert_array_equal(arrays["model/conv1_conv/kernel"], loaded.layers[2].kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, victim, codes",
    [(signal.SIGKILL, 0, (-9, 76)), (signal.SIGKILL, 1, (-9, 76)), (signal.SIGTERM, 1, (75,))],
)
def test_a_stopped_worker_stops_all_and_nothing_is_lost(whole, tmp_path, number, victim, codes):
    folder, _ = whole
    command = pretraining(tmp_path / "run", folder / "data")
    processes = start_workers(command, 2)
    while not list(tmp_path.glob("run/checkpoints/step-*.npz")):
        assert all(p.poll() is None for p in processes)
        time.sleep(0.01)
    processes[victim].send_signal(number)
    outputs = finish_workers(processes, codes, timeout=60)
    if number == signal.SIGKILL:
        assert "another worker is gone" in outputs[1 - victim][1]
    assert not (tmp_path / "run/result.json").exists()
    finish_workers(start_workers(command, 2))
    (arrays, state), (wanted, wanted_state) = final(tmp_path / "run"), final(folder / "run")
    assert state == wanted_state and arrays.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(arrays[name], wanted[name], name)


@pytest.mark.slow
def test_workers_that_disagree_on_flags(whole, tmp_path):
    folder, _ = whole

    def command(index):
        return pretraining(tmp_path / "run", folder / "data", f"--learning_rate={0.1 * index}")

    for _, err in finish_workers(start_workers(command, 2), codes=(2,), timeout=120):
        assert "error: the workers disagree on learning_rate (here 0" in err
    assert not (tmp_path / "run").exists()


def cluster(workers, kind="worker", index=0, job="worker"):
    return json.dumps({"cluster": {job: workers}, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "does not know the workers: set TF_CONFIG"),
        ("{", "TF_CONFIG cannot be read"),
        ("[]", "TF_CONFIG cannot be read"),
        ('{"cluster": {}, "task": {"type": "worker", "index": 0}}', "must name workers"),
        (cluster(["a:1"], index=1), "this is worker 1, and its cluster has no such task"),
        (cluster(["a:1"], kind="chief"), "this is chief 0, and its cluster has no such task"),
        (cluster(["a:1"], "ps", job="ps"), r"not \['ps'\]"),
        (cluster(["localhost"]), "'localhost' where host:port belongs"),
        (cluster(["a:1", "a:1"]), "the same address twice"),
    ],
)
def test_bad_tf_config(monkeypatch, config, message):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(EtfzooError, match=message):
        get_strategy("multiworker")


def slurm_step(monkeypatch, **changes):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    step = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[9-10],login",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2),2",
        "SLURM_PROCID": "2",
    }
    for name, value in (step | changes).items():
        monkeypatch.setenv(name, value)


def test_the_workers_of_a_slurm_step_in_its_own_order(monkeypatch):
    slurm_step(monkeypatch)
    workers = ["node9:8888", "node10:8888", "login:8888", "login:8889"]
    assert json.loads(clusters._slurm_tf_config()) == json.loads(cluster(workers, index=2))


@pytest.mark.parametrize(
    "name, value", [("NODELIST", "node["), ("TASKS_PER_NODE", "1"), ("TASKS_PER_NODE", "many")]
)
def test_a_bad_slurm_step(monkeypatch, name, value):
    slurm_step(monkeypatch, **{f"SLURM_STEP_{name}": value})
    with pytest.raises(EtfzooError, match="the Slurm step cannot be read .* srun"):
        get_strategy("multiworker")


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TF_CONFIG", cluster([f"127.0.0.1:{port}", "127.0.0.1:1"]))
        with pytest.raises(EtfzooError, match=f"port {port} of this worker is in use"):
            get_strategy("multiworker")


def test_other_strategies_and_their_errors():
    assert get_strategy("one_device") is tf.distribute.get_strategy()
    assert best_here() == "one_device"
    strategy = get_strategy("auto")
    assert num_workers(strategy) == 1 and is_chief(strategy)
    with pytest.raises(EtfzooError, match="unknown strategy 'mirored'; did you mean mirrored"):
        get_strategy("mirored")
    with pytest.raises(EtfzooError, match="no TPU found on this machine"):
        get_strategy("tpu")
    with pytest.raises(EtfzooError, match="no GPU found .* `num_virtual_devices=2`"):
        get_strategy("mirrored")
    with pytest.raises(EtfzooError, match="goes with `strategy=mirrored`"):
        get_strategy("one_device", None, 2)
