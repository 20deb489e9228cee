"""Helpers that several test files share."""

import contextlib
import dataclasses
import html.parser
import importlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[1]
# Code in another interpreter may import what stands beside a test.
_PATH = os.pathsep.join(
    map(str, [CHECKOUT, CHECKOUT / "tests", *(CHECKOUT / "tests").glob("[a-z]*/")])
)
CLASS_NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
SIDE = 32


def smooth_image(height, width, seed=0):
    """uint8 RGB image without sharp edges, on which any good filters and codecs agree."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    channels = []
    for _ in range(3):
        a, b, phase = rng.uniform(0.5, 2, 3)
        channels.append(127.5 + 90 * np.sin(2 * (a * x + b * y) + phase))
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def claiming(encoded, height, width):
    """A PNG or JPEG with other sides in its header; all else stays."""
    if encoded.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + encoded[24:29]
        return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    frame = max(encoded.find(b"\xff\xc0"), encoded.find(b"\xff\xc2")) + 5
    return encoded[:frame] + struct.pack(">HH", height, width) + encoded[frame + 4 :]


def make_image_folder(root, classes, size=(8, 8), suffix=".png"):
    """Writes `{class: count}` random images to `root/class/NNN.png`; returns `root` as a Path."""
    root = Path(root)
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}{suffix}")
    return root


@contextlib.contextmanager
def nobody():
    """Without the rights of root, which no permission of a file stops."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def fresh_python(code, *args, **environment):
    """Runs code in a new interpreter with `args` as `sys.argv[1:]`; returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": _PATH} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["keras_cv", "etfzoo.training.loop"])


def forked_python(code, *args):
    """As `fresh_python`, in a fork of a process that has imported TensorFlow and begun nothing.

    That saves the seconds of the import, and rn18 is as small there as it is here. What hangs on
    the import itself (which module comes when, Keras's backend) takes `fresh_python`.
    """
    from etfzoo.models import table

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out", Path(folder) / "err"
        with mock.patch.dict(os.environ, PYTHONPATH=_PATH):
            process = _FORKS.Process(
                target=_run_code,
                args=(code, ["-c", *map(str, args)], dict(os.environ), table.BACKBONES, output),
            )
            process.start()  # the first one starts the process that is forked
        process.join(300)
        process.kill()
        out, err = (path.read_text("utf-8") for path in output)
    assert process.exitcode == 0, err[-3000:]
    return out


def _run_code(code, argv, environment, backbones, output):
    from etfzoo.models import table

    sys.argv = argv
    table.BACKBONES.update(backbones)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = _PATH.split(os.pathsep)
    out, err = (open(path, "w", encoding="utf-8") for path in output)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    with out, err, redirect_stdout(out), redirect_stderr(err):
        try:
            exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            raise


def run_recipe(recipe, *flags, code=0, cwd=None):
    """Runs a recipe in this process, its flags fresh; returns what it printed.

    What a process alone shows (signals, environment, several devices) takes `start_recipe`.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = [str(CHECKOUT / "recipes" / f"{recipe}.py"), *map(str, flags)]
    with as_a_process(argv, cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            importlib.import_module(f"etfzoo.cli.{recipe}").run()
            ended = 0
        except SystemExit as end:
            ended = end.code or 0
    return check_ending(recipe, ended, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_a_process(argv, cwd=None):
    """Sets back what a command changes for the whole process."""
    from absl import app
    from absl.testing import flagsaver

    from etfzoo.cli import flags

    levels = {name: logging.getLogger(name).level for name in ("tensorflow", "absl")}
    logger = logging.getLogger("etfzoo")
    kept = {name: vars(logger)[name] for name in ("level", "propagate")}
    with (
        flagsaver.flagsaver(),  # also forgets the flags that the command defines
        mock.patch.dict(flags.GROUPS, clear=True),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))),
        mock.patch.object(logger, "handlers", []),
        contextlib.chdir(cwd or os.getcwd()),
    ):
        try:
            yield
        finally:
            logger.propagate = kept["propagate"]
            logger.setLevel(kept["level"])
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def check_ending(recipe, ended, code, out, err):
    """What a recipe printed, once it ended with `code`. A bad end must be one line, the last."""
    assert ended == code, f"{recipe} ended with {ended}:\n{out}\n{err}"
    if code == 2:
        *warnings, line = err.splitlines()
        assert line.startswith("error: ") and "Traceback" not in err, err
        assert not any(warning.startswith("error: ") for warning in warnings), err
    return out + err


def finish(recipe, process, code=0):
    """What a started recipe prints until its end, see `check_ending`."""
    out, err = process.communicate(timeout=900)
    return check_ending(recipe, process.returncode, code, out, err)


def start_recipe(recipe, *flags, cwd=None, **environment):
    """Starts a recipe as a user does: in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(CHECKOUT / "recipes" / f"{recipe}.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | environment,
    )


def start_workers(command, count, **environment):
    """Starts the processes of a cluster on this machine; one alone belongs to none.

    Args:
        command: arguments of the interpreter, or a function from the worker's index to them.
        count: of the processes.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    processes = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        env = os.environ | {"PYTHONPATH": _PATH} | environment
        if count > 1:
            env["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        command_of = command(index) if callable(command) else command
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command_of)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish_workers(processes, codes=(0,), timeout=500):
    """What the processes print, once they have ended with one of the exit codes."""
    try:
        outputs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, outputs, strict=True):
        assert p.returncode in codes, f"exit code {p.returncode}:\n{out}\n{err[-3000:]}"
    return outputs


def last_checkpoint(workdir, path=None):
    """Arrays and state of a run's last checkpoint, or of a file, but for the id of the run."""
    from etfzoo.models import checkpoint

    arrays, state = checkpoint.read(path or checkpoint.CheckpointManager(workdir).paths()[0])
    del state["run"]
    return arrays, state


@contextlib.contextmanager
def held_by_another_process(folder):
    """Another process that has the lock of a folder."""
    code = "import sys; from etfzoo import locks\nwith locks.lock(sys.argv[1], 'it'): input('held')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": _PATH},
    )
    assert process.stdout.read(4) == b"held"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def randomize(model, seed=0):
    """Brings a model into a state that no initializer gives, but for the kernel of an ETF."""
    rng = np.random.default_rng(seed)
    for v in model.variables:
        if v.path == "logits/kernel" and not v.trainable:
            continue
        noise = rng.normal(size=v.shape)
        if v.name in ("gamma", "moving_variance"):
            v.assign(np.abs(1 + 0.2 * noise))
        elif v.name == "moving_covariance":
            v.assign(noise @ np.swapaxes(noise, -1, -2) / v.shape[-1])
        elif v.name == "kernel":
            v.assign(noise * np.sqrt(2 / np.prod(v.shape[:-1])))
        else:
            v.assign(0.1 * noise)
    return model


@contextlib.contextmanager
def small_rn18():
    """rn18 with 3 of its 8 blocks and few channels, for tests of what hangs on neither.

    Graphs of a third of the size, and 0.1 million weights in place of 11 (the stem keeps its 64
    channels). Not for tests that compare with a process that they start: it knows the real one.
    """
    from etfzoo.models import table

    row = dataclasses.replace(table.BACKBONES["rn18"], blocks=(2, 1), filters=(64, 32))
    with mock.patch.dict(table.BACKBONES, rn18=row):
        yield


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of `size` (as mount spells it, e.g. "20m") at a new folder; root only."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def make_classifier(head="etf", seed=3, backbone="rn18", **changes):
    """A small classifier in a state that no initializer gives."""
    import etfzoo

    spec = {"input_shape": (SIDE, SIDE, 3), "mean": (120.0, 110, 100), "std": (50.0, 60, 70)}
    if head == "etf":
        spec |= {"feature_norm": "bn"}
    if head is not None:
        spec |= {"class_names": CLASS_NAMES}
    spec |= {"num_classes": len(CLASS_NAMES) if head is not None else None} | changes
    model = etfzoo.build_classifier(backbone, head=head, **spec)
    randomize(model, seed)
    return model


def save_run(config, model, workdir, step=1):
    """The workdir that a run of this config leaves with this model, as far as evaluation asks."""
    from etfzoo.models import checkpoint
    from etfzoo.training import identity

    run = identity.claim(config, workdir, {})
    checkpoint.CheckpointManager(workdir).save(step, model, None, run)
    return workdir


def assert_same_in_float64(one, other):
    """Two runs of five steps on the same images: weights, slots, sums and predictions by name."""
    assert one.keys() == other.keys() and len(one) > 90
    for name in one:
        assert one[name].shape == other[name].shape
        difference = np.max(np.abs(one[name].astype(float) - other[name]))
        # Sums over 60 examples are compared by their size.
        assert difference < 1e-9 * (one[name][0] if name == "sums" else 1), name
    assert one["sums"][2] == 60 and len(one["prediction labels"]) == 19
    assert one["conv1_conv|kernel"].dtype == other["conv1_conv|kernel"].dtype == np.float64


def random_pixels(n=4, seed=0, side=SIDE):
    """float32 images in 0..255."""
    return np.random.default_rng(seed).uniform(0, 255, (n, side, side, 3)).astype("float32")


def assert_close(actual, expected, tolerance=1e-5):
    """Largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def leftovers(directory):
    """Names of what is in a folder."""
    return [p.name for p in directory.iterdir()] if directory.exists() else []


VOID_TAGS = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """A parsed page: tags with attributes, text by tag, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.text.append((self.open[-1], data))

    def texts(self, tag):
        return [text for owner, text in self.text if owner == tag]
