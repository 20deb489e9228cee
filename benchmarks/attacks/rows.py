"""Each row of what went wrong in version 0.1: a command or call, what it says now, what is right.

A row of rows.txt is a line of Python, or a command of etfzoo behind `$`; behind `#` stands what its
result must match; lines that begin with a space prepare the next row. `~` is an empty home, `run` a
finished run, `zoo/rn18_etf.x/1` a published model of 7 classes, `cases` what make.py writes.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from attacks import core, runs, worlds

ROWS = Path(__file__).with_name("rows.txt")


def run(cases, log):
    """Runs all rows in a folder of its own; returns how many are not as they should be.

    Args:
        cases: path of make.py, which writes the inputs on which version 0.1 failed.
        log: takes a line.
    """
    with tempfile.TemporaryDirectory(prefix="rows-") as base, _shallow():
        place = Path(base) / "world"
        home = Path(base) / "home"
        home.mkdir()
        os.environ |= {"HOME": str(home), "ETFZOO_HOME": str(home / "zoo"), "MPLCONFIGDIR": base}
        os.chdir(base)
        killed = _killed(Path(base))  # first of all: what has computed cannot be forked
        return _rows(place, cases, log, killed)


def _shallow():
    import testing

    return testing.small_rn18()


def _killed(base):
    """A publication that is killed, and the same command again: what is there then."""
    core.ended(lambda: worlds.data(base / "digits"))
    core.ended(runs.train(base / "run", base / "digits"))
    work = runs.publish(base / "run", base / "killed")
    core.ended(work)
    code = core.wait(core.fork(work, runs.Counter(40, lambda: os._exit(9))))
    core.ended(work)
    versions = sorted(p.name for p in (base / "killed" / runs.NAME).iterdir())
    return f"exit code {code}; then {versions} and {sorted(os.listdir(base / 'killed'))}"


def _rows(place, cases, log, killed):
    here = space(place, cases) | {"killed_while_published": lambda: killed}
    wrong = 0
    for line in ROWS.read_text().splitlines():
        if re.match(r"\d\. ", line):
            log(line)
            continue
        line = line.replace("{{", "\0").replace("}}", "\1")
        line = re.sub(r"\{(\w+)\}", lambda m: str(here[m[1]]), line)
        line = line.replace("\0", "{").replace("\1", "}")
        if line.startswith(" "):
            try:
                exec(line.strip(), here)
            except Exception as error:
                wrong += 1
                log(f"WRONG {line}: {type(error).__name__}: {error}")
            continue
        call, _, wanted = line.rpartition("  # ")
        start = time.monotonic()
        try:
            if call.startswith("$ "):
                recipe, *flags = call[2:].split(" ")
                said = core.command(recipe, *[f for f in flags if f]).strip()
                said = [x for x in said.splitlines() if re.search(wanted, x)] or said.splitlines()
                said = said[-1]
            else:
                said = str(eval(call, here))
        except (core.Refused, here["etfzoo"].EtfzooError) as error:
            said = str(error)
        except Exception as error:
            said = f"TRACEBACK {type(error).__name__}: {error}"
        good = re.search(wanted, said) and not said.startswith("TRACEBACK")
        wrong += not good
        seconds, base = time.monotonic() - start, str(place.parent)
        said = ascii(" ".join(said.split()))[1:-1].replace(base, "").replace("error: ", "")
        log(f"{'' if good else 'WRONG '}{call.replace(base, '')}")
        log(f"    {said[:300]} ({seconds:.1f} s)")
    return wrong


def space(place, cases):
    """The names that the rows use."""
    import keras
    import tensorflow as tf
    from PIL import Image

    import etfzoo
    import server as http
    import testing
    from etfzoo.data import decoding
    from etfzoo.training import loop

    worlds.make(place)
    os.chdir(place)
    subprocess.run([sys.executable, cases, "cases"], check=True, capture_output=True)
    data, home = place / "data", os.environ["HOME"]
    small = testing.make_classifier()

    def train(folder, **changes):
        return loop.train_and_evaluate(worlds.config(data, epochs=1, **_once(changes)), folder)

    def _once(changes):
        return {"checkpoint_every": 500} | changes

    def fresh(folder="new", **changes):
        shutil.rmtree(folder, ignore_errors=True)
        train(folder, **changes) if changes else shutil.copytree("run", folder)

    def edit(path, **values):
        document = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        if path.endswith("config.json") and not document:
            fresh()
            document = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps(document | values))

    def last(folder):
        return sorted(Path(folder).glob("checkpoints/step-*.npz"))[-1]

    def state(folder, **values):
        with np.load(last(folder)) as archive:
            arrays = dict(archive)
        document = json.loads(arrays["state"].tobytes()) | values
        arrays["state"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
        np.savez(last(folder), **arrays)

    def terabytes(path):
        content = path.read_bytes()
        start = content.index(b"'shape': (")
        end = content.index(b")", start)
        shape = b"'shape': (99999999999,"
        path.write_bytes(content[:start] + shape[: end - start].ljust(end - start) + content[end:])
        with np.load("run/checkpoints/" + path.name) as archive:
            names = archive.files
        with open(path, "wb") as file:
            np.savez(file, **{names[0]: np.zeros(1)})
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02")
        content[at + 20 : at + 28] = b"\xf0\xff\xff\xff\xf0\xff\xff\xff"
        path.write_bytes(content)

    def half(path):
        os.truncate(path, path.stat().st_size // 2)

    def reversed_labels(path):
        with np.load(path) as archive:
            arrays = dict(archive)
        np.savez(path, **arrays | {"labels": arrays["labels"][::-1]})

    def figures(recipe, *flags):
        out = core.command(recipe, *flags)
        return [re.sub(r"[\d.]+ s\b", "", x) for x in out.splitlines() if re.search(r"\d\.\d", x)]

    def damage_draws(folder):
        paths = [p for p in Path(folder).rglob("*.npz") if p.name != "figure2.npz"]
        for path in paths:
            half(path)
        assert paths

    def config(**values):
        return worlds.config(data, **values)

    def publish_after(change, **spec):
        model = testing.make_classifier(**spec)
        change(model)
        return etfzoo.publish(model, "z/rn18_etf.z")

    def pixels(image):
        return etfzoo.preprocess(small, image).tobytes()

    def same_as_truth(path):
        truth = np.asarray(Image.open(path).convert("RGB"))
        try:
            return np.array_equal(decoding.decode(Path(path).read_bytes()), truth)
        except tf.errors.InvalidArgumentError:
            return pixels(path)

    def shape(path):
        try:
            return tuple(decoding.decode(Path(path).read_bytes()).shape)
        except tf.errors.InvalidArgumentError as error:
            return error.message[:200]

    def told(folder):
        import logging

        from etfzoo.data import sources

        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("etfzoo").addHandler(handler)
        count = sources.resolve(f"folder:{folder}").size("all")
        logging.getLogger("etfzoo").removeHandler(handler)
        return f"{count} images; {'; '.join(lines)}"

    def as_nobody(path):
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError):
                folder.chmod(folder.stat().st_mode | 0o555)
        os.chmod(path, 0)
        with testing.nobody():
            return etfzoo.preprocess(small, path)

    def drawn_into_a_locked_folder():
        Path("locked").mkdir(mode=0o555)
        with testing.nobody():
            return worlds.data(place / "locked")

    def planted_link():
        from cache_test import make_version

        from etfzoo.zoo import cache

        Path("kept_by_others").mkdir()
        Path("kept_by_others/file").write_text("must stay")
        make_version(place / "site/rn18_etf.x/1")
        os.environ["ETFZOO_HOME"] = str(place / "cache")
        with http.serve(place / "site") as server:
            target = cache.fetch_url(f"{server.url}/rn18_etf.x/1")
            shutil.rmtree(target)
            (target.parent / f".download-{target.name}").symlink_to(place / "kept_by_others")
            try:
                said = str(cache.fetch_url(f"{server.url}/rn18_etf.x/1"))
            except etfzoo.EtfzooError as error:
                said = str(error)
        return f"{said}; still there: {Path('kept_by_others/file').exists()}"

    def fetched(fault):
        from cache_test import DATA

        from etfzoo.zoo import cache, download

        os.environ |= {"ETFZOO_HOME": str(place / "cache2"), "ETFZOO_TIMEOUT": "0.3"}
        download.WAITS, download._SLOWEST = (0.01,), 10**6
        with http.serve(place / "site") as server:
            server.faults[f"/rn18_etf.x/1/{DATA}"] = [fault]
            return cache.fetch_url(f"{server.url}/rn18_etf.x/1")

    def served(*paths):
        from attacks import pictures
        from bad_requests import answer, strings
        from c_api import Loader

        with Loader(place / "zoo/rn18_etf.x/1") as loader:
            before = pictures._cpu(loader._process.pid)
            inputs = strings(*(Path(p).read_bytes() for p in paths))
            code, message = answer(loader, "serving_bytes", {"image_bytes": inputs})
            seconds = pictures._cpu(loader._process.pid) - before
            peak = loader.peak_kib() / 2**20
        return f"{code} {message.splitlines()[0][:150]}; {seconds:.2f} s of CPU, {peak:.2f} GB"

    def shared_keys():
        from etfzoo import internals
        from internals_test import saved_dict

        names = {f"n{i:04d}": 500 for i in range(300)}
        folder = saved_dict(place / "shared", names, np.arange(500, dtype=np.float32).tobytes())
        try:
            return internals.SavedDict(folder, "weights")
        except (ValueError, tf.errors.OpError) as error:
            return error

    def train_in_a_fork():
        here["process"] = testing.held_by_another_process("new")
        here["process"].__enter__()

    def end_the_fork():
        here["process"].__exit__(None, None, None)
        shutil.rmtree("new")

    def python(code, **environment):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()[-1]

    def fitted(change):
        x = testing.random_pixels(14)
        batches = [change(x, np.arange(14) % 7)]
        model = testing.make_classifier()
        model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
        watch = etfzoo.callbacks.NeuralCollapse({"train": batches})
        history = model.fit(x, batches[0][1], epochs=1, verbose=0, callbacks=[watch])
        return sorted(history.history)

    here = globals() | dict(locals())
    digits = f"--dataset=digits --data_dir={data} --backbone=rn18 --image_size=8 --epochs=1"
    here |= {"digits": f"{digits} --batch_size=50 --augment=none --crop=1.0"}
    here |= {"model": "--model=zoo/rn18_etf.x/1", "run_model": "--model=run", "long": "y" * 256}
    return here
