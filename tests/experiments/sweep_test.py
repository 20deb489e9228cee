"""The sweep of Table 1: its cells, its search, its plan, and what it survives."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.experiments import costs, runner, sweep
from etfzoo.measure.features import Features
from etfzoo.runtime import hardware
from etfzoo.training import search, transfer
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from testing import held_by_another_process, run_recipe, small_rn18, start_recipe

TINY = {
    "source": "digits",
    "backbones": ("rn18",),
    "methods": ("etf",),
    "targets": ("shapes/outlines",),
    "modes": ("full", "knn"),
    "protocol": "quickstart",
    "epochs": 1,
    "batch_size": 50,
    "finetune_epochs": 1,
    "finetune_batch_size": 50,
}


def tiny_flags(root, data_dir, **changes):
    values = {**TINY, "data_dir": data_dir, "workdir": root, **changes}
    return [
        f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items()
    ]


# The search.


@pytest.mark.parametrize(
    ("grid", "scores", "expected"),
    [
        ((0.01, 0.1, 1), (0.1, 0.3, 0.2), None),
        ((0.01, 0.1, 1), (0.1, 0.2, 0.3), 10),
        ((0.1, 1, 0.01), (0.2, 0.1, 0.3), 0.001),  # in any order
        ((0.003, 0.01, 0.03), (0.5, 0.4, 0.3), 0.0009),
        ((0.01, 0.1, 1), (0.1, 0.3, 0.3), None),  # one inside is as good
        ((0.01, 0.1), (0.2, 0.2), 0.001),
        ((0.01, 0.1, 1), (-np.inf, -np.inf, -np.inf), 0.001),  # all diverged
        ((0.01, 0.1, 1), (0.1, 0.2, -np.inf), None),
        ((0.01,), (0.1,), None),
    ],
)
def test_the_value_beyond_the_edge_of_a_grid(grid, scores, expected):
    assert search.beyond(grid, scores) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.1, 0.3, 0.2), 0.1),
        ((0.3, 0.1, 0.2), 0.01),
        ((0.3, 0.3, 0.3), 0.1),  # where `beyond` sees no reason to widen
        ((0.3, 0.1, 0.3), 0.01),
        ((-np.inf, -np.inf, 0.1), 1.0),
    ],
)
def test_of_equal_candidates_one_inside_the_grid_is_picked(scores, expected):
    candidates = [TrainConfig("digits", learning_rate=rate) for rate in (0.01, 0.1, 1.0)]
    assert search._best(candidates, scores).learning_rate == expected


def test_only_positive_grids_are_widened():
    with pytest.raises(EtfzooError, match="positive"):
        search.beyond((0.0, 1.0), (1, 0))


def pretrain(root, data_dir):
    """A sweep's directory with a finished pretraining, made by hand with the printed command."""
    settings = sweep.Sweep(root=str(root), data_dir=str(data_dir), **TINY)
    cell = sweep.cells(settings)[0]
    run_recipe(cell.job.command, *cell.job.arguments())
    return settings


@pytest.fixture(scope="module")
def pretrained(embedded_dir, tmp_path_factory):
    """With the network that the processes of cells know."""
    return pretrain(tmp_path_factory.mktemp("sweep"), embedded_dir)


@pytest.fixture(scope="module")
def small(embedded_dir, tmp_path_factory):
    with small_rn18():
        return pretrain(tmp_path_factory.mktemp("small"), embedded_dir)


def copy(settings, root):
    shutil.copytree(settings.root, root)
    return dataclasses.replace(settings, root=str(root))


@pytest.mark.slow
def test_finetuning_widens_the_grid_of_rates_until_the_best_lies_inside(pretrained, tmp_path):
    full = sweep.cells(pretrained)[1].config
    assert full.init.endswith("source/rn18_etf_s0")
    rates = (1e-7, 1e-5)
    transfer.finetune(full, tmp_path, rates, widen=True)
    rows = json.loads(Workdir(tmp_path).selection.read_text())
    tried = [row["learning_rate"] for row in rows]
    scores = [row["top1"] for row in rows]
    assert tuple(tried[:2]) == rates
    for count in range(2, len(tried)):  # each further one follows from those before it
        assert tried[count] == search.beyond(tried[:count], scores[:count])
    assert len(tried) > 2  # two rates leave the best at an edge
    assert [row["widened"] for row in rows] == [rate not in rates for rate in tried]
    assert len(tried) <= len(rates) + search.EXTENSIONS
    picked = TrainConfig.load(tmp_path / "config.json").learning_rate
    assert scores[tried.index(picked)] == max(scores)
    # Stopped and called again, no candidate is trained again, and the same ones are tried.
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("select/*/result.json")}
    assert len(times) == len(tried)
    transfer.finetune(full, tmp_path, rates, widen=True)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("select/*/result.json")}
    # Those who don't ask get what they always got.
    again = tmp_path / "narrow"
    shutil.copytree(tmp_path / "select", again / "select")
    transfer.finetune(full, again, rates)
    narrow = json.loads(Workdir(again).selection.read_text())
    assert [row["learning_rate"] for row in narrow] == list(rates)
    assert all(row.keys() == {"learning_rate", "weight_decay", "top1"} for row in narrow)


def test_the_probe_widens_its_grid_of_strengths(caplog, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 20))

    def draw(n, noise):
        labels = np.arange(n) % 4
        return Features(centres[labels] + noise * rng.normal(size=(n, 20)), labels)

    fit, select = draw(60, 1.5), draw(2000, 1.5)

    fits = transfer._fit

    def score(strength):
        ((kernel, bias),) = fits(fit, (strength,), 4)
        return np.mean((select.features @ kernel + bias).argmax(1) == select.labels)

    # Far too weak a regularisation: it goes down, step by step, as far as it may.
    picked = transfer._pick_strength(fit, select, (1e2, 1e3), "top1", 4)
    tried = [1e-1, 1e0, 1e1, 1e2, 1e3]
    assert picked in tried[:3] and "trying 10 too" in capsys.readouterr().out
    assert score(picked) >= max(score(c) for c in (1e2, 1e3))
    assert ("as far as it was widened" in caplog.text) == (picked == 1e-1)
    # After two that are worse than the best, the largest are not fitted any more.
    fitted = []

    def counting(found, strengths, classes):
        return fits(found, (fitted.append(s) or s for s in strengths), classes)

    monkeypatch.setattr(transfer, "_fit", counting)
    grid = [10.0**e for e in range(-4, 6)]
    picked = transfer._pick_strength(fit, select, grid, "top1", 4)
    assert fitted == grid[: grid.index(picked) + 3] and score(picked) == max(map(score, grid))
    # One value is no grid.
    assert transfer._pick_strength(fit, select, (1e2,), "top1", 4) == 1e2
    assert "trying" not in capsys.readouterr().out


# The plan.


def test_cells_have_their_places_and_one_budget(tmp_path):
    settings = sweep.Sweep(root=str(tmp_path), seeds=(0, 1), protocol="standard")
    cells = sweep.cells(settings)
    assert len(cells) == 2 * 3 * 2 * (1 + 7 * 3)
    assert len({cell.workdir for cell in cells}) == len(cells)
    by_name = {cell.name: cell for cell in cells}
    cell = by_name["oxford_flowers102/rn101_sw_s1/full"]
    assert cell.workdir == tmp_path / "oxford_flowers102/rn101_sw_s1/full"
    assert cell.needs == (by_name["source/rn101_sw_s1"],)
    assert cell.rates == (0.003, 0.01, 0.03)
    assert (cell.config.seed, cell.config.head, cell.config.norm) == (1, "linear", "sw")
    assert by_name["source/rn50_etf_s0"].config.neural_collapse_every == 90
    same = ("init", "norm", "head")
    for mode in ("pretrain", *sweep.MODES):
        groups = {}
        for c in cells:
            if c.mode == mode:
                key = (c.config.dataset, c.config.backbone, c.config.seed)
                values = c.config.results_in()
                groups.setdefault(key, []).append({k: values[k] for k in values if k not in same})
        assert all(len(g) == 3 and g[0] == g[1] == g[2] for g in groups.values())
        assert len({c.rates for c in cells if c.mode == mode}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": ("rn5",)}, "unknown backbone 'rn5'; did you mean"),
        ({"methods": ("etff",)}, "unknown method 'etff'; did you mean etf"),
        ({"targets": ("cifar11",)}, "unknown data set 'cifar11'; did you mean"),
        ({"source": "imagnet2012"}, "unknown data set 'imagnet2012'; did you mean imagenet2012"),
        ({"protocol": "papr"}, "unknown protocol 'papr'; did you mean paper"),
        ({"modes": ("fine",)}, "unknown mode 'fine'"),
        ({"learning_rates": (0.0, 1.0)}, "must be positive; got 0.0,1.0"),
        ({"source_learning_rates": (1.0, np.nan)}, "must be positive; got 1.0,nan"),
        ({"seeds": ()}, "has no seed"),
        ({"epochs": 0}, "epochs must be between 1 and"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(EtfzooError, match=message):
        sweep.cells(sweep.Sweep(root=str(tmp_path), **changes))
    assert not os.listdir(tmp_path)


def test_a_source_search_is_carried_over(embedded_dir, tmp_path):
    values = TINY | {"methods": ("linear", "etf"), "seeds": (0, 1)}
    values |= {"source_learning_rates": (0.01, 0.1, 1.0), "source_search_epochs": 1}
    settings = sweep.Sweep(root=str(tmp_path), data_dir=str(embedded_dir), **values)
    cells = {cell.name: cell for cell in sweep.cells(settings)}
    first, second = cells["source/rn18_etf_s0"], cells["source/rn18_etf_s1"]
    searched = {"--learning_rate=0.01,0.1,1.0", "--widen", "--search_epochs=1"}
    assert searched <= set(first.job.arguments())
    assert second.needs == (first,)
    assert second.rate_of is first and not searched & set(second.job.arguments())
    assert cells["source/rn18_linear_s1"].needs == (cells["source/rn18_linear_s0"],)
    assert second.ready_job() == second.job
    first.workdir.mkdir(parents=True)
    dataclasses.replace(first.config, learning_rate=0.1).save(first.workdir / "config.json")
    (first.workdir / "result.json").write_text("{}")
    assert second.ready_job().config.learning_rate == 0.1
    second = {c.name: c for c in sweep.cells(settings)}[second.name]
    assert "--learning_rate=0.1" in second.job.arguments() and second.config.learning_rate == 0.1
    with pytest.raises(EtfzooError, match="learning rates not searched there"):
        sweep.state(first)


@pytest.mark.parametrize("name", ["result", "selection", "metrics_jsonl", "machine"])
@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"top1": "x"}', "[" * 10**5])
def test_damaged_files_of_cells_are_made_again(embedded_dir, tmp_path, name, content):
    """A cell counts as unfinished where they tell what it has done; a log stops no sweep."""
    values = TINY | {"methods": ("etf",), "source_learning_rates": (0.01, 0.1)}
    settings = sweep.Sweep(root=str(tmp_path), data_dir=str(embedded_dir), **values)
    (cell,) = [c for c in sweep.cells(settings) if c.name.startswith("source/")]
    workdir = Workdir(cell.workdir)
    workdir.path.mkdir(parents=True)
    cell.config.save(workdir.config)
    rows = [{"learning_rate": r, "weight_decay": 0, "top1": 0.5} for r in (0.01, 0.1)]
    workdir.selection.write_text(json.dumps(rows))
    workdir.write_result({"top1": 0.5, "mean_per_class": 0.5, "examples": 9})
    assert sweep.state(cell) == "finished"
    getattr(workdir, name).write_text(content)
    made_again = name in ("result", "selection")
    assert sweep.state(cell) == ("resumable" if made_again else "finished")
    workdir.result.unlink()
    assert costs.remaining_images(cell) > 0 and costs.measured_rates([cell]) == {}


def test_examples_of_roles():
    assert costs.examples("oxford_flowers102", "train") == 2040
    assert costs.examples("oxford_flowers102", "fit") == 1020
    assert costs.examples("cifar10", "fit") + costs.examples("cifar10", "select") == 50_000
    assert costs.examples("imagenet2012", "test") == 50_000


@pytest.mark.parametrize("protocol", ["paper_lowres", "standard"])
def test_the_plan_of_imagenet_needs_no_data(protocol, tmp_path):
    root = tmp_path / "none"
    flags = [f"--protocol={protocol}", f"--workdir={root}"]
    out = run_recipe("table1", "--dry_run", *flags)
    assert not root.exists()
    assert "132 cells: 132 to do" in out
    for name in (*sweep.TARGETS, "imagenet2012"):
        assert f"--dataset={name} " in out
    epochs, batch = (180, 128) if protocol == "paper_lowres" else (90, 256)
    steps = 1_281_167 // batch
    assert f"source/rn50_etf_s0: to do, {steps * epochs:,} steps" in out
    assert "132 cells of a kind" in out


# The cells.


def test_what_was_made_by_hand_is_finished(small):
    cells = sweep.cells(small)
    assert [sweep.state(cell) for cell in cells] == ["finished", "to do", "to do"]
    (rate,) = costs.measured_rates(cells).values()
    seconds = hardware.read(cells[0].workdir)["seconds"]
    # 200 images in batches of 50, twice the 1297 of the test split and once more those trained on.
    images = 200 + (1297 + 200 + 1297) / 3
    assert rate == pytest.approx(images / seconds)
    assert costs.remaining_images(cells[0]) == 0
    # Fine-tuning on another data set is of the same kind, its probe is not.
    assert [costs.kind(cell) in costs.measured_rates(cells) for cell in cells] == [
        True,
        True,
        False,
    ]
    other = dataclasses.replace(small, epochs=2)
    with pytest.raises(EtfzooError, match="epochs 1 there, 2 here"):
        [sweep.state(cell) for cell in sweep.cells(other)]


def test_two_sweeps_in_one_directory(small, tmp_path):
    settings = copy(small, tmp_path / "root")
    with held_by_another_process(settings.root) as process:
        with pytest.raises(EtfzooError, match=f"a sweep is at work in .*process {process.pid} on"):
            runner.run(settings, "")


@pytest.mark.slow
def test_a_failing_cell_loses_no_other(pretrained, tmp_path, capsys):
    settings = copy(pretrained, tmp_path / "root")
    broken = dataclasses.replace(
        settings, methods=("linear", "etf"), modes=("knn",), source_learning_rates=()
    )
    # The linear model's pretraining cannot begin: a file lies where its workdir belongs.
    (tmp_path / "root/source/rn18_linear_s0").write_text("in the way")
    failures = runner.run(broken, "python recipes/table1.py", jobs=2)
    assert len(failures) == 2
    assert failures[0].startswith("source/rn18_linear_s0: cannot create directory")
    assert "left out: it needs source/rn18_linear_s0" in failures[1]
    out = capsys.readouterr().out
    assert "4 cells, 1 finished" in out and "FAILED" in out
    result = json.loads((tmp_path / "root/shapes_outlines/rn18_etf_s0/knn/result.json").read_text())
    assert result["examples"] == 500
    document = json.loads((tmp_path / "root/sweep.json").read_text())
    assert document["methods"] == ["linear", "etf"] and document["source"] == "digits"
    # What was in the way is gone: the rest is made, and the finished cells stay.
    (tmp_path / "root/source/rn18_linear_s0").unlink()
    moment = (tmp_path / "root/shapes_outlines/rn18_etf_s0/knn/result.json").stat().st_mtime_ns
    assert runner.run(broken, "python recipes/table1.py") == []
    after = (tmp_path / "root/shapes_outlines/rn18_etf_s0/knn/result.json").stat().st_mtime_ns
    assert moment == after


def results(root):
    return {
        str(path.relative_to(root)): json.loads(path.read_text())
        for path in Path(root).rglob("result.json")
    }


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


CHANGES = {"methods": ("linear", "etf"), "learning_rate": "1e-4,1e-2"}


@pytest.fixture(scope="module")
def whole(embedded_dir, tmp_path_factory):
    """The results of a sweep that was never stopped."""
    root = tmp_path_factory.mktemp("whole")
    run_recipe("table1", *tiny_flags(root, embedded_dir, **CHANGES))
    return results(root)


@pytest.mark.slow
def test_stopped_and_started_again_it_ends_with_the_same_numbers(whole, embedded_dir, tmp_path):
    root = tmp_path / "stopped"
    flags = tiny_flags(root, embedded_dir, **CHANGES)
    for moment, end in (
        ("source/*/config.json", signal.SIGKILL),
        ("*/rn18_linear_s0/full/select/*/config.json", signal.SIGTERM),
    ):
        process = start_recipe("table1", *flags)
        wait_for(process, lambda m=moment: list(root.glob(m)))
        process.send_signal(end)
        process.communicate(timeout=120)
        assert process.returncode == (75 if end == signal.SIGTERM else -signal.SIGKILL)
    out = run_recipe("table1", *flags)
    assert " goes on" in out and "2 finished" in out
    assert results(root) == whole
    assert not list(root.rglob(".*.tmp"))
    out = run_recipe("table1", *flags)
    assert "6 cells, 6 finished" in out and "starts" not in out
