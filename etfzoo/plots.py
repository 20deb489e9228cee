"""Figures as files."""

import io
from pathlib import Path

import matplotlib
import numpy as np

from etfzoo import files

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402


def save_png(figure: Figure, path) -> None:
    """Writes a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    with files.atomic(path) as file:
        file.write(buffer.getvalue())


def confusion_png(path, counts: np.ndarray, class_names) -> None:
    """Heatmap of a confusion matrix, rows normalised; names are drawn for up to 40 classes."""
    classes = len(class_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(4 + 0.22 * classes, 14)
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    if classes <= 40:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), class_names, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"share of each true class, {counts.sum():,} images")
    figure.colorbar(image, ax=axes, shrink=0.7)
    save_png(figure, Path(path))
