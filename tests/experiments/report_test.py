"""Tests of the report of a sweep: its rows, csv, Markdown and HTML, in a browser too."""

import csv
import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest
from matplotlib.figure import Figure

from etfzoo import EtfzooError
from etfzoo.data.datasets import DATASETS
from etfzoo.experiments import html, plots, report, results
from etfzoo.experiments import tables as sweep_tables
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig
from testing import Page

COMMAND = "python recipes/table1.py --quick"
NC = (
    "nc1",
    "nc1_ratio",
    "cdnv",
    "nc2_norms",
    "nc2_angles",
    "nc2_gram",
    "tr_c_over_p",
    "tr_c_over_p_l2",
    "nc1_ratio_unbiased",
    "cdnv_unbiased",
    "tr_c_over_p_unbiased",
    "tr_c_over_p_l2_unbiased",
    "nc1_equal",
)


def make_sweep(root, skip=(), examples=None, **changes):
    """Writes the files of a finished sweep with drawn numbers; workdirs in `skip` have none.

    Args:
        examples: test images by data set; others have the official number.
        **changes: of sweep.json; `settings` are of every TrainConfig.
    """
    rng = np.random.default_rng(0)
    settings = changes.pop("settings", {})
    plan = {
        "source": "shapes/source", "backbones": ["rn18"], "methods": ["linear", "sw", "etf"],
        "targets": ["shapes/textures", "oxford_flowers102"], "seeds": [0, 1],
        "protocol": "quickstart", "modes": ["full", "linear_probe", "knn"],
        "learning_rates": [0.01, 0.03], "command": COMMAND, "version": "0.0.7",
    } | changes  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    _json(root / "sweep.json", plan)
    for cell, workdir in results.planned(results.read_plan(root)):
        if workdir in skip:
            continue
        row, mode = DATASETS.get(cell["dataset"]), cell["mode"]
        task = "pretrain" if mode == "source" else "finetune"
        known = protocols.settings(plan["protocol"], task, cell["backbone"], row)
        known |= {"backbone": cell["backbone"], "seed": cell["seed"], **settings}
        if mode == "full":
            known["learning_rate"] = plan["learning_rates"][-1]
        config = TrainConfig(cell["dataset"], **known)
        path = root / workdir
        path.mkdir(parents=True)
        config.save(path / "config.json")
        _json(path / "machine.json", {"hardware": "X & Co, 2 cores", "seconds": 12.5,
                                      "command": COMMAND})  # fmt: skip
        level = 0.55 + 0.1 * (cell["method"] == "etf") + 0.2 * (mode in ("source", "full"))
        top1 = level + rng.uniform(-0.08, 0.08)
        count = (examples or {}).get(cell["dataset"]) or (row and row.counts[row.test]) or 999
        result = {"top1": top1, "mean_per_class": top1 - rng.uniform(0, 0.03), "examples": count}
        if mode == "linear_probe":
            result["C"] = 0.01
        if mode == "knn":
            result["k"] = 20
        if mode in ("source", "linear_probe"):
            names = (*NC, "nc3", "nc4") if mode == "source" else NC
            result |= {f"nc/{s}/{n}": rng.uniform(0.1, 9) for s in ("train", "test") for n in names}
        if mode in results.TRAINED:
            epochs = np.arange(1, config.epochs + 1)
            history = [
                {"epoch": int(e), "step": 10 * int(e), "train_loss": 3 * np.exp(-e / 4) + level / 9}
                | ({} if e % 2 and e != len(epochs) else {"top1": top1 * (1 - np.exp(-e / 2))})
                for e in epochs
            ]
            result = history[-1] | result
            history[-1] = result
            lines = "".join(json.dumps(line) + "\n" for line in history)
            (path / "metrics.jsonl").write_text(lines)
        if mode == "full":
            rates = [*plan["learning_rates"], 0.1]
            metric = row.metric if row else "top1"
            candidates = [
                {
                    "learning_rate": r,
                    "weight_decay": config.weight_decay,
                    metric: 0.5 - abs(r - 0.03),
                }
                for r in rates
            ]
            candidates[-1] |= {metric: -np.inf, "widened": True}
            _json(path / "selection.json", candidates)
            for rate in rates:
                trial = path / f"select/lr{rate}_wd0"
                trial.mkdir(parents=True)
                _json(trial / "machine.json", {"hardware": "X & Co, 2 cores", "seconds": 2.0})
        _json(path / "result.json", result)
    return root


def _json(path, document):
    path.write_text(json.dumps(document))


def tables(markdown):
    """Markdown tables by the heading above: rows of unescaped cells."""
    found = {}
    for part in markdown.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        cells = [re.split(r"(?<!\\) \| ", line[2:].removesuffix(" |")) for line in lines]
        found[part.splitlines()[0]] = [[re.sub(r"\\(.)", r"\1", c) for c in r] for r in cells]
    return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = make_sweep(tmp_path_factory.mktemp("sweep") / "a")
    report.write(root)
    return root


@pytest.fixture(autouse=True)
def undrawn(sweep, monkeypatch):
    """The pictures of `sweep` are drawn; those of other reports would be the same ones again."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **kwargs: file.write(b"PNG"))


def result_of(root, workdir):
    return json.loads((root / workdir / "result.json").read_text())


def test_rows_hold_what_the_workdirs_say(sweep):
    rows = report.rows(sweep)
    assert len(rows) == 3 * 2 * (1 + 2 * 3)
    assert len({row["workdir"] for row in rows}) == len(rows)
    for row in rows:
        result = result_of(sweep, row["workdir"])
        config = json.loads((sweep / row["workdir"] / "config.json").read_text())
        for name in ("top1", "mean_per_class", "examples"):
            assert row[name] == result[name]
        assert {n: v for n, v in row.items() if "/" in n} == {
            n: v for n, v in result.items() if "/" in n
        }
        assert (row["C"], row["k"]) == (result.get("C"), result.get("k"))
        assert (row["dataset"], row["seed"]) == (config["dataset"], config["seed"])
        assert row["seconds"] == 12.5
        trained = row["mode"] in ("source", "full")
        for name in ("learning_rate", "weight_decay", "epochs"):
            assert row[name] == (config[name] if trained else None)
        assert row["search_seconds"] == (6.0 if row["mode"] == "full" else None)
    modes = {m: sum(r["mode"] == m for r in rows) for m in results.MODES}
    assert modes == {"source": 6, "full": 12, "linear_probe": 12, "knn": 12, "evaluate": 0}
    assert "shapes_textures/rn18_etf_s1/knn" in {row["workdir"] for row in rows}


def test_csv_has_every_figure_of_the_json_files(sweep):
    with open(sweep / "table1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42
    for row in rows:
        for name, value in result_of(sweep, row["workdir"]).items():
            if name in row:
                assert float(row[name]) == value
        assert {"top1", "mean_per_class", "examples"} <= set(row)


def test_markdown_regenerates_from_the_json_files(sweep):
    """Every figure of every table, computed here from result.json alone."""
    found = tables((sweep / "table1.md").read_text())
    plan = json.loads((sweep / "sweep.json").read_text())
    metrics = {"top-1": "top1", "mean per-class": "mean_per_class"}
    titles = ["headline metric of each data set", *metrics]
    checked = 0
    for title in titles:
        header, *lines = found[f"rn18: {title} (%), mean over seeds (least to most)"]
        assert [line[0] for line in lines] == [
            "shapes/source, source", "shapes/textures", "oxford_flowers102",
        ]  # fmt: skip
        for line, dataset in zip(lines, [plan["source"], *plan["targets"]], strict=True):
            cells = dict(zip(header, line, strict=True))
            data, shown = cells.pop("data"), cells.pop("metric", title)
            if title not in metrics:
                assert metrics[shown] == DATASETS[dataset].metric
            for name, cell in cells.items():
                method, _, mode = name.partition(", ")
                mode = {"full": "full", "probe": "linear_probe", "k-NN": "knn"}[mode]
                folder = [dataset.replace("/", "_"), "{}", mode]
                if data.endswith(", source"):
                    if mode != "full":
                        assert cell == ""
                        continue
                    folder = ["source", "{}"]
                values = [
                    100
                    * result_of(sweep, "/".join(folder).format(f"rn18_{method}_s{seed}"))[
                        metrics[shown]
                    ]
                    for seed in plan["seeds"]
                ]
                mean = f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}), 2 seeds"
                assert cell == mean
                checked += 1
    assert checked == 3 * (3 + 2 * 9)


def test_the_list_of_cells_in_markdown_links_to_the_files(sweep):
    header, *lines = tables((sweep / "table1.md").read_text())["Every finished cell"]
    assert len(lines) == 42
    for line in lines:
        cell = dict(zip(header, line, strict=True))
        config, result = (
            json.loads((sweep / re.fullmatch(r"\[\w+\]\((.+)\)", cell[name])[1]).read_text())
            for name in ("settings", "metrics")
        )
        assert cell["top-1 (%)"] == f"{100 * result['top1']:.2f}"
        assert cell["mean per-class (%)"] == f"{100 * result['mean_per_class']:.2f}"
        assert (cell["data"], cell["seed"]) == (config["dataset"], str(config["seed"]))
        assert cell["k"] == str(result.get("k", ""))


@pytest.fixture(scope="module")
def page(sweep):
    return Page((sweep / "report.html").read_text(encoding="utf-8"))


def test_every_cell_of_the_report_links_to_its_config_and_metrics(sweep, page):
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    for row in report.rows(sweep):
        for name in ("config.json", "result.json"):
            # Three tables of accuracies and the list of all cells.
            assert links.count(f"{row['workdir']}/{name}") == 4
    assert len(links) == 42 * 2 * 4
    assert all((sweep / urllib.parse.unquote(link)).is_file() for link in set(links))


def test_report_is_whole_and_self_contained(sweep, page):
    assert page.open == []
    text = (sweep / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""url\(|@import|https?://|<script|<link|<iframe""", text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    # Source, three modes of two targets; curves of the source and of two targets.
    assert len(images) == 7 + 3
    assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in images)
    assert "Collapse" not in page.texts("h2") and page.texts("h2") == [
        "Results", "Do the methods differ by more than the seeds?", "Beside the paper's figures",
        "Accuracy by method", "Learning curves", "Neural collapse", "Learning rates",
        "Assumed settings", "Evidence on both sides", "Every finished cell", "Commands",
        "Versions and hardware",
    ]  # fmt: skip
    assert page.texts("pre") == [COMMAND, f"[1] {COMMAND}"]
    cells = page.texts("td")
    assert "X & Co, 2 cores" in cells and "0.0.7" in cells
    assert "47.0, picked" not in cells and "50.0, picked" in cells and "diverged, added" in cells
    assert "Caution" not in text
    assert not [name for name in sweep.iterdir() if name.name.endswith(".tmp")]


def test_collapse_measures_are_those_of_the_files(sweep, page):
    values = [
        result_of(sweep, f"oxford_flowers102/rn18_etf_s{seed}/linear_probe")[
            "nc/test/cdnv_unbiased"
        ]
        for seed in (0, 1)
    ]
    assert f"{np.mean(values):.3g}" in page.texts("td")
    assert f"{min(values):.3g} to {max(values):.3g}" in page.texts("small")
    # Splits of different size stand below each other: only measures that do not depend on it.
    (table,) = sweep_tables.collapse(results.read_plan(sweep), results.rows(sweep))
    header = table.rows[0]
    assert {"nc1_equal", "nc1_ratio_unbiased", "cdnv_unbiased", "nc3"} <= set(header)
    assert not {"nc1", "nc1_ratio", "cdnv", "tr_c_over_p", "tr_c_over_p_l2"} & set(header)


def test_missing_cells_are_counted_and_shown(tmp_path):
    skip = ["source/rn18_sw_s0", "source/rn18_sw_s1", "shapes_textures/rn18_etf_s1/full"]
    root = make_sweep(tmp_path / "a", skip)
    assert report.write(root) == root / "report.html"
    markdown = (root / "table1.md").read_text()
    assert "39 of 42 cells are finished. The others show as -." in markdown
    header, source, textures, _ = tables(markdown)[
        "rn18: top-1 (%), mean over seeds (least to most)"
    ]
    source, textures = (dict(zip(header, line, strict=True)) for line in (source, textures))
    assert source["sw, full"] == "-" and source["etf, full"].endswith("), 2 seeds")
    top1 = result_of(root, "shapes_textures/rn18_etf_s0/full")["top1"]
    assert textures["etf, full"] == f"{100 * top1:.1f}, 1 seed"
    assert Page((root / "report.html").read_text()).open == []


def test_a_sweep_without_any_finished_cell(tmp_path):
    root = make_sweep(tmp_path / "a")
    for path in root.glob("**/result.json"):
        path.unlink()
    report.write(root)
    assert report.rows(root) == []
    assert "0 of 42 cells are finished" in (root / "report.html").read_text()


def test_one_seed_and_subsets_are_cautioned(tmp_path):
    root = make_sweep(tmp_path / "a", seeds=[3], examples={"oxford_flowers102": 1234})
    report.write(root)
    for name in ("table1.md", "report.html"):
        text = (root / name).read_text()
        assert "Caution: there is one seed." in text
        assert "oxford_flowers102 (subset of 1,234 images)" in text
        assert "shapes/textures (subset" not in text
        assert "in all seeds" not in text


def test_special_characters_are_escaped(tmp_path):
    name = "folder:a/<b>&'\"|x` *y*#1"
    root = make_sweep(tmp_path / "a", targets=[name], command="python <x> & 'y'")
    report.write(root)
    page = Page((root / "report.html").read_text())
    assert not {"b", "x"} & {tag for tag, _ in page.tags}
    assert name in page.texts("td") and "python <x> & 'y'" in page.texts("pre")
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert all((root / urllib.parse.unquote(link)).is_file() for link in links)
    found = tables((root / "table1.md").read_text())
    assert {line[0] for line in found["Every finished cell"][1:]} == {"shapes/source", name}


def test_differences_are_told_from_overlapping_ranges():
    compare = sweep_tables.compare
    assert compare("etf", [0.6, 0.7], "sw", [0.5, 0.55]) == "etf above sw in all seeds (+12.5)"
    assert compare("etf", [0.5, 0.5], "sw", [0.6, 0.7]) == "etf below sw in all seeds (-15.0)"
    assert compare("etf", [0.5, 0.7], "sw", [0.55, 0.6]) == "ranges overlap (+2.5)"
    assert compare("etf", [0.5, 0.7], "sw", [0.7, 0.8]) == "ranges overlap (-15.0)"
    assert compare("etf", [0.5], "sw", [0.25]) == "+25.0, one seed"
    assert compare("etf", [], "sw", [0.25]) == "-"


PAPERS = {
    "source": "imagenet2012", "backbones": ["rn50"], "targets": ["dtd", "stl10"], "seeds": [0],
    "protocol": "paper",
}  # fmt: skip


def comparison(root):
    """Text of the page between the comparison with the paper and what follows."""
    report.write(root)
    text = (root / "report.html").read_text()
    return re.search(r"<h2>Beside the paper&#x27;s figures</h2>(.*?)<h2>", text, re.S)[1]


def test_the_papers_figures_stand_beside_its_own_protocol_only(tmp_path):
    text = comparison(make_sweep(tmp_path / "a", examples={"stl10": 500}, **PAPERS))
    assert "<td>40.90</td>" in text and "<td>76.72</td>" in text
    assert "stl10" not in text, "a subset is not compared"
    top1 = result_of(tmp_path / "a", "dtd/rn50_etf_s0/full")["top1"]
    assert f"<td>{100 * top1:.1f}</td><td>40.90</td>" in text


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"source": "cifar100"}, "this sweep on cifar100"),
        ({"protocol": "standard"}, "this sweep has standard"),
        ({"backbones": ["rn18"]}, "the paper has no rn18"),
        ({"settings": {"epochs": 2}}, "source/rn50_linear_s0 has epochs 2, the protocol has 180"),
        ({"settings": {"batch_size": 64}}, "has batch_size 64, the protocol has 128"),
    ],
)
def test_why_a_sweep_is_not_compared_with_the_paper(tmp_path, changes, reason):
    text = comparison(make_sweep(tmp_path / "a", **(PAPERS | changes)))
    assert reason in text and "<table>" not in text and "40.90" not in text


def test_the_papers_table_is_complete():
    assert len(report.PAPER) == 8 and set(report.PAPER) <= set(DATASETS)
    for methods in report.PAPER.values():
        assert set(methods) == {"linear", "sw", "etf"}
        assert all(len(figures) == 2 for figures in methods.values())


def test_assumed_settings_are_printed_with_their_values(tmp_path):
    root = make_sweep(tmp_path / "a", **PAPERS)
    report.write(root)
    text = (root / "report.html").read_text()
    assert "<td>batch_size</td><td>given</td><td>128</td>" in text
    assert "<td>feature_norm</td><td>none</td><td>given</td>" in text
    # What no setting tells, of Switchable Whitening too where it is among the methods.
    assert "Note: the paper names no framework" in text and "Note: the paper gives no" in text
    assert "Note: this is not the paper" in text
    report.write(make_sweep(tmp_path / "b", **PAPERS, methods=["linear", "etf"]))
    text = (tmp_path / "b/report.html").read_text()
    assert "Note: the paper names no framework" in text and "this is not the paper" not in text


def test_seeds_that_are_there_once_are_no_ranges(tmp_path):
    """A sweep of two seeds of which only the first is finished."""
    root = make_sweep(tmp_path / "a", targets=["digits"])
    for path in root.glob("**/*_s1/**/result.json"):
        path.unlink()
    report.write(root)
    page = Page((root / "report.html").read_text())
    assert any("Of 0 comparisons" in text for text in page.texts("p"))
    assert sum(text.endswith(", one seed") for text in page.texts("td")) == 4 * 2


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(EtfzooError, match="sweep.json cannot be read"):
        report.write(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(EtfzooError, match="not of a sweep: it has no str 'source'"):
        report.write(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(tmp_path, name):
    root = make_sweep(tmp_path / "a", targets=["digits"], seeds=[0])
    report.write(root)
    before = (root / "report.html").read_bytes()
    (root / "source/rn18_etf_s0" / name).write_text("{")
    with pytest.raises(EtfzooError, match=f"rn18_etf_s0/{name}"):
        report.write(root)
    assert (root / "report.html").read_bytes() == before


def test_accuracy_by_method_draws_what_it_is_given():
    points = {"rn18": {"etf": [0.6, 0.7], "sw": [0.5]}, "rn50": {"etf": [0.8]}}
    (axes,) = plots.accuracy_by_method("t", "y (%)", ["sw", "etf"], points).axes
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
    assert sorted(np.concatenate(drawn)) == pytest.approx([50, 60, 70, 80])
    bars = [c.get_segments()[0][0, 1] for c in axes.collections]
    assert sorted(bars) == pytest.approx([50, 65, 80])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["rn18", "rn50"]


def test_training_curves_are_means_over_runs():
    runs = [
        [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0, "top1": 0.5}],
        [{"epoch": 1, "train_loss": 4.0}, {"epoch": 2, "train_loss": 2.0, "top1": 0.7}],
    ]
    above, below = plots.training_curves("t", {"etf": runs}).axes
    np.testing.assert_allclose(above.lines[0].get_xydata(), [[1, 3], [2, 1.5]])
    np.testing.assert_allclose(below.lines[0].get_xydata(), [[2, 60]])


# Measures a page in frames of two widths and writes what it finds into the document.
FRAMES = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>
const page = %s, found = {};
async function measure(width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.srcdoc = page;
  document.body.append(frame);
  await loaded;
  const root = frame.contentDocument.documentElement, images = [...frame.contentDocument.images];
  const seen = frame.contentDocument.querySelectorAll("table");
  found[width] = {
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    images: images.length, loaded: images.filter(i => i.complete && i.naturalWidth).length,
    widest: Math.max(...images.map(i => i.getBoundingClientRect().right)),
    tables: seen.length, boxed: [...seen].filter(t => t.closest(".scroll")).length,
    wide: [...seen].filter(t => t.scrollWidth > width).length,
  };
}
measure(1280).then(() => measure(390)).then(() => {
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def browse(folder, text):
    """What a page measures at desktop and phone width in a headless browser."""
    frames = FRAMES % json.dumps(text).replace("</", "<\\/")
    (folder / "frames.html").write_text(frames, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", (folder / "frames.html").as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', run.stdout)
    assert found, run.stderr[-2000:]
    return json.loads(found[1])


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_report_in_a_browser_at_desktop_and_phone_width(sweep, tmp_path):
    text = (sweep / "report.html").read_text(encoding="utf-8")
    found = browse(tmp_path, text)
    for width in (1280, 390):
        page = found[str(width)]
        assert page["inner"] == width
        assert page["scroll"] <= page["client"] <= width, "the page overflows"
        assert page["images"] == page["loaded"] == 10
        assert page["widest"] <= page["client"]
        assert page["tables"] == page["boxed"] > 5
    assert found["390"]["wide"] > 0, "a table is wider than the phone, and scrolls in its box"


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    html.write(tmp_path / "a.html", "x", [("y", "z")])
    text = (tmp_path / "a.html").read_text()
    wrong = text.replace("</html>", '<div style="width: 900px">wide</div><img src="no.png"></html>')
    found = browse(tmp_path, wrong)["390"]
    assert found["scroll"] > 390 and found["loaded"] < found["images"]
