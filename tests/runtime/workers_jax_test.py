"""JAX with several processes: equal to one; nothing lost when one stops; errors in one line."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from step_jax_test import _SMALL, _TRAIN

from testing import (
    CHECKOUT,
    assert_same_in_float64,
    finish_workers,
    fresh_python,
    held_by_another_process,
    last_checkpoint,
    make_image_folder,
    start_workers,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="JAX is not installed"
)

# A command as a process of its own, with the small ResNet.
_COMMAND = (
    _SMALL
    + """
import importlib, sys
name = sys.argv[1]
sys.argv[:2] = [f"etfzoo {name}"]
importlib.import_module(f"etfzoo.cli.{name}").run()
"""
)
LOST = 76, -signal.SIGABRT  # of this loop, or of JAX's own watch where that is faster


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What one cluster has compiled others find."""
    cache = {
        "KERAS_BACKEND": "jax",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with mock.patch.dict(os.environ, cache):
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    # A fifth of each class is the test split: 19 images, which no number of workers divides.
    counts = {"a": 21, "b": 24, "c": 25, "d": 26}
    return make_image_folder(tmp_path_factory.mktemp("photos"), counts, size=(32, 32))


@pytest.fixture(scope="module")
def of_one_process(photos, tmp_path_factory):
    """Weights, slots and predictions of one process after five steps in float64, by norm."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def train(norm):
        if norm not in done:
            fresh_python(_TRAIN, "one_device", 1, norm, photos, folder / f"{norm}.npz")
            done[norm] = dict(np.load(folder / f"{norm}.npz"))
        return done[norm]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("workers, devices, norm", [(2, 1, "sw"), (3, 1, "bn"), (2, 2, "bn")])
def test_equal_to_one_process(of_one_process, photos, tmp_path, workers, devices, norm):
    out = tmp_path / "out.npz"
    command = ["-c", _TRAIN, "multiworker", workers * devices, norm, photos, out]
    finish_workers(start_workers(command, workers, JAX_NUM_CPU_DEVICES=str(devices)))
    one, several = of_one_process(norm), dict(np.load(out))
    assert_same_in_float64(one, several)


def pretraining(workdir, data_dir, *flags):
    return [
        "-c", _COMMAND, "pretrain", "--strategy=multiworker", "--dataset=digits",
        f"--data_dir={data_dir}", "--backbone=rn18", "--protocol=quickstart", "--epochs=2",
        "--image_size=16", "--batch_size=48", "--checkpoint_every=2", "--ema=0.9",
        "--neural_collapse_every=2", f"--workdir={workdir}", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(embedded_dir, tmp_path_factory):
    """Uninterrupted runs by number of workers, and what these printed."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run(count):
        if count not in done:
            workdir = folder / f"run{count}"
            done[count] = (
                workdir,
                finish_workers(start_workers(pretraining(workdir, embedded_dir), count)),
            )
        return done[count]

    return run


@pytest.mark.slow
def test_the_first_worker_writes_and_all_evaluate(whole, embedded_dir, tmp_path):
    run, ((out, _), (other, _)) = whole(2)
    assert "Epoch 2/2 - 4/4" in out and "Epoch" not in other  # progress at the first only
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[-1]["examples"] == 1297
    assert rows[1].keys() >= {"nc/train/nc1", "nc/test/nc4"}
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.npz",
        "step-0000000006.npz",
        "step-0000000008.npz",
    ]
    reports = []
    for count in (2, 1):
        flags = [
            f"--model={run}",
            "--dataset=digits",
            f"--data_dir={embedded_dir}",
            "--batch_size=48",
        ]
        flags += [f"--strategy={'multiworker' if count > 1 else 'one_device'}"]
        report, measured = tmp_path / f"report{count}", tmp_path / f"nc{count}.json"
        extra = [f"--output={report}", "--ood_dataset=shapes/source"]
        finish_workers(start_workers(["-c", _COMMAND, "evaluate", *flags, *extra], count))
        extra = [f"--output={measured}", "--split=test", "--feature_cache="]
        finish_workers(start_workers(["-c", _COMMAND, "neural_collapse", *flags, *extra], count))
        reports.append(json.loads((report / "metrics.json").read_text()))
        reports[-1]["nc"] = json.loads(measured.read_text())["splits"]["test"]
    several, one = reports
    assert several["examples"] == one["examples"] == 1297
    assert several["top1"] == pytest.approx(one["top1"], abs=2.01 / 1297)
    assert several["top1"] == pytest.approx(rows[-1]["top1"], abs=2.01 / 1297)
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert several["ood"].keys() == one["ood"].keys()
    for name in ("nc1", "nc3"):
        assert several["nc"][name] == pytest.approx(one["nc"][name], rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, victim, workers",
    [
        (signal.SIGKILL, 0, 2),
        (signal.SIGKILL, 1, 2),
        (signal.SIGKILL, 1, 3),
        (signal.SIGTERM, 0, 2),
        (signal.SIGTERM, 2, 3),
    ],
)
def test_a_stopped_worker_stops_all_and_nothing_is_lost(
    whole, embedded_dir, tmp_path, number, victim, workers
):
    wanted, wanted_state = last_checkpoint(whole(workers)[0])
    command = pretraining(tmp_path / "run", embedded_dir)
    processes = start_workers(command, workers)
    while not list(tmp_path.glob("run/checkpoints/step-*.npz")):
        assert all(p.poll() is None for p in processes)
        time.sleep(0.01)
    processes[victim].send_signal(number)
    codes = (75,) if number == signal.SIGTERM else (-number, *LOST)
    outputs = finish_workers(processes, codes, timeout=30 if number == signal.SIGKILL else 120)
    for index, (process, (_, err)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode == 76:
            assert "another worker is gone" in err
        assert process.returncode == -number or number == signal.SIGTERM or index != victim
    assert not (tmp_path / "run/result.json").exists()
    finish_workers(start_workers(command, workers))
    arrays, state = last_checkpoint(tmp_path / "run")
    assert state == wanted_state and arrays.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(arrays[name], wanted[name], name)


@pytest.mark.slow
def test_images_on_the_devices_of_two_workers(embedded_dir, tmp_path):
    rows = []
    for count in (2, 1):
        run = tmp_path / f"run{count}"
        strategy = "--strategy=" + ("multiworker" if count > 1 else "one_device")
        flags = ["--cache=device", "--learning_rate=1e-4", strategy]
        finish_workers(start_workers(pretraining(run, embedded_dir, *flags), count))
        rows.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]))
    for name in ("train_loss", "loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4), name


@pytest.mark.slow
def test_workers_that_disagree_on_flags(embedded_dir, tmp_path):
    def command(index):
        return pretraining(tmp_path / "run", embedded_dir, f"--learning_rate={0.1 * index}")

    for _, err in finish_workers(start_workers(command, 2), codes=(2,), timeout=120):
        assert "error: the workers disagree on learning_rate (here 0" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_worker_ends_the_others(embedded_dir, tmp_path):
    (tmp_path / "run").mkdir()
    with held_by_another_process(tmp_path / "run"):
        processes = start_workers(pretraining(tmp_path / "run", embedded_dir), 2)
        (_, err), _ = finish_workers(processes, codes=(2, *LOST), timeout=120)
    assert processes[0].returncode == 2 and "a run is at work in" in err
    assert processes[1].returncode in LOST


_JOIN = """
import os, sys
from etfzoo.errors import EtfzooError
from etfzoo.runtime import strategy, strategy_jax

def join():
    try:
        print(strategy.get_strategy("multiworker").num_replicas_in_sync)
    except EtfzooError as error:
        print("error:", error)
"""
# None of these comes so far that JAX begins.
_CANNOT = (
    _JOIN
    + """
import socket

def told(workers, index=0):
    task = f'"task": {{"type": "worker", "index": {index}}}'
    os.environ["TF_CONFIG"] = f'{{"cluster": {{"worker": ["{workers}"]}}, {task}}}'
    join()

os.environ.pop("TF_CONFIG", None)
join()
os.environ["TF_CONFIG"] = "{"
join()
with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    told(address)
strategy_jax._JOINING = 2
told(f'{address}", "127.0.0.1:1', index=1)
"""
)


def test_workers_that_cannot_join_say_so_in_one_line():
    unknown, unreadable, taken, alone = fresh_python(_CANNOT).strip().splitlines()
    assert "error: `strategy=multiworker` does not know the workers: set TF_CONFIG" in unknown
    assert "error: TF_CONFIG cannot be read" in unreadable
    assert "of this worker is in use: end the process that has it" in taken
    assert "error: worker 1 has waited 2 s for 127.0.0.1:" in alone
    assert "in vain: start the first worker there" in alone


@pytest.mark.slow
def test_workers_with_unequal_devices():
    code = "import os, sys; os.environ['JAX_NUM_CPU_DEVICES'] = sys.argv[1]" + _JOIN + "join()"
    for out, _ in finish_workers(start_workers(lambda index: ["-c", code, index + 1], 2)):
        assert (
            "error: all workers must have equally many devices; in their order they have 1, 2"
            in out
        )


_ENDING = """
import sys, time, jax
from etfzoo import internals
index, port, seconds = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
assert len(jax.devices()) == 2 * len(jax.local_devices())
if seconds < 60 and index == 0:
    time.sleep(60)  # as in a collective
if seconds:
    internals.end_without_jax_workers(seconds)
print("ends", flush=True)
sys.exit(2 + index)
"""


@pytest.mark.parametrize("seconds", [0, 1, 60])
def test_a_worker_ends_alone_where_others_go_on(seconds):
    """Without `end_without_jax_workers` it waits for them: where it does not, that can go."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", _ENDING]
    first, other = (
        subprocess.Popen(
            [*command, *map(str, (index, port, seconds))], cwd=CHECKOUT, stdout=subprocess.PIPE
        )
        for index in range(2)
    )
    try:
        assert other.stdout.readline() == b"ends\n"
        if seconds == 0:
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(5)
        else:
            assert other.wait(20) == 3
        if seconds == 60:  # both came
            assert first.wait(20) == 2
    finally:
        for process in (first, other):
            process.kill()
            process.communicate()
