"""Attacks etfzoo as a stranger, a bad disk or a bad day would: nothing falls over, lies or leaks.

  python benchmarks/attack.py --groups=flags,configs --seed=7 --log=benchmarks/attack.log
  python benchmarks/attack.py --groups=http --seed=7 --only=17   # one try, with what it prints
  python benchmarks/attack.py --rows=make.py --log=benchmarks/attack_rows.log

Each try has a seed of its own, which its name in the log gives: group, number and `--seed`. It ends
as one of: refused (one line of an EtfzooError, or exit code 2), ran (with what was checked of it),
TRACEBACK (anything else that it raised, or a process that died), SILENT (it ran and is wrong, or
was refused and has changed something), SLOW (more seconds of CPU than its group may take, or three
times as many by the clock), OUTSIDE (something outside of its folder was read, written or deleted).
A log is gone on with: tries that it has are left out.

Groups are in `attacks/`. Each runs in a forked process that has imported TensorFlow already.
"""

import argparse
import collections
import importlib
import os
import platform
import re
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BAD = ("TRACEBACK", "SILENT", "SLOW", "OUTSIDE")
LINE = re.compile(r"^(\w+) (\d+) \(seed (\d+)\): (\w+)")


def attack(group, args, log, done):
    """Runs the tries of a group that are not done yet, in processes of their own."""
    from attacks import core

    numbers = [args.only] if args.only is not None else range(round(group.tries * args.scale))
    numbers = [number for number in numbers if number not in done]
    while numbers:
        base = Path(tempfile.mkdtemp(prefix="attack-"))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            core.run(group, args.seed, numbers, base, os.fdopen(writer, "w"), args.only is not None)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                log(line.rstrip("\n"))
                numbers = numbers[1:]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        core.remove(base)
        if code:
            if not numbers:
                raise SystemExit(f"{group.name}: its end failed with {code}")
            died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if code == core.NOT_PREPARED:
                raise SystemExit(f"{group.name} could not be prepared")
            log(f"{group.name} {numbers[0]} (seed {args.seed}): TRACEBACK: died of {died}")
            numbers = numbers[1:]


def counts(lines):
    """Endings by group."""
    found = collections.defaultdict(collections.Counter)
    for match in filter(None, map(LINE.match, lines)):
        found[match[1]][match[4]] += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default="all", help="separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of tries")
    parser.add_argument("--only", type=int, help="one try of one group, not logged")
    parser.add_argument("--log", help="file to append to, and to go on with")
    parser.add_argument(
        "--rows", help="make.py of the inputs on which version 0.1 failed: see rows.py"
    )
    args = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "zoo")]
    from attacks import core, hosts, pictures, rows, runs, servers, settings  # noqa: F401

    names = list(core.GROUPS) if args.groups == "all" else args.groups.split(",")
    path = Path(args.log).absolute() if args.log and args.only is None else None
    lines = path.read_text().splitlines() if path and path.exists() else []
    done = [m for m in map(LINE.match, lines) if m and int(m[3]) == args.seed]

    def log(line):
        lines.append(line)
        print(line, flush=True)
        if path:
            with path.open("a") as file:
                print(line, file=file)

    if not lines:
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
        log(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}")
        versions = ("tensorflow", "keras", "requests", "PIL", "etfzoo")
        log(", ".join(f"{name} {importlib.import_module(name).__version__}" for name in versions))
    core.warm_up()
    if args.rows:
        sys.exit(rows.run(os.path.abspath(args.rows), log) > 0)
    for name in names:
        group = core.GROUPS[name]
        attack(group, args, log, {int(m[2]) for m in done if m[1] == name})
    failed = 0
    for name, found in counts(lines).items():
        bad = {kind: found[kind] for kind in BAD}
        failed += sum(bad.values())
        told = ", ".join(f"{n} {kind}" for kind, n in bad.items())
        tried = sum(found.values())
        log(f"= {name}: {tried} tried, {found['refused']} refused, {found['ran']} ran, {told}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
