"""A run's folder whose files were damaged, replaced or planted: made again, or one line."""

import copy
import json
import logging
import os
import random
import shutil
import types

import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint
from etfzoo.runtime import hardware
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def config(embedded_dir):
    return TrainConfig(
        "digits",
        data_dir=str(embedded_dir),
        backbone="rn18",
        image_size=8,
        epochs=2,
        augment="none",
        crop=1.0,
        batch_size=50,
        keep_checkpoints=3,
        checkpoint_every=1,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("damage") / "run")
    loop.train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy whose checkpoints are links: they are replaced, never written into."""
    yield Workdir(shutil.copytree(trained, tmp_path / "run", copy_function=_link_or_copy))
    shutil.rmtree(tmp_path / "run")


def _link_or_copy(source, target):
    (os.link if source.endswith(".npz") else shutil.copy)(source, target)


def damaged_text(rng, text):
    """A text file that something has gone wrong with."""
    content = bytearray(text)
    at = rng.randrange(len(content))
    return {
        "truncated": lambda: content[:at],
        "zeros": lambda: bytes(len(content)),
        "a byte": lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        "not UTF-8": lambda: b"\xff\xfe" + content,
        "empty": lambda: b"",
        "doubled": lambda: content + content,
        "nested": lambda: b"[" * 10**5,
    }


def damaged_json(rng, document):
    """A document of which one value is another one."""
    document = copy.deepcopy(document)
    where = document
    while True:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = rng.choice(list(keys))
        inner = where[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            where = inner
            continue
        values = [None, True, -1, 10**30, 1e300, float("nan"), float("inf"), "text", [], {}, [[]]]
        where[key] = rng.choice([v for v in values if v != inner])
        return document, f"{key}: {inner} is {where[key]}"


FILES = ["config", "result", "machine", "data", "metrics_csv", "metrics_jsonl"]
LOGS = ("machine", "metrics_csv", "metrics_jsonl", "tensorboard")


def ends(config, run, trained, log=False):
    """The run ends as it did, or with one line that names a file of it."""
    try:
        assert loop.train_and_evaluate(config, run) == trained.read_result()
        assert run.read_result() == trained.read_result()
    except EtfzooError as error:
        assert not log, error
        assert str(run.path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(2))
def test_files_of_a_finished_run(run, config, trained, name, seed):
    rng = random.Random(f"{name} {seed}")
    path = getattr(run, name)
    kinds = damaged_text(rng, path.read_bytes())
    damage = rng.choice(sorted(kinds))
    path.write_bytes(kinds[damage]())
    ends(config, run, trained, log=name in LOGS)
    # One line with its place where it cannot be made again; else it is there and whole.
    if name == "result":
        assert run.read_result() == trained.read_result(), damage
    hardware.read(run)


@pytest.mark.parametrize("seed", range(8))
def test_values_of_a_finished_run(run, config, trained, seed):
    rng = random.Random(f"values {seed}")
    path = getattr(run, ("config", "result", "machine", "data")[seed % 4])
    document, what = damaged_json(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(document))
    ends(config, run, trained, log=seed % 4 == 2)
    found = hardware.read(run)
    assert found.get("seconds", 0) >= 0 and isinstance(found.get("command", ""), str), what


IN_THE_WAY = ("pipe", "folder", "device", "file")


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_no_log_stops_a_run(run, config, trained, shift, caplog):
    """It ends as it did, while none of its logs can be written: something else is there."""
    kinds = {name: IN_THE_WAY[(i + shift) % 4] for i, name in enumerate(LOGS)}
    run.result.unlink()
    checkpoint.CheckpointManager(run).paths()[0].unlink()  # so that some is left to do
    for name, kind in kinds.items():
        path = getattr(run, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/full")
        else:
            path.write_text("file")
    with caplog.at_level(logging.WARNING, "etfzoo"):
        ends(config, run, trained, log=True)
    for name, kind in kinds.items():
        told = f"the run goes on without {getattr(run, name)}: " in caplog.text
        written = "folder" if name == "tensorboard" else "file"
        assert told or kind == written, (name, kind)


def good_states(config, trained):
    for path in checkpoint.CheckpointManager(trained).paths():
        yield path, checkpoint.read(path, only_state=True)[1]


def check(config, steps):
    """`_check_state` of a run of so many steps an epoch."""
    names = ("epoch", "step", "totals", "history", "best")
    run = types.SimpleNamespace(config=config, steps=steps, state=dict.fromkeys(names))
    return lambda path, state: loop.Trainer._check_state(run, path, state)


def test_states_of_checkpoints(config, trained):
    """Drawn damages: each value of another type or out of its range is noticed."""
    good = list(good_states(config, trained))
    steps = checkpoint.step_of(good[0][0]) // config.epochs
    accept = check(config, steps)
    for path, state in good:
        accept(path, state)
    rng, refused = random.Random(0), 0
    for _ in range(600):
        path, state = rng.choice(good)
        kept = {name: state[name] for name in ("epoch", "step", "totals", "history", "best")}
        document, what = damaged_json(rng, kept)
        try:
            accept(path, document)
        except EtfzooError as error:
            refused += 1
            assert str(path) in str(error)
        else:  # figures of the history may be any numbers, and the best may be unknown
            value = what.rpartition(" is ")[2]
            assert what.startswith(("best: ", "totals: ")) or value in (
                "-1", "True", "inf", "nan", "1e+300", "1" + "0" * 30,
            ) or what.split(":")[0] in "012", what  # fmt: skip
    assert refused > 300
    path, state = good[0]
    for change in (
        {"step": steps + 1},
        {"epoch": config.epochs + 1},
        {"epoch": -1},
        {"epoch": True},
        {"history": state["history"][:-1]},
        {"totals": [0, 0]},
        {"totals": [float("nan"), 0, 0]},
        {"best": float("nan")},
        {"best": 2},
    ):
        with pytest.raises(EtfzooError, match="its state is none of this run"):
            accept(path, state | change)
    with pytest.raises(EtfzooError, match="its state is none of this run"):
        accept(path.with_name("step-0000000099.npz"), state)


def rewrite(path, **changes):
    with np.load(path) as there:
        arrays = dict(there)
    state = json.loads(arrays["state"].tobytes()) | changes
    arrays["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    path.unlink()
    np.savez(path, **arrays)


def test_a_state_that_cannot_be_is_left_for_the_one_before(run, config, trained, caplog):
    run.result.unlink()
    last, before, *_ = checkpoint.CheckpointManager(run).paths()
    rewrite(last, epoch=7)
    rewrite(before, totals="text")
    assert loop.train_and_evaluate(config, run) == trained.read_result()
    assert caplog.text.count("its state is none of this run; trying the checkpoint before it") == 2


def test_strays_among_the_checkpoints(run, config, trained):
    """They are neither read nor counted nor removed."""
    run.result.unlink()
    last = checkpoint.CheckpointManager(run).paths()[0]
    names = [
        "step-x.npz",
        "step-0000000004 (copy).npz",
        "step-4.npz",
        "step-.npz",
        "step-99999.npz",
    ]
    for name in names:
        os.link(last, run.checkpoints / name)
    os.link(last, run.checkpoints / "step-0000000999.npz")  # the name of another step
    (run.checkpoints / "step-0000009999.npz").mkdir()
    assert loop.train_and_evaluate(config, run) == trained.read_result()
    assert all((run.checkpoints / name).exists() for name in names)


def test_all_checkpoints_damaged(run, config):
    run.result.unlink()
    for path in checkpoint.CheckpointManager(run).paths():
        rewrite(path, epoch=-1)
    with pytest.raises(EtfzooError, match="all .* are damaged; delete them to start again"):
        loop.train_and_evaluate(config, run)


@pytest.mark.parametrize(
    "content, kept",
    [
        ({"hardware": "X", "seconds": 2.5, "command": "python a.py"}, 3),
        ({"hardware": 1, "seconds": 2.5, "command": "python a.py"}, 2),
        ({"hardware": "X\x1b[2J", "seconds": -1, "command": "python 'a.py"}, 0),
        ({"hardware": "X", "seconds": float("nan"), "command": ""}, 1),
        ({"seconds": True, "other": 1}, 0),
        ([1], 0),
        ("text", 0),
        (None, 0),
    ],
)
def test_what_is_known_of_a_machine(tmp_path, content, kept, caplog):
    Workdir(tmp_path).machine.write_text(json.dumps(content))
    found = hardware.read(tmp_path)
    assert len(found) == kept and found.items() <= (content if kept else {}).items()
    assert ("machine.json is damaged" in caplog.text) == (kept < 3)
