"""What safety costs: starting a run, loading a model and a request, of two checkouts in turn.

  python benchmarks/costs.py --checkouts=BEFORE,. --rounds=5

Seconds of CPU: `start` from the command to the first step of a small training, with and without the
imports; `load` of a published ResNet101; `request` of a photo to the C++ loader (the mean of 50 to
a small model that the checkout has published itself).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "saved_models" / "rn101_etf.tiny100_64" / "1"
CODE = """
import json, os, resource, sys
from pathlib import Path
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
def cpu_of(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
model, place, *flags = sys.argv[1:]
import tensorflow, keras, etfzoo, etfzoo.zoo.load
from etfzoo.cli import pretrain
from etfzoo.training import loop
imported = cpu()
def epoch(trainer, stop):
    found = {"start": cpu(), "start without imports": cpu() - imported}
    before = cpu()
    etfzoo.load(model)
    found["load"] = cpu() - before
    from bad_requests import encode, strings
    from c_api import Loader
    from testing import smooth_image
    small = etfzoo.build_classifier("rn18", 10, input_shape=(64, 64, 3))
    photo = {"image_bytes": strings(encode(smooth_image(480, 640), "JPEG"))}
    with Loader(etfzoo.publish(small, Path(place) / "rn18_etf.x")) as loader:
        loader.run("serving_bytes", **photo)
        before = cpu_of(loader._process.pid)
        for _ in range(50):
            loader.run("serving_bytes", **photo)
        found["request"] = (cpu_of(loader._process.pid) - before) / 50
    print(json.dumps(found), flush=True)
    os._exit(0)
loop.Trainer._epoch = epoch
sys.argv = ["pretrain", *flags]
pretrain.run()
"""


def measured(checkout, place):
    """Seconds of CPU by name."""
    paths = os.pathsep.join([str(checkout), str(checkout / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"}

    flags = "--dataset=digits --backbone=rn18 --protocol=quickstart --epochs=1 --image_size=8"
    given = [*flags.split(), f"--data_dir={place}/data", f"--workdir={place}/run"]
    (place / "data").mkdir()
    command = [sys.executable, "-c", CODE, MODEL, place, *given]
    run = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(run.stdout[-500:] + run.stderr[-2000:])
    return json.loads(lines[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", required=True, help="folders, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = {Path(name).resolve(): [] for name in args.checkouts.split(",")}
    for _ in range(args.rounds):
        for checkout, rows in found.items():
            with tempfile.TemporaryDirectory() as place:
                rows.append(measured(checkout, Path(place)))
            print(checkout.name, json.dumps(rows[-1]), flush=True)
    for name in next(iter(found.values()))[0]:
        values = [[row[name] for row in rows] for rows in found.values()]
        told = [f"{min(v):.3f} {statistics.median(v):.3f}" for v in values]
        print(f"{name}: least and median {' | '.join(told)} s of CPU", flush=True)


if __name__ == "__main__":
    main()
