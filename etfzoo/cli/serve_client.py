"""Asks a TF Serving server what is on images, and measures how fast it answers.

  python recipes/serve_client.py --model=flowers photo.jpg folder/
  python recipes/serve_client.py --model=flowers --protocol=rest --server=host:8501 photo.jpg
  python recipes/serve_client.py --model=flowers --repeat=50 --concurrency=8 photos/

A request carries one image as it lies on the disk; the server decodes it, and batches requests
where it is told to (see serving/). Latency is from sending to answer, without reading the file.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS

PROTOCOLS = ("grpc", "rest")
BARS = 40  # characters of the longest bar of the histogram


def main(arguments):
    import etfzoo
    from etfzoo import files
    from etfzoo.progress import Progress
    from etfzoo.zoo import serving_client

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model of the server with --model=NAME")
    paths = configs.image_arguments(arguments)
    client = serving_client.connect(
        FLAGS.server, FLAGS.model, FLAGS.protocol, FLAGS.version, FLAGS.version_label, FLAGS.timeout
    )

    def ask(path):
        image = files.read_bytes(path)
        start = time.perf_counter()
        try:
            outputs = client.predict([image], FLAGS.signature)
        except serving_client.RequestFailed as error:
            if error.code == "INVALID_ARGUMENT":  # what a bad image gives
                raise etfzoo.EtfzooError(f"{path}: {error}") from error
            raise
        return outputs, time.perf_counter() - start

    # It connects and shows at once what is wrong; the figures are of a server that has begun.
    _, first = ask(paths[0])
    requests = len(paths) * FLAGS.repeat
    progress = Progress("asking", requests)
    answers, latencies = [], []
    start = time.perf_counter()
    pool = ThreadPoolExecutor(FLAGS.concurrency)
    try:
        for outputs, seconds in pool.map(ask, paths * FLAGS.repeat):
            if len(answers) < len(paths):
                answers.append(outputs)
            latencies.append(seconds)
            progress.update(len(latencies))
    finally:
        pool.shutdown(cancel_futures=True)
    elapsed = time.perf_counter() - start
    progress.finish()
    _print_answers(paths, answers)
    _print_latencies(latencies, elapsed, first)


def _print_answers(paths, answers):
    if all({"labels", "scores"} <= outputs.keys() for outputs in answers):
        pairs = [zip(y["labels"][0], y["scores"][0], strict=True) for y in answers]
        return configs.print_predictions(paths, pairs)
    for path, outputs in zip(paths, answers, strict=True):  # a model without a head
        shapes = ", ".join(f"{name} {list(y.shape)}" for name, y in sorted(outputs.items()))
        print(f"{path}: {shapes}")


def _print_latencies(latencies, elapsed, first):
    import numpy as np

    milliseconds = 1000 * np.asarray(latencies)
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    print(
        f"\n{len(latencies)} requests, {FLAGS.concurrency} at a time: "
        f"p50 {p50:.1f} ms  p90 {p90:.1f} ms  p99 {p99:.1f} ms  "
        f"{len(latencies) / elapsed:.1f} images/s  (one before them: {1000 * first:.1f} ms)"
    )
    if len(latencies) >= 10:
        counts, edges = np.histogram(milliseconds, bins=10)
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            bar = "#" * round(BARS * count / counts.max())
            print(f"{low:9.1f} to {high:7.1f} ms {count:6d}  {bar}".rstrip())


def run():
    """Defines the flags and runs the command."""
    flags.string("Server", "server", None, "host:port (default: localhost:8500, for rest 8501)")
    flags.string("Server", "protocol", "grpc", "grpc or rest", choices=PROTOCOLS)
    flags.string("Server", "model", None, "name of the model in models.config")
    flags.integer(
        "Server",
        "version",
        None,
        "version number (default: the server's choice)",
        **flags.VERSIONS,
    )
    flags.string("Server", "version_label", None, "label of a version, e.g. stable")
    flags.string("Server", "signature", "serving_bytes", "a signature that takes image_bytes")
    flags.real("Server", "timeout", 10.0, "seconds that an answer may take", low=0.001, high=86400)
    flags.integer("Load", "repeat", 1, "how often all images are sent", low=1, high=10**6)
    flags.integer("Load", "concurrency", 1, "requests at a time", low=1, high=1024)
    app.run(main, __doc__, arguments=True)
