"""What commands hand to the library: every flag of theirs that is no setting of a run."""

import dataclasses
import importlib
import shlex
import types

import pytest

from etfzoo.cli import configs
from etfzoo.cli.flags import FLAGS, GROUPS
from etfzoo.experiments import report, runner, sweep
from etfzoo.training import loop, publish_run, search, transfer
from etfzoo.training.config import TrainConfig

RESULT = {"top1": 0.5, "top5": 0.7, "mean_per_class": 0.4, "examples": 10}
SPEC = types.SimpleNamespace(backbone="rn34", norm="sw", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process; what it calls is written down by `note`."""
    before, groups = set(FLAGS), {name: list(names) for name, names in GROUPS.items()}
    called = []

    def note(owner, name, answer=None):
        def noted(*args, **kwargs):
            called.append((name, args, kwargs))
            return answer(*args, **kwargs) if callable(answer) else answer

        monkeypatch.setattr(owner, name, noted)

    def start(command, *arguments):
        module = importlib.import_module(f"etfzoo.cli.{command}")
        monkeypatch.setattr(module.app, "run", lambda main, doc: None)
        module.run()
        FLAGS(["x", *arguments])
        module.main()
        return called

    monkeypatch.setattr(configs, "open_strategy", lambda settings: None)
    monkeypatch.setattr("etfzoo.spec", lambda handle: SPEC, raising=False)
    start.note = note
    yield start
    for name in set(FLAGS) - before:
        delattr(FLAGS, name)
    FLAGS.unparse_flags()
    GROUPS.clear()
    GROUPS.update(groups)


def test_pretrain(run):
    picked = TrainConfig("digits", learning_rate=0.7)
    run.note(search, "pick", picked)
    run.note(loop, "train_and_evaluate", RESULT)
    (_, given, named), (_, trained, _) = run(
        "pretrain", "--dataset=digits", "--protocol=small", "--backbone=rn18", "--workdir=w",
        "--learning_rate=0.3,0.1", "--widen", "--search_epochs=2", "--seed=3",
    )  # fmt: skip
    config, *rest = given
    assert rest == ["w", (0.3, 0.1), (), True, 2] and not named
    assert (config.learning_rate, config.seed, config.image_size, config.flip) == (
        0.3,
        3,
        64,
        False,
    )
    assert trained == (picked, "w")


@pytest.mark.parametrize("mode", ["full", "linear_probe", "knn"])
def test_finetune(run, mode):
    run.note(transfer, {"full": "finetune"}.get(mode, mode), RESULT)
    arguments = [
        "--model=rn34_sw.mine", "--dataset=cifar10", "--workdir=w", f"--mode={mode}",
        "--learning_rate=0.3,0.1", "--weight_decay=0,0.001", "--widen", "--feature_cache=kept",
        "--seed=3",
    ]  # fmt: skip
    ((_, (config, *rest), named),) = run("finetune", *arguments)
    assert (config.init, config.backbone, config.norm) == ("rn34_sw.mine", "rn34", "sw")
    assert (config.mean, config.std) == (SPEC.mean, SPEC.std)
    assert (config.learning_rate, config.weight_decay, config.seed) == (0.3, 0.0, 3)
    assert (config.head, config.protocol, config.epochs) == ("linear", "standard", 50)
    if mode == "full":
        assert rest == ["w", (0.3, 0.1), (0.0, 0.001), True] and not named
    else:
        assert rest == ["w"] and named == {"feature_cache": "kept"}


def test_finetune_without_a_cache_of_features(run):
    run.note(transfer, "knn", RESULT)
    ((_, _, named),) = run("finetune", "--model=x", "--mode=knn", "--feature_cache=")
    assert named == {"feature_cache": None}


def test_publish(run, tmp_path):
    run.note(publish_run, "publish_run", tmp_path)
    ((_, given, named),) = run(
        "publish", "--workdir=w", "--name=rn18_etf.x", "--models_dir=m", "--version=7",
        "--licence=l", "--intended_use=u", "--limits=n", "--storage=float16", "--index=i",
        "--default", "--data_dir=d",
    )  # fmt: skip
    assert given == ("w", "rn18_etf.x", "m", 7)
    assert named == {
        "licence": "l", "intended_use": "u", "limits": "n", "storage": "float16",
        "index_path": "i", "url": None, "default": True, "data_dir": "d",
    }  # fmt: skip


def _suggested(capsys):
    """The words of the command that was suggested, as a shell reads them."""
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("next: "))
    return shlex.split(line.removeprefix("next: "))


def test_the_suggestion_of_pretrain_is_quoted(run, capsys):
    run.note(loop, "train_and_evaluate", RESULT)
    run("pretrain", "--data_dir=it's $HOME", "--workdir=a; b")
    (*command, dataset, data_dir) = _suggested(capsys)
    assert command == ["python", "recipes/finetune.py", "--model=a; b"]
    assert (dataset, data_dir) == ("--dataset=oxford_flowers102", "--data_dir=it's $HOME")


def test_the_suggestion_of_finetune_is_quoted(run, capsys):
    run.note(transfer, "linear_probe", RESULT)
    names = ["--dataset=folder:my photos", "--workdir=it's $(mine)"]
    run("finetune", "--model=x", "--mode=linear_probe", *names)
    assert _suggested(capsys) == [
        "python", "recipes/evaluate.py", "--model=it's $(mine)", "--dataset=folder:my photos",
    ]  # fmt: skip


def test_the_suggestion_of_publish_is_quoted(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "it's $(mine)" / "1"
    folder.mkdir(parents=True)
    run.note(publish_run, "publish_run", folder)
    run("publish", "--workdir=w", "--name=rn18_etf.x")
    python, flag, code = _suggested(capsys)
    asked = []
    monkeypatch.setattr("etfzoo.info", asked.append, raising=False)
    exec(code)
    assert (python, flag, asked) == ("python", "-c", [str(folder)])


SWEEP = {
    "root": "w", "source": "digits", "backbones": ("rn18", "rn34"), "methods": ("etf",),
    "seeds": (3, 4), "protocol": "small", "data_dir": "d", "source_learning_rates": (0.5, 0.6),
    "source_search_epochs": 2, "epochs": 11, "batch_size": 12, "image_size": 48,
    "image_size_schedule": ((32, 2), (40, 3)), "eval_every": 5, "mixed_precision": "float16",
    "cache": "device", "deterministic": False,
}  # fmt: skip
TRANSFER = {
    "targets": ("dtd", "stl10"), "modes": ("knn",), "learning_rates": (0.3, 0.1),
    "finetune_epochs": 13, "finetune_batch_size": 14,
}  # fmt: skip
TABLES = {
    "table1": SWEEP | TRANSFER,
    "table_longtail": SWEEP | {"imbalances": (20.0, 5.0)},
    "table_variants": SWEEP | TRANSFER | {"ood_datasets": ("dtd",)},
}


def _text(value):
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)


@pytest.mark.parametrize("table, values", TABLES.items())
def test_tables(run, table, values):
    """Every argument of a sweep is other than its default."""
    fields = {field.name: field.default for field in dataclasses.fields(sweep.Sweep)}
    assert set().union(*TABLES.values(), ["table"]) == set(fields)
    assert all(fields[name] != value for name, value in values.items())
    run.note(runner, "run", [])
    run.note(report, "write", "report.html")
    run.note(report, "text", "")
    named = {"root": "workdir", "learning_rates": "learning_rate"}
    named |= {"source_learning_rates": "source_learning_rate"}
    arguments = [f"--{named.get(name, name)}={_text(v)}" for name, v in values.items()]
    found = {name: given for name, given, _ in run(table, *arguments, "--jobs=3")}
    settings, command, jobs, gpus = found["run"]
    given = {name: getattr(settings, name) for name in values}
    assert given == values and settings.table == table
    if table == "table_longtail":
        assert settings.targets == () and "text" in found
    assert command.startswith(f"python recipes/{table}.py") and (jobs, gpus) == (3, 0)
    assert found["write"] == ("w",)


def test_variants_are_by_default_all_that_fit(run):
    run.note(runner, "run", [])
    run.note(report, "write", "report.html")
    run.note(report, "text", "")
    (_, (settings, *_), _), *_ = run("table_variants", "--source=imagenet2012")
    # 1000 classes in 512 features: no simplex, but a softmax code.
    assert "etf_softmax_code" in settings.methods and "linear" in settings.methods
    assert not {"etf", "etf_hadamard", "etf_l2"} & set(settings.methods)


def test_table1_quick(run, tmp_path):
    run.note(runner, "run", [])
    run.note(report, "write", "report.html")
    (_, (settings, _, jobs, _), _), _ = run(
        "table1", "--quick", f"--workdir={tmp_path}", "--epochs=5"
    )
    assert (settings.source, settings.targets) == ("shapes/source", ("digits",))
    assert (settings.seeds, settings.backbones, jobs) == ((0, 1), ("rn18",), 2)
    assert (settings.epochs, settings.finetune_epochs) == (5, 3)  # said, and of the quick ones
    assert settings.learning_rates == (0.003, 0.01, 0.03)
    assert settings.data_dir == str(tmp_path / "data") and (tmp_path / "data").is_dir()
