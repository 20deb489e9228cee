"""Exports a model: a SavedModel for TensorFlow and TF Serving, an ONNX file, or a .keras file."""

import recipe

if __name__ == "__main__":
    recipe.run("export")
