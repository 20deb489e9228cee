"""What a try is, how it ends, and what watches over it."""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

NOT_PREPARED = 90
GROUPS = {}
_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


class Silent(Exception):
    """What came out is wrong, and nothing said so."""


class Slow(BaseException):
    """It takes too long; no code between here and the try may catch it."""


class Refused(Exception):
    """A command ended with exit code 2; its line."""


@dataclasses.dataclass
class Group:
    name: str
    tries: int
    seconds: float
    prepare: object


def group(name, tries, seconds=60):
    """Registers a group: a generator function of a folder, which yields what makes a try."""

    def register(function):
        GROUPS[name] = Group(name, tries, seconds, contextlib.contextmanager(function))
        return function

    return register


class Try:
    """One try.

    Attributes:
        number: in its group.
        rng, draw: random generators of Python and NumPy, with the try's own seed.
        place: an empty folder, which is the current one too.
        outside: a folder that must stay as it is.
        what: what is tried, for the log.
    """

    def __init__(self, group, seed, number, base, watch):
        self._watch = watch
        self.number, self.what = number, ""
        self.rng = random.Random(f"{seed} {group} {number}")
        self.draw = np.random.default_rng(self.rng.getrandbits(64))
        self.place, self.outside = base / "inside" / "try", base / "outside"

    @contextlib.contextmanager
    def preparing(self):
        """What is done here is the attacker's doing, and not watched."""
        self._watch.on = False
        yield
        self._watch.on = True


class Watch:
    """Hears what this process does with files: it changes none outside, and links lead to none."""

    def __init__(self, base):
        self.base, self.inside, self.heard, self.on = str(base), str(base / "inside"), [], False
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & os.O_ACCMODE
        elif event in _WRITES:
            path, writes = args[event in ("os.symlink", "os.link")], True
        elif event in ("os.system", "os.exec", "pty.spawn"):
            self.heard.append(f"{event} {args}")
            return
        else:
            return
        if not isinstance(path, str | bytes) or not os.path.isabs(path):
            return  # by a descriptor: below a folder that was opened before
        # What is deleted, moved or made is a name; what is opened is what it leads to.
        path = os.fsdecode(path)
        head, tail = os.path.split(path)
        real = os.path.realpath(path) if event == "open" else f"{os.path.realpath(head)}/{tail}"
        if real.startswith(self.base + "/outside"):
            self.heard.append(f"{event} {real}")
        elif writes and not real.startswith((self.inside, "/dev/", "/proc/")):
            self.heard.append(f"{event} {real}")

    @contextlib.contextmanager
    def watching(self):
        self.heard, self.on = [], True
        try:
            yield
        finally:
            self.on = False


def warm_up():
    """Imports all that a try needs and computes nothing: what is forked can compute."""
    import tensorflow as tf
    import tensorflow_datasets  # noqa: F401

    import etfzoo

    for name in etfzoo.__all__:
        getattr(etfzoo, name)
    from tensorflow.python.eager import context

    from etfzoo.training import loop, publish_run, transfer  # noqa: F401

    tf.get_logger().setLevel("ERROR")
    assert context._context is None or not context._context._initialized


def snapshot(folder):
    """Names, kinds, sizes, times and content of all that is in a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 10**6
        content = path.read_bytes() if small else None
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns, content
    return found


def difference(before, after):
    return sorted(p for p in before | after if before.get(p) != after.get(p))


def remove(folder):
    """Deletes a folder, whatever is in it."""
    for path in Path(folder).rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    folder = Path(folder)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()


def run(group, seed, numbers, base, lines, shown):
    """The tries of a group, each as a line; ends this process."""
    from tensorflow_datasets.core import constants

    import etfzoo

    code = NOT_PREPARED
    try:
        home = base / "inside" / "home"
        for folder in (home, base / "outside", base / "inside" / "tmp"):
            folder.mkdir(parents=True)
        (base / "outside" / "file").write_text("must stay " * 30)
        os.environ |= {"HOME": str(home), "TMPDIR": str(base / "inside" / "tmp")}
        tempfile.tempdir = None  # TMPDIR counts from now on
        constants.DATA_DIR = str(home / "tensorflow_datasets")  # HOME was read on import
        os.environ |= {"MPLCONFIGDIR": str(home), "ETFZOO_HOME": str(home / "etfzoo")}
        if not shown:
            null = os.open(base / "inside" / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(null, 1)
            os.dup2(null, 2)
        watch = Watch(base)
        with group.prepare(base / "inside") as make:
            for number in numbers:
                one = Try(group.name, seed, number, base, watch)
                ended = _end(group, make, one, watch, etfzoo.EtfzooError)
                text = f"{group.name} {number} (seed {seed}): {ended}"
                print(_clean(text, base), file=lines, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__ if shown else None)
        (Path("/tmp") / f"attack-{group.name}.txt").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _end(group, make, one, watch, refusal):
    remove(one.place)
    one.place.mkdir()
    os.chdir(one.place)
    before, environment = snapshot(one.outside), dict(os.environ)
    start, before_cpu = time.monotonic(), sum(os.times()[:4])

    def over(*_):
        raise Slow

    signal.signal(signal.SIGALRM, over)
    signal.alarm(3 * int(group.seconds))
    try:
        with watch.watching():
            kind, text = "ran", make(one)
    except (refusal, Refused) as error:
        kind, text = "refused", str(error)
        if not text.isprintable() or not text.strip() or len(text) > 2100:
            kind, text = "TRACEBACK", f"no line: {text!r}"
    except Silent as error:
        kind, text = "SILENT", str(error)
    except Slow:
        kind, text = "SLOW", "ended"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = ", ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames)
        kind, text = "TRACEBACK", f"{type(error).__name__}: {error} ({where})"
    finally:
        signal.alarm(0)
    seconds, cpu = time.monotonic() - start, sum(os.times()[:4]) - before_cpu
    os.environ.clear()
    os.environ.update(environment)
    changed = difference(before, snapshot(one.outside))
    if changed or watch.heard:
        kind, text = "OUTSIDE", f"{changed[:3]} {watch.heard[:3]}; {text}"
    elif cpu > group.seconds and kind in ("ran", "refused"):
        kind = "SLOW"
    what = one.what if len(one.what) < 200 else f"{one.what[:200]}..."
    return f"{kind}: {what}: {text} ({cpu:.1f} of {seconds:.1f} s)"


def _clean(text, base):
    """One printable line of some length, without what only this run has."""
    text = ascii(text)[1:-1].replace(str(base / "inside"), "").replace(str(base), "")
    text = re.sub(r"127\.0\.0\.1[:_]\d+", "server", text)
    return text if len(text) < 400 else f"{text[:280]} ... {text[-100:]}"


def command(recipe, *flags, stopping=()):
    """Runs a command in this process.

    Args:
        recipe: its name.
        *flags: what follows it.
        stopping: exceptions that end it well.

    Returns:
        what it printed.

    Raises:
        Refused: exit code 2 with a line.
    """
    import testing

    try:
        return testing.run_recipe(recipe, *flags)
    except AssertionError as error:
        match = re.match(rf"{recipe} ended with 2:\n(.*)", str(error), re.S)
        if not match:
            raise
        *_, line = match[1].rstrip("\n").split("\n")
        if not line.startswith("error: ") or "Traceback" in match[1]:
            raise
        raise Refused(line) from None


def fork(work, audit=None):
    """Starts a function in a forked process, whose output goes to `told`; returns its id.

    Args:
        work: it; an EtfzooError ends the process with exit code 2, another exception with 3.
        audit: hears its audit events.
    """
    import etfzoo

    child = os.fork()
    if child:
        return child
    code = 3
    try:
        signal.alarm(0)
        told = os.open("told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        if audit:
            sys.addaudithook(audit)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except etfzoo.EtfzooError as error:
        os.write(2, f"error: {error}\n".encode(errors="replace"))
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def ended(work, audit=None):
    """Runs a function in a forked process. Returns its exit code and the last line that it said."""
    code = wait(fork(work, audit))
    lines = Path("told").read_text(errors="replace").strip().splitlines()
    if code == 3:
        raise AssertionError(" ".join(lines[-4:]))
    return code, lines[-1] if lines else ""


def wait(child):
    """The exit code of a process that was forked; negative of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shell(*command):
    subprocess.run(command, check=True, capture_output=True)
