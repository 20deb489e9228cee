"""Flags: each command reads them to what it takes, or says in one line what is wrong.

ETFZOO_TEST_SEED=7 draws others.
"""

import importlib
import os

import numpy as np
import pytest
from absl import flags as absl_flags

import etfzoo
from etfzoo.cli import app, configs, flags
from etfzoo.cli.__main__ import commands
from etfzoo.cli.flags import FLAGS
from etfzoo.errors import EtfzooError
from etfzoo.models.spec import ClassifierSpec

DRAWS = 500
ODD = [
    "", " ", "0", "-1", "1", "2", "1.5", "nan", "inf", "1e999", "-1e999", "1e200", "4294967296",
    "9" * 5000, "0x10", "1_0", "true", "no", "none", "None", "a", "a,b", "a,a", "0,1e200", "1,1",
    "1,2", "0,0.0", "16:2", "16:x", "16:2:3", ":", ",", ",,", "=", "--", "~", "~/x",
    "~nobody-of-this-name/x", "x/" * 3000, "y" * 300, "z" * 100_000, "é", "\udce9", "\0", "x\ny",
    "digits", "folder:x", "train[50%:10%]", "rn18", "rn18,rn18", "linear", "etf,sw", "quickstart",
    "mirrored", "float16", "100000", "config.json",
]  # fmt: skip


@pytest.fixture
def defined(monkeypatch, tmp_path):
    """Defines the flags of a command, which nothing else in this process sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(app, "run", lambda *args, **options: None)
    monkeypatch.setattr(flags, "GROUPS", {})
    environment = dict(os.environ)

    def define(command):
        module = importlib.import_module(f"etfzoo.cli.{command}")
        os.environ.clear()
        os.environ.update(environment)  # compile_check prepares its own process
        module.run()
        return module

    before = set(FLAGS)
    yield define
    for name in set(FLAGS) - before:
        delattr(FLAGS, name)


def checked(command, module):
    """What a command makes of its flags before it opens anything."""
    if command == "pretrain":
        known = {"learning_rate": FLAGS.learning_rate[0]} if FLAGS.learning_rate else {}
        return configs.train_config("pretrain", **known)
    if command in ("finetune", "figure3"):
        return configs.finetune_config(None, FLAGS.learning_rate or (), FLAGS.weight_decay or ())
    if command == "benchmark":
        return [module._config(cell) for cell in module._combinations()]
    if command.startswith("table"):
        from etfzoo.experiments import sweep

        return sweep.cells(module.COMMAND.settings())
    return FLAGS.flag_values_dict()


def parse(*given):
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    return app.read_flags(["command", *given])


@pytest.mark.parametrize("command", commands())
def test_drawn_flags(command, defined):
    module = defined(command)
    names = [name for group in flags.GROUPS.values() for name in group]
    rng = np.random.default_rng([int(os.environ.get("ETFZOO_TEST_SEED", 0)), len(command)])
    kept = refused = 0
    for number in range(DRAWS):
        given = []
        for name in rng.choice(names, min(rng.integers(1, 4), len(names)), replace=False):
            value = ODD[rng.integers(len(ODD))]
            if isinstance(FLAGS[name], absl_flags.BooleanFlag) and rng.random() < 0.8:
                given.append(f"--{['', 'no'][rng.integers(2)]}{name}")
            elif FLAGS[name].default is not None and rng.random() < 0.3:
                given.append(f"--{name}={FLAGS[name].default_as_str.strip(chr(39))}")
            else:
                given.append(f"--{name}={value}")
        try:
            parse(*given)
            assert checked(command, module) is not None
            kept += 1
        except EtfzooError as error:
            assert "\n" not in " ".join(str(error).split())
            refused += 1
        except Exception as error:
            raise AssertionError(f"draw {number}: {[g[:200] for g in given]}") from error
    assert kept > 20 and refused > 20, (kept, refused)


@pytest.mark.parametrize(
    "command, flag, message",
    [
        ("evaluate", "--batch_size=0", "batch_size must be between 1 and"),
        (
            "evaluate",
            "--num_virtual_devices=100000",
            "num_virtual_devices must be between 1 and 64",
        ),
        ("evaluate", "--strategy=mirored", "did you mean mirrored"),
        ("figure2", "--a2=0,1e200", "a2 must be between -1000 and 1000; got 1e"),
        ("figure2", "--a2=0,x", "a2 must be a number; got 'x'"),
        ("figure2", "--draws=1", "draws must be between 2 and"),
        ("figure2", "--projections=gauss", "did you mean gaussian"),
        ("table1", "--seeds=0,0", "seeds has 0 twice"),
        ("table1", "--backbones=rn18,rn50,rn18", "backbones has 'rn18' twice"),
        ("table1", "--learning_rate=0.1,0.10", "learning_rate has 0.1 twice"),
        ("table1", "--seeds=-1", "seeds must be between 0 and 4294967295"),
        ("table1", "--jobs=0", "jobs must be between 1 and"),
        ("table_longtail", "--imbalances=100,0.5", "imbalances must be between 1 and"),
        ("table_longtail", "--methods=etf_ajusted", "did you mean etf_adjusted"),
        ("table_variants", "--ood_datasets=dtd,dtd", "ood_datasets has 'dtd' twice"),
        ("benchmark", "--seconds=nan", "seconds must be between"),
        ("benchmark", "--batch_size=8,many", "batch_size must be a whole number; got 'many'"),
        ("finetune", "--mode=linear", "did you mean linear_probe"),
        ("finetune", "--weight_decay=-1", "weight_decay must be between 0 and"),
        ("publish", "--version=0", "version must be between 1 and"),
        ("export", "--format=onxx", "did you mean onnx"),
        ("serve_client", "--timeout=0", "timeout must be between"),
        ("serve_client", "--protocol=http", "unknown protocol 'http'; known: grpc, rest"),
        ("pretrain", "--workdir=~nobody-of-this-name/x", "no home folder is known for ~nobody"),
        ("pretrain", "--workdir=" + "y" * 256, "a name of more than 255 bytes"),
        ("pretrain", "--mean=1,2", "mean must be 3 values"),
        ("pretrain", "--nesterov=8", "nesterov must be true or false; got '8'"),
        ("pretrain", "--image_size_schedule=16:2,24", "must be pairs of whole numbers"),
        ("pretrain", "--epochs=" + "9" * 5000, "epochs must be a whole number"),
    ],
)
def test_what_a_flag_does_not_take(command, flag, message, defined):
    defined(command)
    with pytest.raises(EtfzooError) as error:
        parse(flag)
    line = str(error.value)
    assert line.startswith(f"flag {flag}: ") and message in line and "\n" not in line


def test_a_file_of_flags_that_is_no_text(defined, tmp_path):
    defined("pretrain")
    (tmp_path / "flags").write_bytes(b"--momentum=\xaa\n")
    with pytest.raises(EtfzooError, match="no text in UTF-8"):
        app.read_flags(["command", f"--flagfile={tmp_path / 'flags'}"])


def test_paths_are_expanded_and_models_named(defined, tmp_path):
    defined("finetune")
    parse("--workdir=~/runs", "--data_dir=~", "--model=~/m", "--feature_cache=", "--config=c.json")
    assert FLAGS.workdir == f"{tmp_path}/runs" and FLAGS.data_dir == str(tmp_path)
    assert FLAGS.model == f"{tmp_path}/m" and FLAGS.feature_cache == "" and FLAGS.config == "c.json"
    parse("--model=https://example.org/zoo/rn18_etf.a/1#sha256=0")
    assert FLAGS.model == "https://example.org/zoo/rn18_etf.a/1#sha256=0"


def test_choices_are_those_of_what_takes_them():
    from etfzoo.cli import figure2, finetune, serve_client, sweeps
    from etfzoo.experiments import random_features, sweep
    from etfzoo.zoo import serving_client

    assert set(figure2.PROJECTIONS) == set(random_features.PROJECTIONS)
    assert sweeps.MODES == finetune.MODES == tuple(sweep.MODES)
    assert set(serve_client.PROTOCOLS) == set(serving_client.PORTS)


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_a_kept_head_tells_its_projector(head, defined, monkeypatch):
    defined("finetune")
    spec = ClassifierSpec("rn18", 5, head, projector_layers=2, projector_width=24)
    monkeypatch.setattr(etfzoo, "spec", lambda handle: spec)
    for given, wanted in (("--keep_head",), (2, 24)), ((), (0, None)):
        parse("--dataset=digits", *given)
        config = configs.finetune_config("a/model")
        assert (config.projector_layers, config.projector_width) == wanted
