"""Exports a model: a SavedModel for TF Serving, or a file for ONNX, LiteRT, OpenVINO or Keras.

  python recipes/export.py --model=runs/my_run --format=onnx --output=flowers.onnx
  python recipes/export.py --model=rn18_etf.shapes --format=keras --output=shapes.keras
  python recipes/export.py --model=runs/my_run --storage=float16 --output=models/flowers
  python recipes/export.py --model=DIR --format=litert --storage=int8 --dataset=folder:photos

A SavedModel goes to <output>/<version>/, the next version that is free; recipes/publish.py adds
what the zoo needs (card, metrics, index). ONNX takes float32 pixels [N, H, W, 3] in 0..255 and
gives logits, LiteRT and OpenVINO take them as uint8; .keras files load in plain Keras. int8 takes
the range of each layer from images of --dataset.
"""

import os

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.models.table import STORAGES

_SUFFIXES = {
    "saved_model": "",
    "onnx": ".onnx",
    "litert": ".tflite",
    "openvino": ".xml",
    "keras": ".keras",
}
_INT8 = (*STORAGES, "int8")
_STORAGES = {"saved_model": STORAGES, "litert": _INT8, "openvino": _INT8}
_RUNTIMES = {
    "onnx": ("ONNX Runtime", "onnxruntime"),
    "litert": ("LiteRT", ""),
    "openvino": ("OpenVINO", "openvino"),
}


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.zoo import export

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    _check_storage()
    name = os.path.basename(FLAGS.model.rstrip("/"))
    output = FLAGS.output or os.path.join("exports", name + _SUFFIXES[FLAGS.format])
    if FLAGS.format == "saved_model":
        model = etfzoo.load(FLAGS.model)
        written = etfzoo.publish(model, output, storage=FLAGS.storage)
        print(f"written to {written}")
        return
    written = [output]
    if FLAGS.format == "openvino":
        written.append(os.path.splitext(output)[0] + ".bin")
    for path in written:
        files.destination(path)
        if os.path.exists(path):
            raise etfzoo.EtfzooError(f"{path} already exists; choose another --output")
    model = etfzoo.load(FLAGS.model)
    images, others = _images(model) if FLAGS.storage == "int8" else (None, None)
    files.make_directory(os.path.dirname(os.path.abspath(output)))
    if FLAGS.format == "keras":
        export.export_keras(model, output)
        print(f"written to {output} ({_size(written)}): keras.saving.load_model({output!r})")
        return
    if FLAGS.format == "onnx":
        export.export_onnx(model, output)
    elif FLAGS.format == "litert":
        export.export_litert(model, output, FLAGS.storage, images)
    else:
        export.export_openvino(model, output, FLAGS.storage, images)
    found = export.compare(model, output, FLAGS.format, others)
    print(f"written to {output} ({_size(written)}); {_compared(found)}")


def _check_storage():
    from etfzoo.errors import EtfzooError

    known = _STORAGES.get(FLAGS.format, ("float32",))
    if FLAGS.storage not in known:
        raise EtfzooError(
            f"--format={FLAGS.format} has no --storage={FLAGS.storage}; it has: {', '.join(known)}"
        )
    if (FLAGS.storage == "int8") != bool(FLAGS.dataset):
        raise EtfzooError(
            "--storage=int8 takes the range of each layer from images: say of which --dataset"
            if FLAGS.storage == "int8"
            else "--dataset is for --storage=int8"
        )


def _images(model):
    """Images that int8 is calibrated with, and as many others to compare on, where there are."""
    import numpy as np

    from etfzoo.data.pipeline import evaluation_pipeline

    count = FLAGS.calibration_images
    pipeline = evaluation_pipeline(model.spec, configs.open_source(FLAGS.dataset), 1)
    with pipeline.naming_corrupt_records(FLAGS.split, 0):
        drawn = pipeline.training(FLAGS.split, 0).take(2 * count)
        images = np.concatenate([image for image, _ in drawn.as_numpy_iterator()])
    return images[:count], images[count:] if len(images) > count else images


def _compared(found) -> str:
    runtime, package = _RUNTIMES[FLAGS.format]
    if found is None:
        return f"not checked: {package} is not installed"
    text = f"{runtime} differs from Keras by {found.difference:.1e} of the largest output"
    if FLAGS.storage == "int8":
        text += f", and the largest one is the same for {100 * found.agreement:.1f} % of "
        text += f"{found.images} images"
    return text


def _size(paths):
    return f"{sum(map(os.path.getsize, paths)) / 1e6:.1f} MB"


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.string("Files", "format", "saved_model", ", ".join(_SUFFIXES), choices=_SUFFIXES)
    flags.string(
        "Files",
        "storage",
        "float32",
        "how kernels are stored: float32, float16 (saved_model, litert, openvino), or int8 "
        "(litert, openvino), which also computes in int8",
        choices=_INT8,
    )
    flags.path("Files", "output", None, "file, or folder of versions (default: below exports/)")
    flags.data_flags(None)
    flags.string("Data", "split", "train", "split or role whose images int8 is calibrated with")
    flags.integer("Data", "calibration_images", 500, "how many of them", low=1, high=100_000)
    app.run(main, __doc__)
