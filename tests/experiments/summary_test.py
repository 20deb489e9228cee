"""The tables of long tails and of variants: their cells, their figures, and both commands."""

import csv
import dataclasses
import json
import re
import shlex

import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.experiments import costs, methods, report, results, runner, sweep
from etfzoo.models.table import FRAMES
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
from etfzoo.workdir import Workdir
from testing import Page, make_image_folder, run_recipe

LONGTAIL = {
    "table": "table_longtail", "source": "shapes/source", "backbones": ["rn18"],
    "methods": ["linear", "etf_adjusted"], "targets": [], "seeds": [0, 1], "modes": ["full"],
    "protocol": "quickstart", "imbalances": [10.0, 2.5], "command": "python x",
}  # fmt: skip
VARIANTS = LONGTAIL | {
    "table": "table_variants", "targets": ["digits", "dtd"], "modes": ["full", "linear_probe"],
    "imbalances": [1.0], "ood_datasets": ["shapes/textures"],
}  # fmt: skip
TRAINED = {"examples": 900, "mean_per_class": 0.1}


def write(root, plan, result_of):
    """The files of a sweep, of which `result_of(**cell)` gives the results; None is unfinished."""
    root.mkdir(exist_ok=True)
    (root / "sweep.json").write_text(json.dumps(plan))
    for cell, name in results.planned(plan | {"ood_datasets": []}):
        result = result_of(**cell)
        if result is None:
            continue
        workdir = Workdir(root / name)
        workdir.path.mkdir(parents=True)
        TrainConfig(cell["dataset"], imbalance=cell["imbalance"]).save(workdir.config)
        workdir.write_result(TRAINED | result)
    return root


def table_of(markdown, caption):
    """Its lines by method, each by column."""
    part = next(p for p in markdown.split("\n## ") if p.startswith(caption))
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    header, *body = [re.split(r" \| ", line[2:].removesuffix(" |")) for line in lines]
    return {line[0]: dict(zip(header, line, strict=True)) for line in body}


@pytest.fixture
def longtail(tmp_path):
    """Top-1 60 and 70 % of linear at 10; 30, 31 % of the other, of which at 2.5 a seed is left."""

    def result_of(backbone, imbalance, method, seed, dataset, mode):
        if mode == "source" or (method, imbalance, seed) == ("etf_adjusted", 2.5, 1):
            return {"top1": 0.99} if mode == "source" else None
        top1 = 0.6 + 0.1 * seed if method == "linear" else 0.3 + 0.01 * seed
        found = {"top1": top1, "mean_per_class": top1 / 2, "ece": 0.125}
        found |= {"shots/many": 0.9, "shots/many_classes": 5}
        if imbalance == 10:
            found |= {"shots/few": 0.25 * (1 + seed), "shots/few_classes": 2}
        else:
            found |= {"shots/few_classes": 0}
        return found | {"shots/medium": 0.5, "shots/medium_classes": 11}

    return write(tmp_path / "a", LONGTAIL, result_of)


def test_figures_of_long_tails(longtail):
    report.write(longtail)
    markdown = (longtail / "table_longtail.md").read_text()
    assert markdown.startswith("# Long tails of shapes/source, protocol quickstart\n")
    assert "15 of 16 cells are finished" in markdown
    table = table_of(markdown, "rn18, imbalance 10 (5 many, 11 medium, 2 few-shot classes): mean")
    assert table["linear"] == {
        "method": "linear", "top-1": "65.0 (60.0 to 70.0)",
        "mean per-class": "32.5 (30.0 to 35.0)", "many (over 100)": "90.0 (90.0 to 90.0)",
        "medium (20 to 100)": "50.0 (50.0 to 50.0)", "few (under 20)": "37.5 (25.0 to 50.0)",
    }  # fmt: skip
    assert table["etf_adjusted"]["top-1"] == "30.5 (30.0 to 31.0)"
    table = table_of(markdown, "rn18, imbalance 2.5 (5 many, 11 medium, 0 few-shot classes): mean")
    assert table["linear"]["few (under 20)"] == "-"
    assert table["etf_adjusted"]["top-1"] == "30.0, 1 of the seeds"
    document = json.loads((longtail / "table_longtail.json").read_text())
    assert document["table"] == "table_longtail" and document["command"] == "python x"
    lines = {(line["imbalance"], line["method"]): line for line in document["lines"]}
    assert len(lines) == len(document["lines"]) == 4
    figures = lines[10.0, "linear"]["figures"]
    assert figures["few"] == {"mean": 0.375, "least": 0.25, "most": 0.5, "seeds": 2}
    assert set(figures) == {"top1", "mean_per_class", "many", "medium", "few"}
    assert lines[2.5, "etf_adjusted"]["figures"]["top1"]["seeds"] == 1
    assert "few" not in lines[2.5, "linear"]["figures"]
    with open(longtail / "table_longtail.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shots = {row["shots/few"] for row in rows if row["mode"] == "evaluate"}
    assert len(rows) == 15 and shots == {"0.25", "0.5", ""}
    assert {row["imbalance"] for row in rows} == {"10.0", "2.5"}


def test_the_report_of_long_tails(longtail):
    page = Page(report.write(longtail).read_text())
    assert page.open == [] and not (longtail / "table1.csv").exists()
    headings = page.texts("h2")
    assert "Results" in headings and "Every finished cell" in headings
    assert not {"Beside the paper's figures", "Evidence on both sides"} & set(headings)
    assert "65.0" in page.texts("td") and "60.0 to 70.0" in page.texts("small")
    assert "rn18, imbalance 2.5" in page.texts("td")  # in the list of cells
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links and all((longtail / link).is_file() for link in links)
    text = report.text(longtail)
    assert re.search(r"^linear +65\.0 \(60\.0 to 70\.0\) ", text, re.M)


def test_figures_of_variants(tmp_path):
    def result_of(backbone, imbalance, method, seed, dataset, mode):
        if (method, mode, dataset, seed) == ("etf_adjusted", "full", "dtd", 1):
            return None
        if mode == "evaluate":
            scores = {"msp": 0.8, "energy": 0.7, "neco": 0.6, "nci": 0.5}
            shift = 0.1 * seed
            found = {f"ood/shapes/textures/{s}/auroc": v + shift for s, v in scores.items()}
            return {"top1": 0.5, "ece": 0.02 + 0.02 * seed} | found
        if mode == "source":
            return {"top1": 0.5 + 0.1 * seed, "nc/train/nc1": 2.0, "nc/train/cdnv_unbiased": 1e-3}
        top1 = {"digits": 0.9, "dtd": 0.3}[dataset] - 0.2 * (mode == "linear_probe")
        return {"top1": top1 + 0.02 * seed}

    root = write(tmp_path / "a", VARIANTS, result_of)
    report.write(root)
    markdown = (root / "table_variants.md").read_text()
    assert markdown.startswith("# Variants of the classifier on shapes/source")
    table = table_of(markdown, "rn18: mean over seeds")
    assert table["linear"] == {
        "method": "linear", "shapes/source, top-1": "55.0 (50.0 to 60.0)",
        "digits, fine-tuned, top-1": "91.0 (90.0 to 92.0)",
        "dtd, fine-tuned, top-1": "31.0 (30.0 to 32.0)",
        "targets, fine-tuned": "61.0 (60.0 to 62.0)",
        "digits, probe, top-1": "71.0 (70.0 to 72.0)", "dtd, probe, top-1": "11.0 (10.0 to 12.0)",
        "targets, probe": "41.0 (40.0 to 42.0)", "NC1, train": "2 (2 to 2)",
        "CDNV, train": "0.001 (0.001 to 0.001)", "ECE": "3.0 (2.0 to 4.0)",
        "AUROC, shapes/textures": "85.0 (80.0 to 90.0)",
    }  # fmt: skip
    # A mean of targets is of those seeds that have all of them.
    assert table["etf_adjusted"]["targets, fine-tuned"] == "60.0, 1 of the seeds"
    assert table["etf_adjusted"]["digits, fine-tuned, top-1"] == "91.0 (90.0 to 92.0)"
    scores = table_of(markdown, "rn18: images of something else")["linear"]
    assert list(scores.values())[1:] == [
        f"{mean}.0 ({mean - 5}.0 to {mean + 5}.0)" for mean in (85, 75, 65, 55)
    ]
    lines = json.loads((root / "table_variants.json").read_text())["lines"]
    figures = {line["method"]: line["figures"] for line in lines}["linear"]
    assert figures["targets/full"]["mean"] == pytest.approx(0.61)
    assert figures["nc1"] == {"mean": 2.0, "least": 2.0, "most": 2.0, "seeds": 2}
    assert figures["ood/shapes/textures/nci"]["most"] == pytest.approx(0.6)
    page = Page((root / "report.html").read_text())
    assert page.open == [] and "Evidence on both sides" in page.texts("h2")


# The cells.


@pytest.fixture
def longtail_cells(tmp_path):
    settings = sweep.Sweep(
        str(tmp_path), "table_longtail", "cifar100", ("rn18",), methods.LONG_TAIL, (), (0, 1),
        imbalances=(100.0, 10.0),
    )  # fmt: skip
    return {cell.name: cell for cell in sweep.cells(settings)}


def test_cells_of_long_tails_have_one_budget(longtail_cells):
    cells = longtail_cells
    assert len(cells) == 5 * 2 * 2 * 2
    cell = cells["source/rn18_etf_dot_regression_im100_s0"]
    assert (cell.config.head, cell.config.feature_norm) == ("etf", "l2")
    assert (cell.config.loss, cell.config.imbalance) == ("dot_regression", 100)
    assert cell.rates == (0.003, 0.01, 0.03) and cell.job.widen
    second = cells["source/rn18_etf_dot_regression_im100_s1"]
    assert second.rate_of is cell and not second.rates
    other = cells["source/rn18_etf_dot_regression_im10_s0"]  # searched by itself
    assert other.rates == cell.rates and other.rate_of is None
    evaluated = cells["cifar100/rn18_etf_dot_regression_im100_s1/evaluate"]
    assert evaluated.needs == (second,) and evaluated.mode == "evaluate"
    assert evaluated.config.imbalance == 100 and evaluated.runs() == []
    changed = {"head", "feature_norm", "loss", "logit_adjustment"}
    first = [c.config.results_in() for n, c in cells.items() if re.match("source/.*_im100_s0", n)]
    assert len(first) == 5
    assert len({tuple((k, v) for k, v in c.items() if k not in changed) for c in first}) == 1
    adjusted = {n for n, c in cells.items() if c.config.logit_adjustment == 1}
    assert adjusted == {n for n in cells if re.match("source/.*_adjusted_", n)}


def test_what_long_tails_cost(longtail_cells, monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "resolve", lambda *args, **named: _absent())
    costs.examples.cache_clear()
    # CIFAR100-LT has 10,847 images at 100 and 19,573 at 10, as Cui et al. 2019 make it.
    assert costs.examples("cifar100", "train", None, 100.0) == 10847
    assert costs.examples("cifar100", "train", None, 10.0) == 19573
    assert costs.examples("cifar100", "test", None, 100.0) == 10000
    cell = longtail_cells["source/rn18_linear_im100_s1"]
    assert costs.steps(cell.config) == 100 * (10847 // 128)
    costs.examples.cache_clear()


def _absent():
    raise EtfzooError("it is not there")


def test_a_tail_that_is_there_is_counted(embedded_dir):
    costs.examples.cache_clear()
    # 20 images of each of ten digits: floor(20 * 5^(-k / 9)).
    kept = sum(int(20 * 5 ** (-k / 9) + 1e-9) for k in range(10))
    assert costs.examples("digits", "train", str(embedded_dir), 5.0) == kept
    with pytest.raises(EtfzooError, match="without an image"):
        costs.examples("digits", "train", str(embedded_dir), 1000.0)


def test_methods_are_settings_of_a_run():
    assert set(methods.LONG_TAIL) | set(methods.VARIANTS) <= set(methods.METHODS)
    assert methods.VARIANTS[:2] == ("linear", "etf") and len(methods.VARIANTS) == 21
    assert {methods.METHODS[m].get("frame") for m in methods.VARIANTS} >= set(FRAMES) - {
        "simplex_etf"
    }
    configs = [TrainConfig("digits", **own).results_in() for own in methods.METHODS.values()]
    assert len({tuple(c.items()) for c in configs}) == len(configs)  # no two are the same run
    assert methods.METHODS["sw"] == {"head": "linear", "norm": "sw"}
    assert methods.METHODS["etf_projector2"] == {"head": "etf", "projector_layers": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "table2"}, "unknown table 'table2'; did you mean table1"),
        ({"methods": ("etf_l3",)}, "unknown method 'etf_l3'; did you mean etf_l2"),
        ({"imbalances": ()}, "has no imbalance; pass `imbalances`"),
        ({"imbalances": (0.5,)}, "imbalance must be between 1 and"),
        ({"source": "imagenet2012", "methods": ("etf_l2",)}, "etf_l2 has no classifier of so many"),
        ({"ood_datasets": ("digitz",)}, "unknown data set 'digitz'; did you mean digits"),
        ({"seeds": ()}, "has no seed"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    values = {"table": "table_longtail", "source": "cifar100", "backbones": ("rn18",)}
    values |= {"targets": ()} | changes
    with pytest.raises(EtfzooError, match=message):
        sweep.cells(sweep.Sweep(root=str(tmp_path), **values))
    assert not list(tmp_path.iterdir())


def test_a_tail_without_a_class_ends_the_sweep_before_it_begins(embedded_dir, tmp_path):
    flags = ["--source=digits", "--imbalances=1000", "--protocol=quickstart"]
    flags += [f"--data_dir={embedded_dir}", f"--workdir={tmp_path / 'a'}"]
    out = run_recipe("table_longtail", *flags, code=2)
    assert "leaves class" in out and "its largest class has 20" in out
    assert not list(tmp_path.glob("a/*/*"))


def test_old_plans_are_of_table_1(tmp_path):
    plan = {name: VARIANTS[name] for name in results._PLAN}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    found = results.read_plan(tmp_path)
    assert (found["table"], found["imbalances"]) == ("table1", [1.0])
    assert {cell["mode"] for cell, _ in results.planned(found)} == {
        "source", "full", "linear_probe",
    }  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(plan | {"table": "table7"}))
    with pytest.raises(EtfzooError, match="unknown table in .*sweep.json"):
        results.read_plan(tmp_path)


def test_places_are_those_of_the_sweep(tmp_path):
    """A report finds the cells where the sweep puts them, whatever the names."""
    row = {"backbones": ("rn18",), "methods": ("etf", "linear_balanced"), "seeds": (3,)}
    for values in (
        row | {"table": "table1", "targets": ("digits", "imagenet_resized/64x64")},
        row | {"table": "table_longtail", "targets": (), "imbalances": (1.0, 12.5, 1e6)},
        row | {"table": "table_variants", "targets": ("digits",), "ood_datasets": ("dtd",)},
    ):
        settings = sweep.Sweep(str(tmp_path), source="cifar100", **values)
        placed = {str(cell.workdir.relative_to(tmp_path)) for cell in sweep.cells(settings)}
        planned = {place for _, place in results.planned(dataclasses.asdict(settings))}
        assert placed == planned


# The cells' work, in this process.


@pytest.fixture
def made(small_network, embedded_dir, tmp_path, monkeypatch):
    """Runs a command of a sweep whose cells are jobs in this process; returns what it printed."""

    class Process:
        def __init__(self, command, **options):
            self.pid, job = 0, Job.load(command[-1].removeprefix("--config="))
            assert command[1:3] == ["-m", "etfzoo.training"]
            job.run()

        def poll(self):
            return 0

    def make(table, *flags):
        flags = [f"--data_dir={embedded_dir}", f"--workdir={tmp_path / 'a'}", *flags]
        flags += ["--source=digits", "--protocol=quickstart", "--image_size=8", "--batch_size=50"]
        flags += ["--epochs=1"]
        return run_recipe(table, *flags)

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    return make


@pytest.mark.slow
def test_a_sweep_of_long_tails(made, tmp_path):
    flags = ["--imbalances=5", "--seeds=0,1", "--methods=linear_adjusted,etf_dot_regression"]
    flags += ["--source_learning_rate=0.01"]
    out = made("table_longtail", *flags)
    assert "8 cells, 0 finished" in out
    document = json.loads((tmp_path / "a/table_longtail.json").read_text())
    assert len(document["lines"]) == 2
    counts = np.floor(20 * 5 ** (-np.arange(10) / 9) + 1e-9)  # of ten digits
    assert (counts == 20).sum() == 1  # medium begins at 20; no class has more
    for line in document["lines"]:
        name, figures = f"rn18_{line['method']}_im5_s{{}}", line["figures"]
        top1 = [
            Workdir(tmp_path / "a/source" / name.format(s)).read_result()["top1"] for s in (0, 1)
        ]
        assert figures["top1"] == {
            "mean": pytest.approx(np.mean(top1)), "least": pytest.approx(min(top1)),
            "most": pytest.approx(max(top1)), "seeds": 2,
        }  # fmt: skip
        few, medium = figures["few"]["mean"], figures["medium"]["mean"]
        assert figures["mean_per_class"]["mean"] == pytest.approx((9 * few + medium) / 10)
        assert "many" not in figures
    before = unchanged(tmp_path)
    assert "8 cells, 8 finished" in made("table_longtail", *flags)
    assert unchanged(tmp_path) == before
    lost = tmp_path / "a/digits/rn18_linear_adjusted_im5_s0/evaluate/result.json"
    lost.unlink()
    assert "8 cells, 7 finished" in made("table_longtail", *flags)
    after = unchanged(tmp_path)
    assert {path for path in after if after[path] != before[path]} == {lost}


def variants(root):
    """Figures by method of a table of two variants, which are those of the cells."""
    table = json.loads((root / "table_variants.json").read_text())
    lines = {line["method"]: line["figures"] for line in table["lines"]}
    assert list(lines) == ["linear", "etf_projector1"]
    for method, figures in lines.items():
        name = f"rn18_{method}_s0"
        for mode in ("full", "linear_probe"):
            top1 = Workdir(root / "digits" / name / mode).read_result()["top1"]
            assert figures[f"digits/{mode}"]["mean"] == top1
        source = Workdir(root / "source" / name).read_result()
        assert figures["nc1"]["mean"] == source["nc/train/nc1"]
        assert figures["source"]["mean"] == source["top1"]
        assert 0 <= figures["ece"]["mean"] <= 1
    return lines


@pytest.mark.slow
def test_a_sweep_of_variants(made, tmp_path):
    flags = ["--methods=linear,etf_projector1", "--targets=digits"]
    flags += ["--source_learning_rate=0.01", "--learning_rate=0.01", "--finetune_epochs=1"]
    flags += ["--finetune_batch_size=50"]
    made("table_variants", *flags, "--ood_datasets=digits")
    for figures in variants(tmp_path / "a").values():
        assert figures["ood/digits/neco"]["mean"] == pytest.approx(0.5)  # the same images
    # A further data set of other things: what is trained stays.
    before = unchanged(tmp_path)
    photos = make_image_folder(tmp_path / "photos", {"ant": 9, "bee": 9})
    out = made("table_variants", *flags, f"--ood_datasets=digits,folder:{photos}")
    assert "8 cells, 6 finished" in out
    after = unchanged(tmp_path)
    assert {p.parent.name for p in after if after[p] != before[p]} == {"evaluate"}
    found = variants(tmp_path / "a")["linear"]
    assert 0 <= found[f"ood/folder:{photos}/msp"]["mean"] <= 1


# The commands.


def unchanged(root):
    """When each result was written."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("result.json")}


@pytest.mark.slow
def test_long_tails_from_one_command(embedded_dir, tmp_path):
    """As a user starts it, with fewer steps; all figures are those of the cells' own commands."""
    root = tmp_path / "a"
    flags = ["--quick", f"--workdir={root}", f"--data_dir={embedded_dir}", "--epochs=2"]
    flags += ["--seeds=0", "--source_learning_rate=0.01", "--methods=linear,etf_adjusted"]
    plan = run_recipe("table_longtail", "--dry_run", *flags)
    assert "4 cells: 4 to do" in plan and not root.exists()
    out = run_recipe("table_longtail", *flags)
    assert "4 cells, 0 finished" in out and "] source/rn18_etf_adjusted_im10_s0" in out
    lines = json.loads((root / "table_longtail.json").read_text())["lines"]
    assert [line["method"] for line in lines] == ["linear", "etf_adjusted"]
    for line in lines:
        name = f"rn18_{line['method']}_im10_s0"
        trained = Workdir(root / "source" / name).read_result()
        figures = {column: values["mean"] for column, values in line["figures"].items()}
        assert figures["top1"] == pytest.approx(trained["top1"])
        assert figures["mean_per_class"] == pytest.approx(trained["mean_per_class"])
        # 18 classes of 160 to 16 images: floor(160 * 10^(-k / 17)); 50 test images each.
        counts = np.floor(160 * 10 ** (-np.arange(18) / 17) + 1e-9)
        sizes = [
            (counts > 100).sum(),
            ((counts >= 20) & (counts <= 100)).sum(),
            (counts < 20).sum(),
        ]
        groups = [figures[group] for group in ("many", "medium", "few")]
        assert np.average(groups, weights=sizes) == pytest.approx(figures["mean_per_class"])
        assert f"\n{line['method']} " in out
    # A finished sweep is not repeated; where an evaluation is lost, only that is made again.
    before = unchanged(root)
    run_recipe("table_longtail", *flags)
    assert unchanged(root) == before
    lost = root / "shapes_source/rn18_linear_im10_s0/evaluate/result.json"
    lost.unlink()
    run_recipe("table_longtail", *flags)
    after = unchanged(root)
    assert {path for path in after if after[path] != before[path]} == {lost}
    # The commands of the plan are those that the cells ran: by hand they find them finished.
    commands = re.findall(r"^ +python recipes/(\w+)\.py (.*)$", plan, re.M)
    for command, arguments in commands:
        run_recipe(command, *shlex.split(arguments))
    assert unchanged(root) == after
    metrics = json.loads((lost.parent / "metrics.json").read_text())
    assert metrics["shots"]["few"]["accuracy"] == Workdir(lost.parent).read_result()["shots/few"]


@pytest.mark.slow
def test_variants_from_one_command(embedded_dir, tmp_path):
    root = tmp_path / "a"
    flags = ["--quick", f"--workdir={root}", f"--data_dir={embedded_dir}", "--epochs=1"]
    flags += ["--source_learning_rate=0.01", "--learning_rate=0.01", "--finetune_epochs=1"]
    flags += ["--methods=linear,etf_projector1"]
    run_recipe("table_variants", *flags)
    lines = variants(root)
    for figures in lines.values():
        assert 0 <= figures["ood/shapes/textures/neco"]["mean"] <= 1
    # A further stranger: what is trained stays.
    before = unchanged(root)
    out = run_recipe("table_variants", *flags, "--ood_datasets=shapes/textures,digits")
    assert "8 cells, 6 finished" in out
    after = unchanged(root)
    assert {p.parent.name for p in after if after[p] != before[p]} == {"evaluate"}
    found = variants(root)["linear"]
    assert 0 <= found["ood/digits/msp"]["mean"] <= 1
    assert found["ood/shapes/textures/msp"] == lines["linear"]["ood/shapes/textures/msp"]
