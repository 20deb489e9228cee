"""Figures as files."""

import io
from pathlib import Path

import matplotlib
import numpy as np

from etfzoo import files

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


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


def learning_curves(histories: dict[str, list[dict]]) -> Figure:
    """Top-1 on the evaluation split against the epoch.

    Args:
        histories: `"panel: line"` -> rows with `epoch` and `top1`; lines of one panel share axes.
    """
    panels = list(dict.fromkeys(name.partition(": ")[0] for name in histories))
    figure = Figure(figsize=(3.4 * len(panels), 3))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, rows in histories.items():
            if name.partition(": ")[0] == panel:
                rows = [row for row in rows if "top1" in row]
                epochs = [row["epoch"] for row in rows]
                shares = [100 * row["top1"] for row in rows]
                axes.plot(epochs, shares, marker=".", label=name.partition(": ")[2])
        axes.set_title(panel)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("test top-1 (%)")
    figure.tight_layout()
    return figure


def accuracy_by_domain(domains, lines: dict[str, list[tuple[float, float, float]]]) -> Figure:
    """Accuracy with its interval for several methods over domains of growing shift.

    Args:
        domains: names, from the source outwards.
        lines: method -> one (accuracy, low, high) a domain, as shares of 1.
    """
    figure = Figure(figsize=(1.5 + 1.4 * len(domains), 3.4))
    axes = figure.subplots()
    for number, (method, values) in enumerate(lines.items()):
        values = 100 * np.asarray(values)
        places = np.arange(len(domains)) + 0.12 * (number - (len(lines) - 1) / 2)
        errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        axes.errorbar(places, values[:, 0], yerr=errors, fmt="o-", capsize=4, label=method)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("test top-1 (%), 95 % interval")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
