"""Runs and publications that are killed, damaged, crossed by others, or out of disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from attacks import core, hosts, worlds

NAME = "rn18_etf.x"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Counter:
    """Counts what a process changes in file systems, and acts before the n-th change."""

    def __init__(self, number=0, act=None):
        self.number, self.act, self.count = number, act, 0

    def __call__(self, event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if writes or event in CHANGES:
            self.count += 1
            if self.count == self.number:
                self.act()


def train(folder, data, **changes):
    from etfzoo.training import loop

    return lambda: loop.train_and_evaluate(worlds.config(data, **changes), folder)


def publish(run, place):
    from etfzoo.training import publish_run

    address = {"index_path": place / "index.json", "url": "https://example.org/zoo"}
    return lambda: publish_run.publish_run(run, NAME, place, licence="MIT", **address)


def same_run(folder, reference):
    """Raises Silent where a run has not ended bit for bit as another one."""
    import testing

    (one, state), (other, wanted) = (testing.last_checkpoint(f) for f in (folder, reference))
    if one.keys() != other.keys() or any(one[n].tobytes() != other[n].tobytes() for n in one):
        raise core.Silent("the weights or slots are others")
    if state != wanted:
        raise core.Silent("the state is another one")
    for name in ("metrics.csv", "metrics.jsonl", "result.json", "data.json"):
        if (Path(folder) / name).read_bytes() != (Path(reference) / name).read_bytes():
            raise core.Silent(f"{name} is another one")
    left = [p.name for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]
    if left:
        raise core.Silent(f"left: {left}")
    return "ended bit for bit as without"


def _counted(work):
    """Runs it in a forked process; its seconds, and the changes it makes in file systems."""

    def whole():
        counter.count = 0
        work()
        Path("count").write_text(str(counter.count))

    counter, start = Counter(), time.monotonic()
    code, told = core.ended(whole, counter)
    if code:
        raise RuntimeError(told)
    return time.monotonic() - start, int(Path("count").read_text())


def _struck(rng, work, seconds, changes):
    """Runs it and kills it at a random moment; what happened."""
    if rng.random() < 0.5:
        number = rng.randint(1, changes)
        sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        code = core.wait(core.fork(work, Counter(number, lambda: os.kill(os.getpid(), sent))))
        return f"{sent.name} before change {number} of {changes} (code {code})"
    moment = rng.uniform(0, 1.1 * seconds)
    sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    child = core.fork(work)
    time.sleep(moment)
    with suppress(ProcessLookupError):
        os.kill(child, sent)
    return f"{sent.name} at {moment:.1f} of {seconds:.1f} s (code {core.wait(child)})"


@core.group("kills", 33, 240)
def kills(root):
    """20 trainings and 13 publications, killed at random moments and before random changes."""
    import publication_test

    import testing

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        os.chdir(root)
        data, run, zoo = root / "data", root / "run", root / "zoo"
        core.ended(lambda: worlds.data(data))
        trained = _counted(train(run, data))
        core.ended(publish(run, zoo))
        published = _counted(publish(run, zoo))

        def make(one):
            if one.number % 33 < 20:
                work, place = train(one.place / "run", data), None
            else:
                place = Path(shutil.copytree(zoo, one.place / "zoo"))
                work = publish(run, place)
            how = trained if place is None else published
            notes = [_struck(one.rng, work, *how) for _ in range(one.rng.choice([1, 1, 2]))]
            one.what = ", ".join(["training" if place is None else "publication", *notes])
            code, told = core.ended(work)
            if code:
                raise core.Silent(f"resumed, it ended with {code}: {told}")
            if place is None:
                return same_run(one.place / "run", run)
            found = publication_test.state(place)
            if sorted(p.name for p in place.iterdir()) != ["index.json", NAME]:
                raise core.Silent(f"left: {sorted(p.name for p in place.iterdir())}")
            return f"{_same_weights(place, zoo)}; versions {sorted(found)}, card and index agree"

        yield make


def _same_weights(place, reference):
    """Raises Silent where a version has other weights than another one."""

    def compare():
        from etfzoo.zoo.publish import Weights

        wanted = Weights(reference / NAME / "1")
        for folder in (place / NAME).glob("[0-9]*"):
            found = Weights(folder)
            assert set(found) == set(wanted)
            assert all(np.array_equal(found[n], wanted[n]) for n in wanted)

    code, told = core.ended(compare)
    if code:
        raise core.Silent(told)
    return "all weights bit for bit"


# ------------------------------------------------------------------------------------ damage


def _damage_npz(rng, path):
    """A checkpoint that is whole, and holds something else."""
    with np.load(path) as archive:
        arrays = dict(archive)
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    kinds = {
        "another type": lambda: array.astype("f8" if array.dtype.kind == "f" else "i4"),
        "another shape": lambda: array[None],
        "fewer": lambda: array[:-1] if array.ndim else array,
        "NaN": lambda: np.full(array.shape, np.nan, "f4"),
        "objects": lambda: np.array([{}], object),
        "text": lambda: np.array(["x"]),
        "big-endian": lambda: array.astype(array.dtype.newbyteorder(">")),
        "nothing": lambda: np.zeros((0, 5)),
    }
    what = rng.choice([*kinds, "gone", "renamed", "twice", "compressed"])
    if what in kinds:
        arrays[name] = kinds[what]()
    elif what in ("gone", "renamed"):
        del arrays[name]
        arrays |= {"../" + name: array} if what == "renamed" else {}
    path.unlink()
    (np.savez_compressed if what == "compressed" else np.savez)(path, **arrays)
    if what == "twice":
        import zipfile

        with zipfile.ZipFile(path, "a") as archive, suppress(UserWarning):
            archive.writestr(f"{name}.npy", b"x")
    return f"{name} is {what}"


def _spoil(rng, folder, other, text):
    """Damages one file of a run; says which and how."""
    every = sorted(p for p in folder.rglob("*") if p.is_file() and "events." not in p.name)
    path = rng.choice(every)
    names = [path.relative_to(folder).as_posix()]
    kind = rng.randrange(7)
    if path.suffix == ".npz" and kind < 3:
        return f"{names[0]}: {_damage_npz(rng, path)}"
    if path.suffix == ".json" and kind < 4:
        with suppress(ValueError):  # the damage before this one may have been to the same file
            document = json.loads(path.read_bytes())
            what = hosts.change_value(rng, document, text)
            path.write_text(json.dumps(document))
            return f"{names[0]}: {what}"
    if kind == 4:
        source = other / names[0]
        swapped = rng.choice(every)
        if source.exists() and rng.random() < 0.5:
            shutil.copy(source, path)
            return f"{names[0]} is that of another run"
        content = path.read_bytes()
        path.write_bytes(swapped.read_bytes())
        swapped.write_bytes(content)
        return f"{names[0]} and {swapped.relative_to(folder)} change places"
    if kind == 5:
        path.unlink()
        what = rng.choice(
            ["gone", "a folder", "a pipe", "a link to nothing", "a device", "a circle"]
        )
        if what == "a folder":
            (path / "x").mkdir(parents=True)
        elif what == "a pipe":
            os.mkfifo(path)
        elif what != "gone":
            targets = {"a link to nothing": "none", "a device": "/dev/zero", "a circle": path.name}
            path.symlink_to(targets[what])
        return f"{names[0]}: {what}"
    content, what = hosts.damaged(rng, path.read_bytes() or b"x")
    path.write_bytes(content)
    return f"{names[0]}: {what}"


@core.group("workdirs", 31)
def workdirs(root):
    """A run's files are damaged, replaced, moved or another run's; then the run goes on."""
    import testing
    from attacks.settings import text
    from etfzoo.models import checkpoint

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        data = worlds.data(root / "data")
        run, other = root / "run", root / "other"
        train(run, data)()
        train(other, data, seed=1)()

        def make(one):
            folder = Path(shutil.copytree(run, one.place / "run"))
            if one.rng.random() < 0.7:  # the run is not finished, and some of it is left to do
                (folder / "result.json").unlink()
                for path in checkpoint.CheckpointManager(folder).paths()[: one.rng.randint(0, 2)]:
                    path.unlink()
            notes = [_spoil(one.rng, folder, other, text) for _ in range(one.rng.choice([1, 1, 2]))]
            one.what = "; ".join(notes)
            result = train(folder, data)()
            if result != json.loads((run / "result.json").read_text()):
                raise core.Silent(f"its result is {result}")
            if not (folder / "result.json").is_file():
                raise core.Silent("there is no result")
            if checkpoint.CheckpointManager(folder).paths():
                with suppress(FileNotFoundError):
                    _same_arrays(folder, run)
            return "ended bit for bit as without"

        yield make


def _same_arrays(folder, reference):
    import testing
    from etfzoo.errors import EtfzooError

    try:
        found, _ = testing.last_checkpoint(folder)
    except (EtfzooError, KeyError):
        return  # of a finished run no checkpoint is looked at
    wanted, _ = testing.last_checkpoint(reference)
    if any(name not in found or found[name].tobytes() != wanted[name].tobytes() for name in wanted):
        raise core.Silent("the weights are others")


# -------------------------------------------------------------------------------- concurrency


@core.group("concurrency", 6, 240)
def concurrency(root):
    """Two processes at one place, a moment apart."""
    import publication_test

    import testing

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        os.chdir(root)
        data, run, zoo = root / "data", root / "run", root / "zoo"
        core.ended(lambda: worlds.data(data))
        references = [root / f"run{seed}" for seed in range(2)]
        for seed, folder in enumerate(references):
            code, told = core.ended(train(folder, data, seed=seed))
            assert not code, told
        shutil.copytree(references[0], run)
        core.ended(publish(run, zoo))

        def together(one, *works):
            """Exit codes of processes that start within a second."""
            children = []
            for work in works:
                children.append(core.fork(work))
                time.sleep(one.rng.uniform(0, 1))
            return [core.wait(child) for child in children]

        def two_seeds(one):
            codes = together(one, *(train(one.place / "run", data, seed=s) for s in (0, 1)))
            if sorted(codes) != [0, 2]:
                raise core.Silent(f"they ended with {codes}")
            return same_run(one.place / "run", references[codes.index(0)])

        def twice_the_same(one):
            codes = together(one, *[train(one.place / "run", data)] * 2)
            if 0 not in codes or set(codes) - {0, 2}:
                raise core.Silent(f"they ended with {codes}")
            return same_run(one.place / "run", references[0])

        def two_publications(one):
            place = Path(shutil.copytree(zoo, one.place / "zoo"))
            codes = together(one, *[publish(run, place)] * 2)
            if 0 not in codes or set(codes) - {0, 2}:
                raise core.Silent(f"they ended with {codes}")
            return f"versions {sorted(publication_test.state(place))}, card and index agree"

        def drawing_data(one):
            works = [
                lambda: worlds.data(one.place / "data"),
                train(one.place / "run", one.place / "data"),
            ]
            codes = together(one, works[0], works[1], works[0])
            if any(codes):
                raise core.Silent(f"they ended with {codes}")
            return same_run(one.place / "run", references[0])

        def deleted(one):
            child = core.fork(train(one.place / "run", data))
            while not list((one.place / "run").glob("checkpoints/step-*.npz")):
                time.sleep(0.01)
            shutil.rmtree(one.place / "run", ignore_errors=True)
            code = core.wait(child)
            if code != 2:
                raise core.Silent(f"it ended with {code}")
            if (one.place / "run" / "result.json").exists():
                raise core.Silent("it has written a result")
            raise core.Refused(Path("told").read_text().strip().splitlines()[-1])

        def published_while_trained(one):
            folder = Path(shutil.copytree(run, one.place / "run"))
            (folder / "result.json").unlink()
            codes = together(one, train(folder, data), publish(folder, one.place / "zoo"))
            if codes[0] or codes[1] not in (0, 2):
                raise core.Silent(f"they ended with {codes}")
            if codes[1] == 0:
                publication_test.state(one.place / "zoo")
            return same_run(folder, references[0])

        kinds = [two_seeds, twice_the_same, two_publications, drawing_data, deleted]
        kinds.append(published_while_trained)

        def make(one):
            kind = kinds[one.number % len(kinds)]
            one.what = kind.__name__.replace("_", " ")
            return kind(one)

        yield make


# -------------------------------------------------------------------------------------- disks


@contextmanager
def _disk(path, *options):
    path.mkdir()
    core.shell("mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def _limited(work, size):
    """With files of at most so many bytes."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return limited


@core.group("disks", 13, 240)
def disks(root):
    """No room, no more files, files that may not grow, no writing; afterwards there is room."""
    from cache_test import assert_same_folder, make_version

    import server as http
    import testing
    from etfzoo.zoo import cache

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        hosts.quick(stack)
        os.chdir(root)
        data, run = root / "data", root / "run"
        core.ended(lambda: worlds.data(data))
        code, told = core.ended(train(run, data))
        assert not code, told
        site = make_version(root / "site/rn18_etf.x/1")
        server = stack.enter_context(http.serve(root / "site"))
        testing.make_image_folder(root / "photos", {"a": 3}, (20, 16))

        def whole_model(disk):
            (folder,) = (disk / "zoo" / NAME).glob("[0-9]*")
            from etfzoo.zoo import manifest

            manifest.verify(folder)
            return "the version is whole"

        def downloaded(disk):
            assert_same_folder(next((disk / "cache/urls").iterdir()), site)
            return "the files of the publisher"

        def fetch(disk):
            os.environ["ETFZOO_HOME"] = str(disk / "cache")
            cache.fetch_url(f"{server.url}/rn18_etf.x/1")

        def recipe(name, *flags):
            def run_it():
                try:
                    core.command(name, *flags)
                except core.Refused as error:
                    os.write(2, f"{error}\n".encode(errors="replace"))
                    raise SystemExit(2) from None

            return run_it

        digits = ("--dataset=digits", f"--data_dir={data}")
        kinds = {  # what is done, what it needs in MB, and what is right at its end
            "training": (lambda d: train(d / "run", data), 70, lambda d: same_run(d / "run", run)),
            "publication": (lambda d: publish(run, d / "zoo"), 40, whole_model),
            "download": (lambda d: lambda: fetch(d), 1, downloaded),
            "data": (lambda d: lambda: worlds.data(d / "data"), 1, lambda d: "drawn"),
            "features": (
                lambda d: recipe(
                    "neural_collapse",
                    f"--model={run}",
                    *digits,
                    f"--feature_cache={d}/f",
                    f"--output={d}/o.json",
                    "--split=test",
                ),
                1,
                lambda d: f"{len(json.loads((d / 'o.json').read_text()))} figures",
            ),
            "export": (
                lambda d: recipe(
                    "export", f"--model={run}", "--format=saved_model", f"--output={d}/out"
                ),
                40,
                lambda d: f"{len(list((d / 'out').rglob('*')))} files",
            ),
            "predictions": (
                lambda d: recipe(
                    "predict", f"--model={run}", f"--output={d}/p.csv", root / "photos"
                ),
                0.004,
                lambda d: f"{len((d / 'p.csv').read_text().splitlines())} lines",
            ),
        }

        def make(one):
            name = list(kinds)[one.number % len(kinds)]
            start, need, check = kinds[name]
            how = one.rng.choice(
                ["full", "full", "no more files", "files may not grow", "read-only"]
            )
            size = f"size={max(4, int(1000 * need * one.rng.uniform(0.02, 1)))}k"
            one.what = f"{name}, {how}" + (f", {size}" if how == "full" else "")
            options = {"full": [size], "no more files": [f"nr_inodes={one.rng.randint(2, 14)}"]}
            with one.preparing(), _disk(one.place / "disk", *options.get(how, ["size=2g"])) as disk:
                work = start(disk)
                if how == "read-only":
                    core.shell("mount", "-o", "remount,ro", str(disk))
                if how == "files may not grow":
                    size = int(10**6 * need * one.rng.uniform(0.001, 0.5))
                    work = _limited(work, max(size, 1))
                    one.what += f" over {size} bytes"
                code, told = core.ended(work)
                if code not in (0, 2):
                    raise AssertionError(f"exit code {code}: {told}")
                core.shell("mount", "-o", "remount,rw,size=2g,nr_inodes=0", str(disk))
                if code == 0:
                    return f"it fitted: {check(disk)}"
                left = sorted(str(p.relative_to(disk)) for p in disk.rglob("*.tmp"))
                again, line = core.ended(start(disk))
                if again:
                    raise core.Silent(f"with room again it ended with {again}: {line}")
                check(disk)
                if left and name not in ("training",):
                    raise core.Silent(f"left: {left[:3]}")
            told = told.replace("error: ", "")
            raise core.Refused(f"{told}; with room again: {name} whole")

        yield make
