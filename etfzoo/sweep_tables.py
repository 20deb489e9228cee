"""The tables of a sweep: as csv, as Markdown and as blocks of an HTML report."""

import csv
import io
import itertools
import urllib.parse

from etfzoo import report, sweep_results
from etfzoo.sweep_results import METRICS, MODES, TRAINED, label, select, spread


def csv_text(found) -> str:
    """All rows of `sweep_results.rows`, with their columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in found for name in row)))
    writer.writeheader()
    writer.writerows(found)
    return table.getvalue()


def markdown(plan, found) -> str:
    """The accuracies, what to be careful about, and every finished cell with links."""
    lines = [f"# {_markdown_cell(title(plan))}", "", progress(plan, found), ""]
    lines += itertools.chain.from_iterable((text, "") for text in cautions(plan, found))
    for table in accuracies(plan, found, with_seeds):
        lines += [f"## {_markdown_cell(table.caption)}", ""]
        lines += [*_markdown_table(table.rows), ""]
    lines += ["## Every finished cell", ""]
    return "\n".join([*lines, *_markdown_table(cells(found))]) + "\n"


def _markdown_table(table):
    head, *body = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]


def _markdown_cell(cell):
    if isinstance(cell, report.Link):
        return f"[{_markdown_cell(cell.text)}]({cell.href})"
    text = " ".join(str(cell).split())
    return "".join("\\" + c if c in "\\`*[]<>|" else c for c in text)


def title(plan) -> str:
    """Headline of a sweep."""
    return f"Table 1: transfer from {plan['source']}, protocol {plan['protocol']}"


def progress(plan, found) -> str:
    """How many cells are finished."""
    total = sum(1 for _ in sweep_results.planned(plan))
    text = f"{len(found)} of {total} cells are finished."
    return text if len(found) == total else text + " The others show as -."


def cautions(plan, found) -> list[str]:
    """What a reader must know before believing the table."""
    found_cautions = []
    if len(plan["seeds"]) == 1:
        found_cautions.append(
            "Caution: there is one seed. Differences between methods may be those between two "
            "seeds of one method; no conclusion can be drawn from them."
        )
    names = [label(found, d) for d in datasets(plan) if sweep_results.subset_of(found, d)]
    if names:
        found_cautions.append(
            f"Caution: not on the official test split: {', '.join(names)}. Figures of a subset "
            "cannot be compared with published ones."
        )
    return found_cautions


def datasets(plan) -> list[str]:
    """The source and the targets, each once."""
    return list(dict.fromkeys([plan["source"], *plan["targets"]]))


def accuracies(plan, found, cell) -> list[report.Table]:
    """For each backbone the headline figures, top-1 and mean per-class accuracy.

    Args:
        cell: makes a table's cell from the rows of its seeds and a metric.
    """
    modes = [mode for mode in MODES if mode in plan["modes"] and mode not in TRAINED]
    modes = ["full", *modes]
    header = ["data", "metric"]
    header += [f"{method}, {_short(mode)}" for mode in modes for method in plan["methods"]]
    groups = [("", 2), (f"{MODES['source']} / {MODES['full']}", len(plan["methods"]))]
    groups += [(MODES[mode], len(plan["methods"])) for mode in modes[1:]]
    tables = []
    for backbone in plan["backbones"]:
        for metric in (None, *METRICS):
            lines = [header]
            for dataset, source in [(plan["source"], True)] + [(d, False) for d in plan["targets"]]:
                name = label(found, dataset) + (", source" if source else "")
                shown = metric or sweep_results.headline(dataset)
                line = [name, METRICS[shown]]
                for mode, method in itertools.product(modes, plan["methods"]):
                    if source and mode != "full" or not source and mode not in plan["modes"]:
                        line.append("")  # is not planned
                        continue
                    seeds = select(
                        found, backbone=backbone, method=method, dataset=dataset,
                        mode="source" if source else mode,
                    )  # fmt: skip
                    line.append(cell(seeds, shown))
                lines.append(line)
            title = METRICS[metric] if metric else "headline metric of each data set"
            caption = f"{backbone}: {title} (%), mean over seeds (least to most)"
            tables.append(report.Table(caption, lines, groups))
    return tables


def _short(mode):
    return {"full": "full", "linear_probe": "probe", "knn": "k-NN"}[mode]


def with_seeds(cells, metric) -> str:
    """Mean, range and number of seeds as text."""
    text = spread(row[metric] for row in cells)
    return f"{text}, {_seeds(cells)}" if cells else text


def with_links(cells, metric):
    """The same with links to the files of each seed."""
    if not cells:
        return "-"
    details = [(f"seed {row['seed']}:", *_links(row)) for row in cells]
    return report.Cell(spread(row[metric] for row in cells), _seeds(cells), details)


def _seeds(cells):
    return "1 seed" if len(cells) == 1 else f"{len(cells)} seeds"


def _links(row):
    return [
        report.Link(name, urllib.parse.quote(f"{row['workdir']}/{name}.json"))
        for name in ("config", "result")
    ]


def cells(found, commands=None) -> list[list]:
    """A header, and a line for each finished cell.

    Args:
        found: see `sweep_results.rows`.
        commands: workdir -> what tells its command, for a further column.
    """
    header = [
        "data", "backbone", "method", "seed", "mode", "top-1 (%)", "mean per-class (%)",
        "test images", "learning rate", "C", "k", "epochs", "pixels", "protocol", "time (s)",
        "settings", "metrics",
    ]  # fmt: skip
    lines = [header + ([] if commands is None else ["command"])]
    for row in found:
        values = [label(found, row["dataset"]), row["backbone"], row["method"], row["seed"]]
        values += [MODES[row["mode"]], *(f"{100 * row[metric]:.2f}" for metric in METRICS)]
        values += [row["examples"], _number(row["learning_rate"]), _number(row["C"])]
        values += [_number(row[n]) for n in ("k", "epochs", "image_size")]
        values += [row["protocol"], _number(row["seconds"]), *_links(row)]
        if commands is not None:
            values.append(commands.get(row["workdir"], "not recorded"))
        lines.append(values)
    return lines


def _number(value):
    return "" if value is None else f"{value:.6g}"
