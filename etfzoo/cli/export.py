"""Exports a model: a SavedModel for TensorFlow and TF Serving, an ONNX file, or a .keras file.

  python recipes/export.py --model=runs/my_run --format=onnx --output=flowers.onnx
  python recipes/export.py --model=rn18_etf.shapes --format=keras --output=shapes.keras
  python recipes/export.py --model=runs/my_run --storage=float16 --output=models/flowers

A SavedModel goes to <output>/<version>/, the next version that is free; recipes/publish.py adds
what the zoo needs (card, metrics, index). ONNX takes pixels [N, H, W, 3] in 0..255 and gives
logits; .keras files load in plain Keras.
"""

import os

from etfzoo.cli import app, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.models.table import STORAGES

_SUFFIXES = {"onnx": ".onnx", "keras": ".keras", "saved_model": ""}


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.zoo import export

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    name = os.path.basename(FLAGS.model.rstrip("/"))
    output = FLAGS.output or os.path.join("exports", name + _SUFFIXES[FLAGS.format])
    if FLAGS.format == "saved_model":
        model = etfzoo.load(FLAGS.model)
        written = etfzoo.publish(model, output, storage=FLAGS.storage)
        print(f"written to {written}")
        return
    if FLAGS.storage != "float32":
        raise etfzoo.EtfzooError("--storage belongs to --format=saved_model")
    files.destination(output)
    if os.path.exists(output):
        raise etfzoo.EtfzooError(f"{output} already exists; choose another --output")
    files.make_directory(os.path.dirname(os.path.abspath(output)))
    model = etfzoo.load(FLAGS.model)
    if FLAGS.format == "keras":
        export.export_keras(model, output)
        print(f"written to {output} ({_size(output)}): keras.saving.load_model({output!r})")
        return
    export.export_onnx(model, output)
    difference = export.onnx_difference(model, output)
    checked = "not checked: onnxruntime is not installed"
    if difference is not None:
        checked = f"ONNX Runtime differs from Keras by {difference:.1e} of the largest output"
    print(f"written to {output} ({_size(output)}); {checked}")


def _size(path):
    return f"{os.path.getsize(path) / 1e6:.1f} MB"


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.string("Files", "format", "saved_model", "saved_model, onnx or keras", choices=_SUFFIXES)
    flags.string(
        "Files",
        "storage",
        "float32",
        "how a SavedModel stores kernels: float32 or float16",
        choices=STORAGES,
    )
    flags.path("Files", "output", None, "file, or folder of versions (default: below exports/)")
    app.run(main, __doc__)
