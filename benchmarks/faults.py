"""Kills workers of a two-process training at random moments: nothing is lost, nothing hangs.

  python benchmarks/faults.py --rounds=10 --seed=0 --log=benchmarks/faults.log

Each fault strikes a new training, which also prepares its data. Both processes must end by
themselves, once training has begun with the documented exit codes. The same command, given again,
must go on at the checkpoint and end with exactly the weights, optimizer slots, state and logs of a
training that was left alone. A worker lost before it joined is waited for and alone started again.
"""

import argparse
import importlib
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGABRT, SIGKILL, SIGTERM
from subprocess import STDOUT, Popen

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--strategy=multiworker --dataset=digits --backbone=rn18 --protocol=quickstart".split()
FLAGS += ["--epochs=3", "--batch_size=50", "--checkpoint_every=2"]  # 4 steps an epoch
FAULTS = ((SIGKILL, [0]), (SIGKILL, [1]), (SIGTERM, [0, 1]))  # which signal, to one of whom
LIMIT, PATIENCE = 30, 600  # seconds: to end after a fault, and for a whole training


class Workers:
    """The two processes of a training in a folder."""

    def __init__(self, folder):
        self.workdir, self.data = folder / "run", folder / "data"
        self.data.mkdir(exist_ok=True)
        with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
            self.addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (one, other)]
        self.processes: dict[int, Popen] = {}
        self.outputs: dict[int, Path] = {}
        for index in range(2):
            self.start(index)

    def start(self, index):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": self.addresses}, "task": task})
        command = [sys.executable, "recipes/pretrain.py", *FLAGS]
        command += [f"--data_dir={self.data}", f"--workdir={self.workdir}"]
        env = os.environ | {"TF_CONFIG": config, "PYTHONFAULTHANDLER": "1"}
        self.outputs[index] = self.data.parent / f"{time.monotonic_ns()}_worker{index}.txt"
        with open(self.outputs[index], "wb") as file:
            self.processes[index] = Popen(command, env=env, cwd=ROOT, stdout=file, stderr=STDOUT)

    def wait(self, seconds):
        """Seconds until both had ended; None if that took too long."""
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            if None not in self.codes():
                return passed
            time.sleep(0.02)

    def codes(self):
        return [self.processes[index].poll() for index in range(2)]

    def end(self):
        for process in (p for p in self.processes.values() if p.poll() is None):
            process.send_signal(SIGABRT)  # on which it shows where it was
            time.sleep(3)
            process.kill()
            process.wait()

    def has(self, pattern):
        return any(self.workdir.glob(pattern))

    def step(self):
        """Of the latest checkpoint."""
        paths = self.workdir.glob("checkpoints/step-*.npz")
        return max((int(path.stem.split("-")[1]) for path in paths), default=0)

    def difference(self, reference):
        """To another training: the largest absolute one; infinite if not only numbers differ."""
        from etfzoo.models.checkpoint import CheckpointManager, read

        (a, *more), (b, *others) = (
            (*read(CheckpointManager(w).paths()[0]), (w / "metrics.csv").read_text())
            for w in (self.workdir, reference.workdir)
        )
        del more[0]["run"], others[0]["run"]  # ids of runs
        if a.keys() != b.keys() or more != others or self.has("**/.*.tmp"):
            return float("inf")
        return max(float(abs(a[name].astype("f8") - b[name]).max()) for name in a)


def documented(own, other, number, finished):
    """Whether exit codes are those of etfzoo.runtime.interruption: 75 stopped, 76 a worker lost."""
    if finished and own in (0, -number) and other in (0, 76):
        return True  # the signal met a process that had done its work
    return (own, other) == ((75, 75) if number == SIGTERM else (-SIGKILL, 76))


def strike(number, victim, moment, folder, reference):
    """One training with a fault: the line to log, seconds to its end, whether something failed."""
    workers = again = Workers(folder)
    try:
        workers.wait(moment)
        failures = ["ended before the fault"] * any(workers.codes())
        finished, step = workers.has("result.json"), workers.step()
        # A second later than the first sign of it, training has begun at both.
        begun = workers.has("tensorboard/events*")
        begun = begun and time.time() - (workers.workdir / "tensorboard").stat().st_mtime > 1
        notes = ["finished before"] if finished else [] if begun else ["before training"]
        workers.processes[victim].send_signal(number)
        seconds = workers.wait(LIMIT)
        codes, kept = workers.codes(), workers.step()
        alone = codes[victim] is not None and codes[1 - victim] is None
        waiting = alone and not workers.has("config.json")
        if waiting:  # if it does not hang, it goes on when the other is there
            workers.start(victim)
            workers.wait(PATIENCE)
            notes.append(f"waiting for start; {victim} started again: codes {workers.codes()}")
        failures += ["HANG"] * (workers.codes() != [0, 0] if waiting else seconds is None)
        failures += ["signal ignored"] * (0 in codes and not begun and not finished)
        workers.end()
        done = workers.has("result.json")
        known = documented(codes[victim], codes[1 - victim], number, done)
        failures += ["exit codes"] * (begun and None not in codes and not known)
        failures += [f"lost the checkpoint of step {step}"] * (kept < step)
        again = Workers(folder)
        again.wait(PATIENCE)
        again.end()
        failures += [f"restart ended with codes {again.codes()}"] * any(again.codes())
        at = re.search(r"resuming .* at epoch (\d+), step (\d+)", again.outputs[0].read_text())
        at = 4 * (int(at[1]) - 1) + int(at[2]) if at else 0
        failures += [f"went on at step {at}"] * (at != kept and not done)
        differs = again.difference(reference) if again.has("result.json") else float("nan")
        failures += ["another result"] * (differs != 0)
    finally:
        workers.end()
        again.end()
    for path in folder.glob("*.txt") if failures else ():
        print(f"--- {path.name}\n{path.read_text()[-6000:]}", file=sys.stderr, flush=True)
    seconds = None if finished or waiting else seconds or float("inf")
    line = (
        f"{number.name} {('chief', 'worker')[victim]:6} at {moment:5.1f} s, "
        f"ended after {'-' if seconds is None else f'{seconds:.1f}':>4} s, "
        f"codes {codes[0]!s:>4} {codes[1]!s:>4}, checkpoint {kept:2}, difference {differs:g}"
    )
    line = "; ".join([line, *notes, *(f"FAILED: {failure}" for failure in failures)])
    return line, seconds or 0, bool(failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 10), ("start_round", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--log", default=os.devnull, help="file to append to")
    args = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    sys.path.insert(0, str(ROOT))

    def log(line):
        print(line, flush=True)
        with open(args.log, "a") as file:
            print(line, file=file)

    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    log(f"{cpu}, {os.cpu_count()} cores")
    for name in ("tensorflow", "keras", "etfzoo"):
        log(f"{name} {importlib.import_module(name).__version__}")
    log(f"faults.py --rounds={args.rounds} --start_round={args.start_round} --seed={args.seed}")
    log(f"pretrain.py {' '.join(FLAGS)}")
    with tempfile.TemporaryDirectory() as whole:
        reference = Workers(Path(whole))
        duration = reference.wait(PATIENCE)
        reference.end()
        if any(reference.codes()):
            sys.exit("\n".join(path.read_text() for path in reference.outputs.values()))
        log(f"without faults: {duration:.1f} s")
        results = []
        for number in range(args.start_round, args.start_round + args.rounds):
            chance = random.Random(f"{args.seed} {number}")
            for which, whom in FAULTS:
                fault = which, chance.choice(whom), 0.9 * duration * chance.random()
                with tempfile.TemporaryDirectory() as folder:
                    line, *result = strike(*fault, Path(folder), reference)
                log(f"round {number}: {line}")
                results.append(result)
    longest, failed = max(s for s, _ in results), sum(f for _, f in results)
    log(f"{len(results)} faults, {failed} failed; longest time to the end {longest:.1f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
