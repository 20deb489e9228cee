"""Damages models, lists, indexes and servers in 200 ways: every one is refused, nothing is touched.

  python benchmarks/hostile.py --count=200 --seed=0 --log=benchmarks/hostile.log

Each mutation (tests/mutations.py) is drawn with a seed of its own and loaded as a user would: from
a folder, an address, an address with a pin or by name from an index. It must end with an
EtfzooError of one printable line; everything around the cache must keep its names, kinds, sizes and
times; and nothing may be left in the cache.
"""

import argparse
import importlib
import os
import platform
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", default=os.devnull, help="file to write")
    args = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    os.environ |= {"ETFZOO_TIMEOUT": "5", "ETFZOO_OFFLINE": ""}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

    import etfzoo
    import mutations
    import server as http
    from etfzoo.runtime import hardware
    from etfzoo.zoo import download
    from testing import randomize

    download.WAITS = (0.01,)
    with open(args.log, "w") as file, tempfile.TemporaryDirectory() as root:

        def log(line):
            print(line, flush=True)
            print(line, file=file, flush=True)

        log(f"{hardware.describe()}, Python {platform.python_version()}")
        for name in ("tensorflow", "keras", "requests", "etfzoo"):
            log(f"{name} {importlib.import_module(name).__version__}")
        log(f"hostile.py --count={args.count} --seed={args.seed}")
        root = Path(root)
        for name, classes in (("model", 5), ("other", 7)):
            model = etfzoo.build_classifier("rn18", classes, input_shape=(32, 32, 3))
            etfzoo.publish(randomize(model, seed=classes), root / name)
        names, places, failed = list(mutations.MUTATIONS), Counter(), 0
        with http.serve(root / "world/site") as server:
            for number in range(args.count):
                name = names[number % len(names)]
                where, mutate = mutations.MUTATIONS[name]
                chance = random.Random(f"{args.seed} {number}")
                world = mutations.World(root / "world", root / "model/1", root / "other/1", server)
                what = mutate(chance, world)
                faults, message = mutations.refusal(world, where)
                places[where] += 1
                failed += bool(faults)
                title = f"{name}: {what}" if what is not None else name
                line = "; ".join(
                    [f"{number}: {title}: {message}", *(f"FAILED: {f}" for f in faults)]
                )
                # Folders and ports of this run are noise in a log that is kept.
                line = line.replace(server.url, "http://server").replace(str(root), "")
                log(line.replace(f"127.0.0.1_{server.server_port}", "server"))
        log(", ".join(f"{count} by {place}" for place, count in places.items()))
        log(f"{args.count} mutations, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
