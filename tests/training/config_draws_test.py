"""Configurations that nobody would write: each is refused in one line, or kept as it is.

ETFZOO_TEST_SEED=7 draws others.
"""

import dataclasses
import json
import os

import numpy as np

from etfzoo.errors import EtfzooError
from etfzoo.training.config import TrainConfig

DRAWS = 2000
ODD = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, 3.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    -float("inf"), 2**31, 2**32 - 1, 2**32, 10**30, -(10**30), 10**400, "", " ", "0", "false", "no",
    "none", "é", "a" * 300, "a" * 5000, "\0", "x\ny", "\ud800", "~nobody-of-this-name/x", "../..",
    "train[50%:10%]", "folder:", [], [0], [1, 2, 3], [1.5, 2, 3], [2, 1, 2], [[1, 2]], [[16, 3]],
    [[1]], [[1, 2, 3]], [[[]]], [None], ["a"], ["ab"], [True, True, True], [0] * 10_000, {},
    {"a": 1},
    {"ab": 1}, [{}], [float("nan")] * 3, [10**400] * 3,
]  # fmt: skip
BASE = dataclasses.asdict(TrainConfig("digits"))


def document(rng):
    """The bytes of a file that is nearly a configuration."""
    values = dict(BASE)
    names = list(values)
    for _ in range(rng.integers(1, 4)):
        name, kind = names[rng.integers(len(names))], rng.integers(12)
        if kind == 0:
            values.pop(name, None)
        elif kind == 1:
            values[str(ODD[rng.integers(len(ODD))])[:1000]] = 1
        elif kind == 2:
            values[name] = rng.normal() * 10.0 ** rng.integers(-10, 20)
        elif kind == 3:
            values[name] = int(rng.integers(-(2**40), 2**40))
        elif kind < 8 and values.get(name) is not None:  # what another field may be
            values[name] = values.get(names[rng.integers(len(names))])
        else:
            values[name] = ODD[rng.integers(len(ODD))]
    text = json.dumps(values).encode()
    kind = rng.integers(40)
    if kind == 0:
        text = text[: rng.integers(len(text))]
    elif kind == 1:
        text = text.replace(b'"epochs"', b'"seed"')  # one key twice
    elif kind == 2:
        text = json.dumps([values, list(values), "digits", 3][rng.integers(4)]).encode()
    elif kind == 3:
        text = b"[" * 100_000
    elif kind == 4:
        text = bytes(rng.integers(0, 256, 200, np.uint8))
    elif kind == 5:
        text = text.replace(b"100", b"9" * 10_000, 1)
    return text


def test_drawn_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the disk's time is not the point
    rng = np.random.default_rng(int(os.environ.get("ETFZOO_TEST_SEED", 0)))
    path, kept, refused = tmp_path / "config.json", 0, 0
    for number in range(DRAWS):
        text = document(rng)
        path.write_bytes(text)
        try:
            config = TrainConfig.load(path)
        except EtfzooError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 1000, (number, text[:2000])
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"draw {number}: {text[:2000]}") from error
        config.save(path)
        assert TrainConfig.load(path) == config, (number, text[:2000])
        kept += 1
    assert kept > DRAWS / 20 and refused > DRAWS / 2
