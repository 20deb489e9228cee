"""Figures as files."""

import io
from pathlib import Path

import numpy as np

from etfzoo import files
from etfzoo.errors import extra
from etfzoo.measure.calibration import Reliability

with extra("train"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator


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


def reliability_png(path, found: Reliability) -> None:
    """Accuracy against confidence in bins, and below it how many examples lie in each bin."""
    figure = Figure(figsize=(4.2, 5))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = found.edges[1] - found.edges[0]
    centres = found.edges[:-1] + width / 2
    top.bar(centres, np.nan_to_num(found.accuracy), width, edgecolor="white", label="accuracy")
    top.plot([0, 1], [0, 1], color="black", linestyle="--", label="as certain as right")
    top.set_ylim(0, 1)
    top.set_ylabel("share that is right")
    top.set_title(f"calibration error {100 * found.error:.1f} %, {found.examples.sum():,} images")
    top.legend(loc="upper left")
    bottom.bar(centres, found.examples / found.examples.sum(), width, edgecolor="white")
    bottom.set_ylabel("share of images")
    bottom.set_xlabel("probability of the predicted class")
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
        percent = 100 * np.asarray(values)
        places = np.arange(len(domains)) + 0.12 * (number - (len(lines) - 1) / 2)
        errors = [percent[:, 0] - percent[:, 1], percent[:, 2] - percent[:, 0]]
        axes.errorbar(places, percent[:, 0], yerr=errors, fmt="o-", capsize=4, label=method)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("test top-1 (%), 95 % interval")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def strip(title: str, pictures, size: float = 1.1) -> Figure:
    """Images side by side, each with a text below.

    Args:
        title: above them.
        pictures: pairs of an image `[H, W, 3]`, uint8, and its text.
        size: width of an image, in inches.
    """
    lines = max(text.count("\n") + 1 for _, text in pictures)
    height = size * max(image.shape[0] / image.shape[1] for image, _ in pictures)
    height += 0.17 * lines + (0.35 if title else 0.1)
    figure = Figure(figsize=((size + 0.05) * len(pictures), height), layout="constrained")
    for axes, (image, text) in zip(
        figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True
    ):
        axes.imshow(image)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(text, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


# Told apart by most colour-blind readers, and by dash and marker in grey (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v")


def accuracy_by_method(title: str, ylabel: str, methods, points) -> Figure:
    """Small figure: one point for each seed, a bar at their mean.

    Args:
        title, ylabel: of the axes.
        methods: names along the horizontal axis.
        points: series (for instance a backbone) -> method -> accuracies, as shares of 1.
    """
    many = len(methods) > 4
    size = (max(3.3, 0.5 * len(methods)), 2.8 + many)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    drawn = []
    for number, (series, values) in enumerate(points.items()):
        shift = 0.26 * (number - (len(points) - 1) / 2)
        style: dict = {"color": _COLOURS[number % 5], "marker": _MARKERS[number % 5]}
        for place, method in enumerate(methods):
            shares = 100 * np.asarray(values.get(method, ()))
            if not len(shares):
                continue
            # Side by side, so that equal seeds do not hide each other.
            places = place + shift + 0.05 * (np.arange(len(shares)) - (len(shares) - 1) / 2)
            axes.plot(places, shares, linestyle="", alpha=0.8, markersize=5, **style)
            mean = shares.mean()
            axes.hlines(mean, place + shift - 0.11, place + shift + 0.11, color=style["color"])
            drawn += shares.tolist()
        axes.plot([], [], linestyle="", label=series, **style)
    if drawn:  # at least ten points high, so that small differences look small
        middle, half = (min(drawn) + max(drawn)) / 2, max(5, 0.6 * (max(drawn) - min(drawn)))
        low = max(min(middle - half, 101 - 2 * half), -1)
        axes.set_ylim(low, min(low + 2 * half, 101))
    axes.set_xlim(-0.6, len(methods) - 0.4)
    axes.set_xticks(range(len(methods)), methods)
    if many:
        axes.tick_params("x", rotation=90)
    axes.set_xlabel("method (one point for each seed, bar: mean)", fontsize=8)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    if len(points) > 1:
        axes.legend(fontsize=8)
    return figure


def training_curves(title: str, histories: dict[str, list[list[dict]]]) -> Figure:
    """Small figure of training loss and test accuracy: means over runs, shaded from least to most.

    Args:
        title: of the figure.
        histories: method -> its runs, each a list of epochs with `epoch`, `train_loss` and, where
            evaluated, `top1`.
    """
    many = len(histories) > 5
    figure = Figure(figsize=(5.6 if many else 3.6, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (method, runs) in enumerate(histories.items()):
        # The second five have the colours of the first, with other dashes.
        dashes = _DASHES[(number + number // 5) % 5]
        style = {"color": _COLOURS[number % 5], "linestyle": dashes}
        for axes, name, scale in ((above, "train_loss", 1), (below, "top1", 100)):
            found = [
                {row["epoch"]: scale * row[name] for row in run if name in row} for run in runs
            ]
            epochs = sorted(set.intersection(*map(set, found)))
            values = np.array([[run[epoch] for epoch in epochs] for run in found])
            marker = _MARKERS[number % 5] if len(epochs) < 30 else ""
            axes.plot(epochs, values.mean(0), label=method, marker=marker, markersize=3.5, **style)
            axes.fill_between(
                epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
    above.set_title(title, fontsize=10)
    above.set_ylabel("training loss")  # of methods whose losses may differ
    below.set_ylabel("test top-1 (%)")
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    if many:
        handles, names = above.get_legend_handles_labels()
        figure.legend(handles, names, fontsize=7, loc="outside right upper")
    else:
        above.legend(fontsize=8)
    return figure
