"""Flags and configurations that nobody would write."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np

from attacks import core, worlds

NEUTRAL = {"batch_size", "output", "strategy", "tpu", "num_virtual_devices", "skip_corrupt"}
NEUTRAL |= {"feature_cache", "data_dir", "ignore_class_names"}


class Begun(Exception):
    """The work itself would begin now."""


def text(rng):
    """Letters of any kind."""
    kinds = (
        lambda: chr(rng.randrange(32, 127)),
        lambda: chr(rng.choice([0, 7, 8, 9, 10, 13, 27, 127, 0x85, 0xA0, 0x200B, 0x202E, 0xFEFF])),
        lambda: chr(rng.randrange(0xA0, 0xD7FF)),
        lambda: chr(rng.randrange(0x1F300, 0x1F6FF)),
        lambda: chr(rng.randrange(0xDC80, 0xDCFF)),  # a byte that is not UTF-8
        lambda: rng.choice(["%s", "%n", "{}", "{0.__class__}", "$(id)", "`id`", "${HOME}", "'\""]),
    )
    length = rng.choice([0, 1, 2, 5, 20, 300, 5000])
    return "".join(rng.choice(kinds)() for _ in range(length))


def number(rng):
    return rng.choice(
        [
            lambda: str(rng.randint(-3, 9)),
            lambda: str(rng.choice([-1, 1]) * 10 ** rng.randrange(40)),
            lambda: repr(rng.choice([-1, 1]) * 10.0 ** rng.uniform(-320, 308)),
            lambda: str(
                2 ** rng.choice([7, 8, 15, 16, 31, 32, 53, 63, 64, 128]) - rng.randint(0, 1)
            ),
            lambda: rng.choice(
                ["nan", "-inf", "+0", "-0", "1e5", "٣", "１２", "0b1", "1e400", "1,5"]
            ),
            lambda: str(rng.random()),
        ]
    )()


def path(rng, world):
    place = Path.cwd()
    made = rng.choice(
        ["link", "pipe", "file", "folder", "locked", "none", "device", "proc", "deep"]
    )
    target = place / made
    if made == "link":
        target.symlink_to(place.parent.parent / "outside" / rng.choice(["", "file", "new"]))
    elif made == "pipe":
        os.mkfifo(target)
    elif made == "file":
        target.write_bytes(rng.randbytes(20))
    elif made == "folder":
        (target / "a").mkdir(parents=True)
        (target / "a" / "b.png").write_bytes(rng.randbytes(9))
    elif made == "device":
        return rng.choice(["/dev/null", "/dev/full", "/dev/zero", "/dev/stdin", "/dev/tty"])
    elif made == "proc":
        return rng.choice(["/proc/self/mem", "/proc/1/fd", "/proc/nothing", "/sys/kernel/x", "/"])
    elif made == "deep":
        return "x/" * rng.choice([9, 900, 5000])
    else:
        names = ["run", "zoo", "zoo/rn18_etf.x", "zoo/rn18_etf.x/1", "photos", "data", "index.json"]
        return str(world / rng.choice(names))
    return str(target) + rng.choice(["", "", "/", "/..", "/new/er"])


def split(rng):
    parts = [
        rng.choice(["train", "test", "fit", "select", "all", "Train", "validation", ""])
        + rng.choice(["", "", f"[{number(rng)}:]", f"[:{rng.randint(-9, 120)}%]", "[1:2", "[]"])
        for _ in range(rng.randint(1, 3))
    ]
    return rng.choice(["+", ",", "|"]).join(parts)


def value(rng, world, default):
    kinds = [text, number, lambda r: path(r, world), split]
    kinds += [lambda r: ",".join(number(r) for _ in range(r.randint(2, 5)))]
    kinds += [lambda r: ",".join(f"{number(r)}:{number(r)}" for _ in range(r.randint(1, 3)))]
    kinds += [lambda r: json.dumps(document(r, 3))]
    kinds += [lambda r: r.choice(["rn18_etf.x@" + number(r), "http://127.0.0.1:1/x/1", "hf://a/b"])]
    kinds += [
        lambda r: r.choice(["digits", "folder:" + path(r, world), "shapes/source/..", "mnist:"])
    ]
    kinds += [lambda r: r.choice("0 1 2 3 5 8 50 0.1 0.5 true rn18 etf linear bn".split())] * 9
    if default is not None:
        kinds += [lambda r: default, lambda r: default[: r.randrange(len(default) + 1)]] * 2
    return rng.choice(kinds)(rng)


def document(rng, depth):
    """Any JSON value."""
    if depth and rng.random() < 0.6:
        count = rng.choice([0, 1, 2, 5])
        if rng.random() < 0.5:
            return [document(rng, depth - 1) for _ in range(count)]
        return {text(rng)[:20]: document(rng, depth - 1) for _ in range(count)}
    return rng.choice(
        [None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10 ** rng.randrange(60), float("nan")]
        + [float("inf"), text(rng), "digits", "1", "true", rng.random(), rng.randint(-9, 300)]
    )


def bases(world):
    """Commands that go well, in a second or so."""
    model, digits = f"--model={world}/zoo/rn18_etf.x/1", f"--dataset=digits --data_dir={world}/data"
    small = "--protocol=quickstart --epochs=1 --image_size=8 --batch_size=50 --workdir=new"
    run, photo = f"--model={world}/run", f"{world}/photos/ant/000.png"
    texts = {
        "pretrain": f"{digits} --backbone=rn18 {small}",
        "finetune": f"{model} {digits} {small} --feature_cache=",
        "evaluate": f"{run} {digits} --split=test",
        "neural_collapse": f"{run} {digits} --split=test --feature_cache=kept",
        "figure2": f"{run} {digits} --draws=2 --a2=0,1 --num_features=8 --output=new",
        "figure3": f"--models={world}/zoo/rn18_etf.x/1,{world}/run {digits} {small}",
        "predict": f"{model} {photo}",
        "export": f"{model} --output=new",
        "publish": f"--workdir={world}/run --name=rn18_etf.y --models_dir=new --licence=MIT",
        "serve_client": f"--server=127.0.0.1:1 --timeout=0.2 {photo}",
        "table1": "--source=digits --targets=digits --backbones=rn18 --dry_run",
        "benchmark": "--backbone=rn18 --image_size=8 --batch_size=2 --rounds=1 --seconds=0.05 "
        "--num_classes=4",
        "prepare": f"--archive={world}/index.json --data_dir=new",
    }
    return {name: flags.split() for name, flags in texts.items()}


def stopping():
    """Raises `Begun` where a training takes its first step, or another process would start."""
    from etfzoo.training import loop

    def epoch(trainer, stop):
        raise Begun(trainer.config)

    def process(*args, **options):
        raise Begun(None)

    return (
        mock.patch.object(loop.Trainer, "_epoch", epoch),
        mock.patch.object(subprocess, "Popen", process),
    )


@core.group("flags", 424)
def flags(root):
    from contextlib import ExitStack

    import testing

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        world = worlds.make(root / "world")
        for patch in stopping():
            stack.enter_context(patch)
        commands, told, names = bases(world), {}, worlds.flag_names()
        before = core.snapshot(world)
        spare = shutil.copytree(world, root / "spare")

        def changed_world(given):
            """What a command changed and was not told to write; the world is as before again."""
            left = core.difference(before, core.snapshot(world))
            if left:
                shutil.rmtree(world)
                shutil.copytree(spare, world)
            return [path for path in left if not any(path in flag for flag in given)]

        def make(one):
            command = list(commands)[one.number % len(commands)]
            given, changed = list(commands[command]), set()
            for _ in range(one.rng.choice([1, 1, 2, 3])):
                name = one.rng.choice(names[command])
                known = [flag for flag in given if flag.startswith(f"--{name}=")]
                default = known[0].partition("=")[2] if known else None
                new = f"--{name}={value(one.rng, world, default)}"
                if one.rng.random() < 0.12:
                    lines = f"{new}\n--flagfile=flags\n" * one.rng.randint(1, 3)
                    Path("flags").write_bytes(os.fsencode(lines))
                    new = one.rng.choice(
                        [
                            "--flagfile=flags",
                            "--flagfile=none",
                            f"--no{name}",
                            f"--{name}",
                            f"-{name}",
                        ]
                        + [f"--{name[:-1]}=1", "--undefok=x", "--x", "--", name, f"--no{name}=1"]
                    )
                given = [flag for flag in given if flag not in known] + [new]
                changed.add(name)
            one.what = " ".join([command, *(g for g in given if g not in commands[command])])
            here = core.snapshot(one.place)
            try:
                out = core.command(command, *given)
            except Begun as begun:
                return sensible(begun.args[0], one.place)
            except core.Refused:
                left = core.difference(here, core.snapshot(one.place))
                left += changed_world(given)
                if left:
                    raise core.Silent(f"refused, but it changed {left[:3]}") from None
                raise
            if changed_world(given):
                raise core.Silent("the model or the data has changed")
            if command in ("evaluate", "neural_collapse") and changed <= NEUTRAL:
                line = next(x for x in out.splitlines() if "top-1" in x or "nc1" in x)
                if told.setdefault(command, line) != line:
                    raise core.Silent(f"{line} is not {told[command]}")
                return "the same figures as ever"
            if " nan" in out.lower():
                raise core.Silent(out[-300:])
            return "to its end: " + (out.strip().splitlines() or [""])[-1]

        yield make


def sensible(config, place):
    """What is said of a training at its first step."""
    from etfzoo.training.config import TrainConfig

    if config is None:
        return "a process would start"
    found = list(place.rglob("config.json"))
    if not any(TrainConfig.load(path) == config for path in found if path.parent.name != "flags"):
        raise core.Silent("config.json is not the run's configuration")
    rates(config)
    return "at its first step, with its config.json and finite rates"


def rates(config):
    """Checks the learning rate of every part of a training."""
    from etfzoo.training import schedules

    steps, total = 3, 3 * config.epochs
    schedule = schedules.learning_rate(config, steps)
    for step in sorted({0, 1, total // 3, total // 2, total - 1}):
        rate = float(schedule(step)) if callable(schedule) else float(schedule)
        if not (np.isfinite(rate) and 0 <= rate <= max(config.peak_rate, 0) * (1 + 1e-6)):
            raise core.Silent(f"the learning rate at step {step} of {total} is {rate}")


def drawn_configuration(rng):
    """The bytes of a file that is nearly a configuration, and what was done to it."""
    from etfzoo.training.config import TrainConfig

    values = dataclasses.asdict(TrainConfig("digits"))
    fields = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}
    notes = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(fields))
        low, high = fields[name]["low"], fields[name]["high"]
        kind = rng.choice([0, 0, 1, 2, 3, 3, 3, 4, 5])
        if kind == 0 and high is not None:  # just inside and just outside
            edge = rng.choice([low, high])
            values[name] = rng.choice([edge, float(np.nextafter(edge, 1e300)), edge + 1, -edge])
            if isinstance(edge, int) and rng.random() < 0.5:
                values[name] = int(values[name])
        elif kind == 1:
            values[name] = rng.choice(list(values.values()))
        elif kind == 2:
            values[name] = text(rng)
        elif kind == 3 and high is not None:  # legal, most often
            drawn = rng.uniform(low, min(high, low + 10 ** rng.uniform(-2, 3)))
            values[name] = rng.choice([drawn, int(drawn)])
        elif kind == 4:
            values[name] = copy.deepcopy(rng.choice([[values[name]] * 3, {name: values[name]}]))
        else:
            values[name] = document(rng, 4)
        notes.append(f"{name}={values[name]!r}"[:80])
    content = json.dumps(values).encode()
    kind = rng.randrange(40)
    if kind < 6:
        at, length = rng.randrange(len(content)), rng.randint(1, 40)
        changed = {
            "cut": content[:at],
            "bits": bytes(b ^ (rng.random() < 0.01) << rng.randrange(7) for b in content),
            "doubled": content[:at] + content[at : at + length] * 2 + content[at + length :],
            "moved": content[at:] + content[:at],
            "UTF-16": content.decode().encode("utf-16"),
            "BOM": b"\xef\xbb\xbf" + content,
        }
        what = list(changed)[kind]
        content, notes = changed[what], [*notes, what]
    return content, ", ".join(notes)


@core.group("configs", 850)
def configs(root):
    from contextlib import ExitStack

    import testing
    from etfzoo.training import identity
    from etfzoo.training.config import TrainConfig
    from etfzoo.training.job import Job

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        world = worlds.make(root / "world")
        for patch in stopping():
            stack.enter_context(patch)

        def make(one):
            content, one.what = drawn_configuration(one.rng)
            file = Path("config.json")
            file.write_bytes(content)
            config = TrainConfig.load(file)
            rates(config)
            if TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) != config:
                raise core.Silent("another configuration comes back from JSON")
            Path("w").mkdir()
            identity.claim(config, "w", {})
            identity.check(config, "w")
            again = (
                worlds.parsed("pretrain", Job(config, "w").arguments())
                if not config.init
                else config
            )
            if again != config:
                raise core.Silent(f"its flags mean another one: {again.differences(config)}")
            if one.number % 8:
                return "back from JSON and from its flags, with finite rates"
            start = [f"--config={file}", "--workdir=new", f"--data_dir={world}/data"]
            if config.image_size > 64 or config.batch_size > 200:
                start += ["--image_size=8", "--batch_size=50"]
            try:
                core.command("pretrain", *start)
            except Begun as begun:
                return sensible(begun.args[0], one.place / "new")
            raise core.Silent("no training began")

        yield make
