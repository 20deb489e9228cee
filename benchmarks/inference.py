"""What inference with a published model costs: latency, loading, size.

  python benchmarks/inference.py --what=latency --rounds=9
  python benchmarks/inference.py --what=load
  python benchmarks/inference.py --what=size

latency: one image of 224 px through ResNet50, CPU milliseconds on one thread, medians over rounds
in which the candidates take turns: the published SavedModel, its ONNX export in ONNX Runtime, and a
plain SavedModel of KerasCV's network with Keras's own layers. load: seconds and peak memory of
etfzoo.load and of tf.saved_model.load, each in a new process. size: the folders.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CALLS = 10  # a measurement

LOAD = """
import re, sys, time
import numpy as np, tensorflow as tf, keras, keras_cv, etfzoo

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

etfzoo.load, np.random
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
start = time.perf_counter()
model = (etfzoo.load if sys.argv[1] == "etfzoo.load" else tf.saved_model.load)(sys.argv[2])
print(time.perf_counter() - start, kilobytes("VmHWM") - before)
"""


def plain_saved_model(folder):
    """KerasCV's ResNet50 as it comes, pooled and classified, in a SavedModel."""
    import keras
    import keras_cv
    import tensorflow as tf

    images = keras.Input((224, 224, 3), name="images")
    x = keras.layers.Rescaling(1 / 58.0, -2.0)(images)
    network = keras_cv.models.ResNetBackbone(
        stackwise_filters=[64, 128, 256, 512],
        stackwise_blocks=[3, 4, 6, 3],
        stackwise_strides=[1, 2, 2, 2],
        include_rescaling=False,
        input_tensor=x,
    )
    x = keras.layers.GlobalAveragePooling2D()(network.layers[-1].output)
    model = keras.Model(images, keras.layers.Dense(1000, name="logits")(x))
    module = tf.Module()
    module.weights = [v.value for v in model.variables]

    @tf.function(input_signature=[tf.TensorSpec([None, 224, 224, 3], tf.float32, "images")])
    def serve(images):
        return {"logits": model(images, training=False)}

    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})


def latency(rounds):
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    import onnxruntime
    import tensorflow as tf

    import etfzoo
    from etfzoo.zoo import export

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    image = np.random.default_rng(0).uniform(0, 255, (1, 224, 224, 3)).astype("float32")
    model = etfzoo.build_classifier("rn50", 1000, head="linear")
    with tempfile.TemporaryDirectory() as folder:
        plain_saved_model(Path(folder) / "plain")
        published = etfzoo.publish(model, Path(folder) / "rn50_linear.x")
        export.export_onnx(model, Path(folder) / "model.onnx")
        loaded = [tf.saved_model.load(str(path)) for path in (Path(folder) / "plain", published)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    plain, served = (m.signatures["serving_default"] for m in loaded)
    tensor = tf.constant(image)
    works = {
        "plain SavedModel": lambda: plain(images=tensor)["logits"].numpy(),
        "published SavedModel": lambda: served(images=tensor)["logits"].numpy(),
        "ONNX Runtime": lambda: session.run(None, {"images": image}),
    }
    times = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            for _ in range(CALLS):
                work()
            if number:  # the first round warms up
                times[name].append((time.process_time() - start) / CALLS * 1000)
    reference = times["plain SavedModel"]
    print(f"ResNet50, 224 px, batch 1, one thread, {rounds} rounds of {CALLS} calls\n")
    print("| | CPU ms | fastest | against the plain SavedModel |\n|---|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, reference, strict=True))
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {ratio:.2f} |")


def load_and_size(what):
    import etfzoo

    columns = ["model", "storage", "MB", "in variables"]
    if what == "load":
        columns += ["with", "seconds", "peak MB", "peak / weights"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for backbone in ("rn50", "rn101"):
        model = etfzoo.build_classifier(backbone, 1000, head="linear")
        for storage in ("float32", "float16"):
            with tempfile.TemporaryDirectory() as folder:
                path = etfzoo.publish(model, Path(folder) / f"{backbone}_linear.x", storage=storage)
                sizes = {
                    p.relative_to(path): p.stat().st_size for p in path.rglob("*.*") if p.is_file()
                }
                total = sum(sizes.values()) / 1e6
                weights = sum(n for p, n in sizes.items() if p.parts[0] == "variables") / 1e6
                row = f"| {backbone} | {storage} | {total:.1f} | {weights:.1f} |"
                if what == "size":
                    print(row, flush=True)
                    continue
                for how in ("etfzoo.load", "tf.saved_model.load"):
                    output = subprocess.run(
                        [sys.executable, "-c", LOAD, how, str(path)],
                        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"},
                        check=True,
                        capture_output=True,
                        text=True,
                    ).stdout
                    seconds, peak = map(float, output.split())
                    peak /= 1e3
                    print(
                        f"{row} {how} | {seconds:.1f} | {peak:.0f} | {peak / weights:.1f} |",
                        flush=True,
                    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("latency", "load", "size"), default="latency")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, str(ROOT))
    latency(args.rounds) if args.what == "latency" else load_and_size(args.what)


if __name__ == "__main__":
    main()
