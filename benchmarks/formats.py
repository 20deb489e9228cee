"""What a model loses and gains in other formats: accuracy on real images, size, latency.

  pip install ai-edge-litert onnxruntime -e '.[onnx,openvino]'
  python benchmarks/formats.py --model=rn18_etf --dataset=tiny_imagenet --data_dir=DIR

Every format is exported here; int8 is calibrated on images of the training split. Accuracy is that
of the same images of the test split, one at a time, for all of them. Latency: one image, CPU
milliseconds on one thread, medians over rounds in which the candidates take turns.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CALLS = 20  # a measurement


def drawn(source, spec, split, count):
    """The first images and labels of a split in a drawn order, as evaluation sees them."""
    from etfzoo.data.pipeline import evaluation_pipeline

    batches = evaluation_pipeline(spec, source, 1).training(split, 0).take(count)
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def run_saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    return lambda image: serve(images=tf.constant(image, tf.float32))["logits"].numpy(), loaded


def run_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"images": image.astype("float32")})[0]


def run_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path), num_threads=1).get_signature_runner()
    return lambda image: run(images=image)["logits"]


def run_openvino(path, precision):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda image: compiled(image)[0]


def candidates(model, handle, calibration, folder):
    """Yields `name, bytes, run` of each format."""
    import etfzoo
    from etfzoo.zoo import export

    published = Path(etfzoo.info(handle)["path"])
    run, keep = run_saved_model(published)
    size = sum(p.stat().st_size for p in published.rglob("*") if p.is_file())
    yield "SavedModel, float16 weights", size, lambda image, _=keep: run(image)
    export.export_onnx(model, folder / "m.onnx")
    yield "ONNX Runtime", (folder / "m.onnx").stat().st_size, run_onnx(folder / "m.onnx")
    for storage in export.STORAGES:
        path = folder / f"{storage}.tflite"
        export.export_litert(model, path, storage, calibration)
        yield f"LiteRT, {storage}", path.stat().st_size, run_litert(path)
    for storage in export.STORAGES:
        path = folder / f"{storage}.xml"
        try:
            export.export_openvino(model, path, storage, calibration)
        except etfzoo.EtfzooError as error:
            print(f"OpenVINO, {storage}: {error}", file=sys.stderr)
            continue
        size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        yield f"OpenVINO, {storage}", size, run_openvino(path, "f32")
        if storage == "float16":
            yield "OpenVINO, float16, computes in bf16", size, run_openvino(path, "bf16")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="rn18_etf")
    parser.add_argument("--dataset", default="tiny_imagenet")
    parser.add_argument("--data_dir")
    parser.add_argument("--calibration_images", type=int, default=500)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    sys.path.insert(0, str(ROOT))
    import tensorflow as tf

    import etfzoo
    from etfzoo.data.sources import resolve

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    model = etfzoo.load(args.model, dtype="float32")
    source = resolve(args.dataset, args.data_dir)
    calibration, _ = drawn(source, model.spec, "train", args.calibration_images)
    images, labels = drawn(source, model.spec, "test", args.images)
    logits = model.predict(images.astype("float32"), batch_size=32, verbose=0)
    expected = logits.argmax(-1)
    rows, works = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size, run in candidates(model, args.model, calibration, Path(folder)):
            found = np.concatenate([run(image[None]) for image in images])
            works[name] = run
            difference = np.abs(found - logits)
            rows.append(
                f"{size / 1e6:.1f} | {100 * (found.argmax(-1) == labels).mean():.1f} | "
                f"{100 * (found.argmax(-1) == expected).mean():.1f} | "
                f"{difference.max() / np.abs(logits).max():.1e} | "
                f"{np.sqrt((difference**2).mean() / logits.var()):.1e}"
            )
    times = {name: [] for name in works}
    for number in range(args.rounds + 1):
        for name, run in works.items():
            start = time.process_time()
            for image in images[:CALLS]:
                run(image[None])
            if number:  # the first round warms up
                times[name].append((time.process_time() - start) / CALLS * 1000)
    reference = next(iter(times.values()))
    top1 = 100 * (expected == labels).mean()
    print(
        f"{args.model}, {images.shape[1]} px, {len(images)} images of {args.dataset}, int8 from "
        f"{len(calibration)} others; Keras in float32: top-1 {top1:.1f} %\n\n"
        "| | MB | top-1 % | same class as Keras, % | largest difference | rms difference | "
        "CPU ms | fastest | against the SavedModel |\n" + 9 * "|---" + "|"
    )
    for row, (name, values) in zip(rows, times.items(), strict=True):
        ratio = statistics.median(a / b for a, b in zip(values, reference, strict=True))
        milliseconds = f"{statistics.median(values):.2f} | {min(values):.2f} | {ratio:.2f}"
        print(f"| {name} | {row} | {milliseconds} |")


if __name__ == "__main__":
    main()
