"""Starting, resuming and sharing an epoch of ImageNet's shape: array_record against tfrecord.

  python benchmarks/records.py --data_dir=/tmp/records          # generates it, measures
  python benchmarks/records.py --data_dir=/tmp/records --kill   # kills in the middle of an epoch

The data set has 1,281,167 records of 1,000 classes in 1,024 files, and images of 8 x 8 pixels, so
that reading is what is measured. Generating goes on where it was stopped. Each figure is of a
process of its own; workers are simulated one after the other. tfrecord is read as a split larger
than memory is: a stream of all records, shuffled through a buffer (of 64 MiB, as 1 GiB is to
ImageNet's 140 GB, but a larger share); `in memory` is what is done up to 1 GiB.
"""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

CLASSES, SHARDS, BATCH, SEED = 1000, 1024, 256, 1
VERSION = "made/1.0.0"
SPLIT = "train[:100%]"  # the role `train` leaves a part to test


def generate(root, records):
    """Writes `made` as tfrecord, a file at a time, and converts it."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from etfzoo import files
    from etfzoo.data import conversion

    folder = pathlib.Path(root, "tfrecord", VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_temporaries(folder)
    bounds = np.arange(SHARDS + 1) * records // SHARDS
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
    )
    start = time.time()
    for shard in range(SHARDS):
        path = folder / f"made-train.tfrecord-{shard:05d}-of-{SHARDS:05d}"
        if path.exists():
            continue
        rng = np.random.default_rng(shard)
        count = int(bounds[shard + 1] - bounds[shard])
        images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        labels = (np.arange(bounds[shard], bounds[shard + 1]) * 7919) % CLASSES
        with files.atomic(path) as file, tf.io.TFRecordWriter(file.name) as writer:
            for image, label in zip(images, labels, strict=True):
                writer.write(features.serialize_example({"image": image, "label": int(label)}))
        if shard % 64 == 0:
            print(f"file {shard} of {SHARDS}, {time.time() - start:.0f} s", flush=True)
    if not (folder / "dataset_info.json").exists():
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=np.diff(bounds).tolist(),
            num_bytes=sum(p.stat().st_size for p in folder.glob("made-*")),
            filename_template=tfds.core.ShardedFileTemplate(
                folder, dataset_name="made", split="train", filetype_suffix="tfrecord"
            ),
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=[split], check_data=False
        )
    start = time.time()
    _, made = conversion.convert(str(folder), None, os.path.join(root, "array_record"))
    if made:
        print(f"converted in {time.time() - start:.0f} s")


def pipeline_of(folder, memory=False):
    """The training pipeline of a folder, and the seconds that opening it took."""
    from etfzoo.data import array_record, tfds_source  # noqa: F401 - imports are no part of it
    from etfzoo.data.augmentation import Augmentation
    from etfzoo.data.pipeline import Pipeline
    from etfzoo.data.sources import resolve

    if not memory:
        tfds_source.MEMORY_BYTES = 64 << 20
    import tensorflow_datasets  # noqa: F401 - as above

    start = time.perf_counter()
    source = resolve(folder)
    pipeline = Pipeline(source, 8, 8, 0.875, BATCH, Augmentation("none", flip=False), SEED)
    return pipeline, time.perf_counter() - start


def resident():
    """Bytes of memory of this process, now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counting(pipeline):
    """Counts the records that are read from files, by wrapping what reads them."""
    from etfzoo.data import array_record

    read = [0]
    record = array_record.Shards.record

    def counted(self, *at):
        read[0] += 1
        return record(self, *at)

    array_record.Shards.record = counted
    return read


def first_batch(folder, share, memory):
    """Seconds to open a data set and to its first batch at a share of the epoch, and memory."""
    pipeline, opened = pipeline_of(folder, memory)
    from etfzoo.data.pipeline import InputShare

    before = resident()
    steps = pipeline.size(SPLIT) // BATCH
    read = counting(pipeline)
    pipeline.training(SPLIT, 1, 0, InputShare())  # traces, which hangs on neither
    start, cpu = time.perf_counter(), time.process_time()
    batches = iter(pipeline.training(SPLIT, 0, int(share * steps), InputShare()))
    images, _ = next(batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    for _ in range(20):
        next(batches, None)
    return {
        "opened": opened,
        "seconds": seconds,
        "cpu": cpu,
        "mib": (resident() - before) / 2**20,
        "read": read[0],
        "digest": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12],
    }


def share_of_a_worker(folder, workers, worker, memory):
    """Reads 1 of N workers' share of a whole epoch, without decoding it."""
    pipeline, _ = pipeline_of(folder, memory)
    from etfzoo.data.pipeline import InputShare

    read = counting(pipeline)
    start, cpu = time.perf_counter(), time.process_time()
    share = InputShare(worker, workers, workers)
    labels = pipeline.training_records(SPLIT, 0, 0, share).map(lambda r: r["label"])
    total = sum(len(some) for some in labels.batch(4096).as_numpy_iterator())
    if not pipeline.source.by_index(SPLIT):
        read = [pipeline.size(SPLIT)]  # the stream is read to its end; nothing else can be done
    return {
        "records": total,
        "read": read[0],
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "mib": resident() / 2**20,
    }


def digests(folder, start, steps):
    """Prints a digest a batch."""
    pipeline, _ = pipeline_of(folder)
    from etfzoo.data.pipeline import InputShare

    for images, labels in pipeline.training(SPLIT, 0, start, InputShare()).take(steps):
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        print(hashlib.sha256(content).hexdigest()[:16], flush=True)


def uniformity(size=1_281_167):
    """Statistics of the shuffle, in standard deviations of what chance gives."""
    import tensorflow as tf

    from etfzoo.data.source import shuffled

    def figures(order):
        scale = np.sqrt(size)
        lags = [np.corrcoef(order[lag:], order[:-lag])[0, 1] * scale for lag in (1, 2, BATCH)]
        labels = (order * 7919) % CLASSES
        batches = labels[: size // BATCH * BATCH].reshape(-1, BATCH)
        distinct = np.array([len(np.unique(batch)) for batch in batches])
        wanted = CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH)
        return [
            np.corrcoef(order, np.arange(size))[0, 1] * scale,
            *lags,
            (distinct.mean() - wanted) / (distinct.std() / np.sqrt(len(distinct))),
        ]

    def ours(seed):
        numbers = shuffled(tf.data.Dataset.range(size), seed, size).batch(65536)
        order = np.concatenate(list(numbers.as_numpy_iterator()))
        assert np.array_equal(np.sort(order), np.arange(size))
        return order

    def four_rounds(seed):
        return tf.random.experimental.index_shuffle(
            tf.range(size, dtype=tf.int64), [seed, seed], tf.constant(size - 1, tf.int64)
        ).numpy()

    print("| permutation | with the place | lag 1 | lag 2 | lag 256 | classes of a batch |")
    print("|---|---|---|---|---|---|")
    for name, make in (
        ("16 rounds (etfzoo)", ours),
        ("4 rounds (`index_shuffle`)", four_rounds),
        ("NumPy's", lambda seed: np.random.default_rng(seed).permutation(size)),
    ):
        rows = np.array([figures(make(seed)) for seed in (1, 2, 3)])
        worst = rows[np.abs(rows).argmax(0), np.arange(rows.shape[1])]
        print(f"| {name} | " + " | ".join(f"{x:+.1f}" for x in worst) + " |", flush=True)


def in_a_process(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def folder_of(root, kind):
    return os.path.join(root, kind, VERSION)


def measure(root, rounds, worker_counts):
    print("| format | from | s to open | s to the first batch | CPU s to it | MiB more | read |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in ("array_record", "tfrecord", "tfrecord, in memory"):
        memory = kind.endswith("memory")
        for share in (0, 0.9):
            where = folder_of(root, kind.partition(",")[0])
            runs = [
                in_a_process("--first", where, "--share", share, *["--memory"] * memory)
                for _ in range(rounds)
            ]
            assert len({run["digest"] for run in runs}) == 1
            opened, seconds, cpu, mib = (
                np.median([run[key] for run in runs]) for key in ("opened", "seconds", "cpu", "mib")
            )
            read = runs[0]["read"] if kind == "array_record" else "-"
            print(
                f"| {kind} | {share:.0%} | {opened:.2f} | {seconds:.2f} | {cpu:.2f} | {mib:.0f} | "
                f"{read} |",
                flush=True,
            )
    print("\n| format | workers | records a worker | read a worker | CPU s | MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for kind in ("array_record", "tfrecord"):
        for workers in worker_counts:
            every = range(workers) if kind == "array_record" else [0]
            runs = [
                in_a_process("--worker", folder_of(root, kind), "--workers", workers, "--index", i)
                for i in every
            ]
            (records,) = {run["records"] for run in runs}
            (read,) = {run["read"] for run in runs}
            cpu, mib = (np.median([run[key] for run in runs]) for key in ("cpu", "mib"))
            print(
                f"| {kind} | {workers} | {records:,} | {read:,} | {cpu:.0f} | {mib:.0f} |",
                flush=True,
            )
    print()
    uniformity()


def kill(root, rounds):
    """Kills a reader in the middle of an epoch; one that goes on must show the same batches."""
    folder = folder_of(root, "array_record")
    rng = np.random.default_rng(0)
    start, steps = 4000, 200

    def begin(first, count):
        command = [sys.executable, __file__, "--digests", folder, str(first), str(count)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = begin(start, steps).communicate()[0].split()
    assert len(set(whole)) == steps
    for _ in range(rounds):
        process = begin(start, steps)
        seen = [process.stdout.readline().strip() for _ in range(int(rng.integers(1, steps - 10)))]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        rest = begin(start + len(seen), steps - len(seen)).communicate()[0].split()
        assert seen + rest == whole
        print(f"killed after {len(seen)} of {steps} steps: the rest is the same, bit for bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="where the data set is made; some 1.2 GB")
    parser.add_argument("--records", type=int, default=1_281_167)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kill", action="store_true", help="only kill and go on")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--digests", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first:
        print(json.dumps(first_batch(args.first, args.share, args.memory)))
    elif args.worker:
        print(json.dumps(share_of_a_worker(args.worker, args.workers[0], args.index, args.memory)))
    elif args.digests:
        folder, start, steps = args.digests
        digests(folder, int(start), int(steps))
    else:
        generate(args.data_dir, args.records)
        kill(args.data_dir, args.rounds) if args.kill else measure(
            args.data_dir, args.rounds, args.workers
        )


if __name__ == "__main__":
    main()
