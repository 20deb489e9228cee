"""What the pass over features costs that neural-collapse measures need.

  python benchmarks/neural_collapse.py                                        # 50k x 2048, K = 1000
  python benchmarks/neural_collapse.py --examples=4000 --dim=256 --classes=50 --rounds=1

CPU seconds on one thread, medians of rounds in which the candidates take turns, each in a process
of its own: `NeuralCollapseStatistics.update` over batches; the bare float32 product X^T X over the
same batches, as a general product (which TensorFlow and PyTorch run) and as the symmetric one that
NumPy picks; a loop over classes in float64. Then what `result` takes, the peak of memory beyond the
batch, and how far nc1 lies from the loop's. --threads=2 times with more threads, in wall seconds.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time

import numpy as np

CANDIDATES = ("update", "product", "symmetric", "loop")


def data(args):
    """float32 features, non-negative and of unlike scales as pooled ones are, and labels."""
    rng = np.random.default_rng(0)
    scales = rng.gamma(1, 1, args.dim).astype(np.float32)
    means = rng.gamma(1, 1, (args.classes, args.dim)).astype(np.float32)
    labels = rng.permutation(np.arange(args.examples) % args.classes)
    features = rng.standard_normal((args.examples, args.dim), np.float32)
    for start in range(0, args.examples, args.batch):
        rows = slice(start, start + args.batch)
        features[rows] = np.abs(0.5 * features[rows] + means[labels[rows]]) * scales
    return features, labels


def batches(args, features, labels):
    for start in range(0, args.examples, args.batch):
        yield features[start : start + args.batch], labels[start : start + args.batch]


def update(args, features, labels):
    from etfzoo.measure.neural_collapse import NeuralCollapseStatistics

    statistics = NeuralCollapseStatistics(args.classes, args.dim)
    for x, y in batches(args, features, labels):
        statistics.update(x, y)
    return statistics


def product(args, features, labels):
    from scipy.linalg import blas

    gram = np.zeros((args.dim, args.dim), np.float32, order="F")
    for x, _ in batches(args, features, labels):
        gram = blas.sgemm(1.0, x.T, x.T, 1.0, gram, trans_b=True, overwrite_c=True)
    return gram


def symmetric(args, features, labels):
    from scipy.linalg import blas

    gram = np.zeros((args.dim, args.dim), np.float32, order="F")
    for x, _ in batches(args, features, labels):
        gram = blas.ssyrk(1.0, x.T, 1.0, gram, overwrite_c=True)
    return gram


def loop(args, features, labels):
    """tr(S_W S_B^+) / K the plain way."""
    mean = features.mean(0, np.float64)
    within = np.zeros((args.dim, args.dim))
    means = []
    for k in np.unique(labels):
        x = features[labels == k].astype(np.float64)
        means.append((x.mean(0) - mean) * np.sqrt(len(x) / args.examples))
        x -= x.mean(0)
        within += x.T @ x / args.examples
    return within, np.stack(means)


def nc1_of_loop(within, means):
    _, values, directions = np.linalg.svd(means, full_matrices=False)
    rank = min(len(means) - 1, means.shape[1])
    directions = directions[:rank]
    along = np.einsum("ij,ij->i", directions @ within, directions)
    return (along / values[:rank] ** 2).sum() / len(means)


def memory(key):
    with open("/proc/self/status") as status:
        return int(re.search(rf"^{key}:\s*(\d+) kB", status.read(), re.MULTILINE)[1]) * 1024


@contextlib.contextmanager
def peak(megabytes):
    """Adds the peak of the resident set within the block, less what it was before."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = memory("VmRSS")
    yield
    megabytes.append((memory("VmHWM") - before) / 1e6)


def serve(args):
    """Measures one candidate whenever it is told to."""
    features, labels = data(args)
    work = globals()[args.child]
    clock = time.process_time if args.threads == 1 else time.perf_counter
    if args.child != "loop":  # first calls load libraries and fill the buffers of BLAS
        few = argparse.Namespace(**vars(args) | {"examples": min(args.examples, 2 * args.batch)})
        work(few, features[: few.examples], labels[: few.examples])
    print("ready", flush=True)
    for _ in sys.stdin:
        megabytes, start = [], clock()
        with peak(megabytes):
            done = work(args, features, labels)
        numbers = [clock() - start, megabytes[0]]
        if args.child == "update":
            start = clock()
            with peak(megabytes):
                nc1 = done.result()["nc1"]
            numbers += [clock() - start, megabytes[1], nc1]
        if args.child == "loop":
            numbers.append(nc1_of_loop(*done))
        print(*(repr(float(n)) for n in numbers), flush=True)


class Worker:
    """A process that measures one candidate."""

    def __init__(self, child):
        environment = {
            "OPENBLAS_NUM_THREADS": str(arguments().threads),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        # Freed arrays go back to the system at once, so that the resident set is what is alive.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--child={child}"],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self):
        print("go", file=self.process.stdin, flush=True)
        return [float(number) for number in self._answer().split()]

    def _answer(self):
        answer = self.process.stdout.readline().strip()
        if not answer:
            sys.exit("the measuring process ended")
        return answer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=CANDIDATES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.child:
        return serve(args)
    workers = {name: Worker(name) for name in CANDIDATES}
    rounds = [{name: w.ask() for name, w in workers.items()} for _ in range(args.rounds)]
    found = {name: np.median([r[name] for r in rounds], axis=0) for name in CANDIDATES}
    size = f"{args.examples} x {args.dim}, K = {args.classes}, batches of {args.batch}"
    print(
        f"{size}, {args.threads} thread(s), median of {args.rounds}, load {os.getloadavg()[0]:.1f}"
    )
    for name in CANDIDATES:
        seconds, update_s = found[name][0], found["update"][0]
        print(f"{name:10s} {seconds:8.2f} s   update takes {update_s / seconds:.2f} times that")
    _, pass_mb, result_s, result_mb, nc1 = found["update"]
    print(f"result     {result_s:8.2f} s")
    print(f"memory beyond the data: update {pass_mb:.1f} MB, result {result_mb:.1f} MB more")
    wanted = found["loop"][2]
    print(f"nc1 {nc1:.12g}, the loop's {wanted:.12g}: off by {nc1 / wanted - 1:.1e}")


if __name__ == "__main__":
    main()
