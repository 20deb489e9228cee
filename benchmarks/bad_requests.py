"""Sends bad requests to TensorFlow's C++ loader: each is refused, and it goes on as before.

  python benchmarks/bad_requests.py --count=1000 --seed=0 --log=benchmarks/bad_requests.log

After each bad request a good one must be answered as before; memory is read every hundred. The
model has random weights: what is tried is the graph of its signatures. The loader process imports
no TensorFlow Python; unknown signatures and names of inputs are refused by tests/c_api.py, which
stands where TF Serving has its own check, all else by the graph or the C++ session.
"""

import argparse
import collections
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64
GROWTH = 20  # MiB that memory may differ between the first hundred requests and the end


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("count", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backbone", default="rn18")
    parser.add_argument("--log", default=os.devnull, help="file to write")
    args = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

    import numpy as np
    import tensorflow as tf

    import etfzoo
    from bad_requests import REFUSALS, answer, bad_requests, encode, strings
    from c_api import Loader
    from testing import smooth_image

    with tempfile.TemporaryDirectory() as folder, open(args.log, "w") as file:

        def log(line):
            print(line, flush=True)
            print(line, file=file, flush=True)

        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
        log(f"{cpu}, {os.cpu_count()} cores; tensorflow {tf.__version__}")
        log(f"bad_requests.py --count={args.count} --seed={args.seed} --backbone={args.backbone}")
        model = etfzoo.build_classifier(args.backbone, num_classes=10, input_shape=(SIDE, SIDE, 3))
        good = {"image_bytes": strings(encode(smooth_image(90, 120), "JPEG"))}
        with Loader(etfzoo.publish(model, Path(folder) / "model")) as loader:
            assert "tensorflow" not in loader.modules
            expected = loader.run("serving_bytes", **good)["scores"]
            codes, failures = collections.defaultdict(collections.Counter), 0
            memory, start = [], time.monotonic()
            requests = bad_requests(args.seed, args.count, SIDE)
            for number, (kind, signature, inputs) in enumerate(requests, 1):
                code, message = answer(loader, signature, inputs)
                scores = loader.run("serving_bytes", **good)["scores"]
                codes[kind][code] += 1
                if code not in REFUSALS or not np.array_equal(scores, expected):
                    failures += 1
                    log(f"FAILED: request {number}, {kind}: {code} {message}; then {scores}")
                if number % 100 == 0:
                    memory.append(loader.resident_kib() / 1024)
                    peak = loader.peak_kib() / 1024
                    log(f"{number:5} requests: memory {memory[-1]:.0f} MiB, peak {peak:.0f} MiB")
            seconds = time.monotonic() - start
        for kind, counter in codes.items():
            log(f"{kind:36} " + ", ".join(f"{n} {code}" for code, n in counter.items()))
        growth = memory[-1] - memory[0] if memory else 0
        log(
            f"{args.count} bad requests, each with a good one after it, in {seconds:.0f} s: "
            f"{failures} failed; memory at the end {growth:+.1f} MiB from the first hundred"
        )
        sys.exit(failures > 0 or growth > GROWTH)


if __name__ == "__main__":
    main()
