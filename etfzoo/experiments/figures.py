"""The paper's Figures 2 and 3, drawn from arrays."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from etfzoo import files
from etfzoo.errors import EtfzooError, extra
from etfzoo.experiments import plots
from etfzoo.experiments.random_features import Draw
from etfzoo.measure.neural_collapse import NeuralCollapseStatistics

with extra("train"):
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FIRST = 100  # dimensions of Figure 3's detail, and blocks of its overview


def save(figure: Figure, stem) -> None:
    """Writes `<stem>.png` and `<stem>.pdf`, atomically."""
    stem = Path(stem)
    plots.save_png(figure, stem.with_name(stem.name + ".png"))
    buffer = io.BytesIO()
    # Without a date the same figure is the same file.
    figure.savefig(buffer, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
    with files.atomic(stem.with_name(stem.name + ".pdf")) as file:
        file.write(buffer.getvalue())


def regression_errors(
    a2: Sequence[float],
    polynomials: Mapping[str, Draw],
    others: Mapping[str, Draw],
    names: Sequence[str],
    chance: float,
    regularization: float,
    title: str,
) -> Figure:
    """Figure 2: test error of random-feature regression against a2 of a2 t^2 + t.

    Args:
        a2: `[A]`, in rising order.
        polynomials: projection -> results `[D, A]` of its draws.
        others: projection -> results `[D, B]` of the other activations.
        names: of the other activations, `[B]`.
        chance: error of always predicting the shares of the classes.
        regularization: the fixed gamma.
        title: what was regressed.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    error, accuracy, dots = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    handles = []
    for number, (projection, draws) in enumerate(polynomials.items()):
        colour = f"C{number}"
        for kind, style in (("validated", "-"), ("fixed", "--")):
            for axes, field, factor in ((error, "mse", 1), (accuracy, "accuracy", 100)):
                mean, deviation = spread(factor * getattr(draws, f"{field}_{kind}"))
                axes.plot(a2, mean, style, color=colour, marker=".")
                axes.fill_between(
                    a2, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0
                )
        handles.append(Line2D([], [], color=colour, label=f"{projection} W"))
        mean, deviation = spread(others[projection].mse_validated)
        places = np.arange(len(names)) + 0.18 * (number - (len(polynomials) - 1) / 2)
        dots.errorbar(mean, places, xerr=deviation, fmt="o", ms=4, capsize=3, color=colour)
    for style, label in (("-", "validated γ"), ("--", f"fixed γ = {regularization:g}")):
        handles.append(Line2D([], [], color="0.3", ls=style, label=label))
    handles.append(
        Line2D([], [], color="0.6", ls=":", label=f"predicting class shares: {chance:.3g}")
    )
    for axes in (error, accuracy):
        axes.axvline(0, color="0.8", lw=1, zorder=0)
        axes.set_xlabel("$a_2$ of σ(t) = $a_2 t^2 + t$")
        axes.xaxis.set_major_locator(plots.MaxNLocator(5))
        axes.grid(alpha=0.3)
    # Where it lies far off, its number in the legend must do: the curves need the room.
    low, high = error.get_ylim()
    error.axhline(chance, color="0.6", ls=":")
    error.set_ylim(low, high)
    error.set_ylabel("test MSE (over examples and classes)")
    accuracy.set_ylabel("test top-1 (%)")
    dots.set_yticks(range(len(names)), names)
    dots.set_ylim(len(names) - 0.5, -0.5)
    dots.grid(alpha=0.3, axis="x")
    dots.xaxis.set_major_locator(plots.MaxNLocator(4))
    dots.set_xlabel("test MSE, validated γ")
    dots.set_title("other activations", fontsize=10)
    error.set_title("error", fontsize=10)
    accuracy.set_title("accuracy", fontsize=10)
    count = len(next(iter(polynomials.values())).validated)
    figure.suptitle(f"{title}; mean ± deviation over {count} draws of W", fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def spread(draws) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis (two draws or more)."""
    return np.mean(draws, 0), np.std(draws, 0, ddof=1)


class Covariance(NamedTuple):
    """The covariance within classes C° of a model's features, and what it comes to in numbers.

    Attributes:
        matrix: C°, `[p, p]`: the mean of (x - class mean)(x - class mean)^T over all examples.
        trace: tr C° / p, which grows with the square of the features' scale.
        unit_trace: the same of features that were divided by their own norm.
        scatter_ratio: tr S_W / tr S_B (`nc1_ratio` of etfzoo.measure.neural_collapse).
    """

    matrix: np.ndarray
    trace: float
    unit_trace: float
    scatter_ratio: float

    @classmethod
    def of(cls, features, labels) -> "Covariance":
        """Of features `[N, p]` and class numbers `[N]`.

        Raises:
            EtfzooError: features that are not finite, fewer than two classes, or all class means
                equal.
        """
        features = np.asarray(features, np.float64)
        if not np.isfinite(features).all():
            raise EtfzooError("features hold NaN or infinite numbers")
        classes, labels = np.unique(labels, return_inverse=True)
        statistics = NeuralCollapseStatistics(len(classes), features.shape[1])
        statistics.update(features, labels)
        result = statistics.result()
        return cls(
            _within(features, labels),
            result["tr_c_over_p"],
            result["tr_c_over_p_l2"],
            result["nc1_ratio"],
        )


def _within(features, labels) -> np.ndarray:
    _, labels, count = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), features.shape[1]))
    np.add.at(sums, labels, features)
    noise = features - (sums / count[:, None])[labels]
    return noise.T @ noise / len(noise)


def covariances(rows: Mapping[str, Mapping[str, Covariance]], title: str) -> Figure:
    """Figure 3: C° of several models, the first 100 dimensions and the whole in blocks.

    Args:
        rows: row (for instance `"fine-tuned"`) -> model -> its covariance. All heatmaps share one
            symmetric colour scale, linear around 0 and logarithmic beyond.
        title: above the figure.
    """
    every = [c for models in rows.values() for c in models.values()]
    panels = [_panels(c.matrix) for c in every]
    top = max(np.abs(panel).max() for pair in panels for panel in pair)
    inner = max(top, 1e-30) / 1e3
    norm = SymLogNorm(linthresh=inner, vmin=-top, vmax=top)
    columns = max(len(models) for models in rows.values())
    figure = Figure(figsize=(4.6 * columns + 0.8, 2.7 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4.6 * columns, 0.8))[0]
    lines = left.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for line, (row, models) in zip(lines, rows.items(), strict=True):
        parts = line.subfigures(1, columns, squeeze=False)[0]
        for part, (model, c) in zip(parts, models.items(), strict=False):
            part.suptitle(
                f"{model}, {row}: tr(C°)/p = {c.trace:.3g}\n"
                f"L2-normalised: {c.unit_trace:.3g}    tr $S_W$ / tr $S_B$: {c.scatter_ratio:.3g}",
                fontsize=9,
            )
            size = len(c.matrix)
            extents = (None, (0, size, size, 0))
            names = (f"dimensions 1 to {min(size, FIRST)}", f"all {size}, means of blocks")
            for axes, panel, extent, name in zip(
                part.subplots(1, 2), _panels(c.matrix), extents, names, strict=True
            ):
                image = axes.imshow(panel, norm=norm, cmap="RdBu_r", extent=extent)
                axes.set_xlabel(name, fontsize=8)
                axes.tick_params(labelsize=7)
                axes.xaxis.set_major_locator(plots.MaxNLocator(5))
                axes.yaxis.set_major_locator(plots.MaxNLocator(5))
    axes = right.subplots()
    # Decades outside the linear part alone: those in it would lie on each other.
    decades = 10 ** np.arange(np.ceil(np.log10(inner)), np.log10(1e3 * inner))
    ticks = [*-decades[::-1], 0, *decades]
    label = "entry of C° (logarithmic beyond the inner ticks)"
    right.colorbar(image, cax=axes, ticks=ticks).set_label(label, fontsize=8)
    axes.set_box_aspect(10 * len(rows))
    axes.tick_params(labelsize=7)
    return figure


def _panels(matrix) -> tuple[np.ndarray, np.ndarray]:
    """The first dimensions, and the means of about equal blocks."""
    starts = np.linspace(0, len(matrix), min(FIRST, len(matrix)), endpoint=False).astype(int)
    size = np.diff(starts, append=len(matrix))
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, 0), starts, 1)
    return matrix[:FIRST, :FIRST], sums / np.outer(size, size)
