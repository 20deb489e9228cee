"""Exports a model: a SavedModel for TF Serving, or a file for ONNX, LiteRT, OpenVINO or Keras."""

import recipe

if __name__ == "__main__":
    recipe.run("export")
