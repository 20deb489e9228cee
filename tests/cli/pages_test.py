"""Every command on every page: its flags are read, and it is run here or it is said why not."""

import importlib
import re
from unittest import mock

import pytest
from PIL import Image

import pages
from etfzoo.cli import app, configs, demo
from etfzoo.cli.__main__ import commands
from etfzoo.cli.flags import FLAGS
from testing import CHECKOUT, as_a_process, finish, make_image_folder, run_recipe, start_recipe

PAGES = sorted(
    str(path.relative_to(CHECKOUT))
    for pattern in (
        "*.md", "docs/**/*.md", "recipes/*.md", "saved_models/**/*.md", "serving/*.md",
        "benchmarks/RESULTS.md",
    )
    for path in CHECKOUT.glob(pattern)
    if path.name != "CHANGELOG.md"
)  # fmt: skip
COMMANDS = [command for page in PAGES for command in pages.of_page(page)]
EXAMPLES = [example for name in commands() for example in pages.of_help(f"etfzoo/cli/{name}.py")]

# Run by `test_the_commands_run`, in this order, with one epoch each.
RUN = """
python -c 'import etfzoo; print(etfzoo.__all__)'
python -c 'import etfzoo; print(etfzoo.protocols.settings('"'"'paper'"'"', '"'"'pretrain'"'"', '"'"'rn50'"'"', None))'
python -c 'import etfzoo, keras; print(etfzoo.layers.ETFClassifier(10)(keras.random.normal((4, 64))).shape)'
python -c 'import etfzoo; m = etfzoo.load('"'"'rn101_etf'"'"'); print(m.output_shape)'
python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart
python recipes/neural_collapse.py --model=runs/shapes_source_32_rn18_etf_s0 --dataset=shapes/source
python recipes/finetune.py --model=runs/shapes_source_32_rn18_etf_s0 --dataset=digits --protocol=quickstart
python recipes/evaluate.py --model=runs/shapes_source_32_rn18_etf_s0/digits_full --dataset=digits
python recipes/finetune.py --model=runs/shapes_source_32_rn18_etf_s0 --dataset=digits --protocol=quickstart --mode=linear_probe
python recipes/finetune.py --model=runs/shapes_source_32_rn18_etf_s0 --keep_head --dataset=shapes/source --protocol=quickstart --epochs=5 --learning_rate=0.003 --workdir=runs/longer
python recipes/finetune.py --model=runs/shapes_source_32_rn18_etf_s0 --dataset=digits --protocol=quickstart --freeze=stem,stage1 --layer_decay=0.7 --early_stopping=5 --train_split=fit --eval_split=select --workdir=runs/careful
python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart --optimizer=adamw --learning_rate=0.001 --weight_decay=0.05 --clip_norm=1 --accumulate_steps=4 --workdir=runs/adamw
python recipes/publish.py --workdir=runs/shapes_source_32_rn18_etf_s0 --name=rn18_etf.shapes --models_dir=models
python recipes/predict.py --model=models/rn18_etf.shapes photo.jpg folder/
python recipes/publish.py --workdir=runs/flowers --name=rn18_etf.flowers --licence=CC-BY-4.0 --models_dir=zoo --index=zoo/index.json --url=https://example.org/zoo
python recipes/publish.py --workdir=runs/my_run --name=rn18_etf.shapes --licence=Apache-2.0
python recipes/publish.py --workdir=runs/rn18_etf --name=rn18_etf.tiny100_64 --storage=float16 --index=etfzoo/zoo/index.json
python recipes/pretrain.py --dataset=folder:photos --backbone=rn18 --protocol=quickstart --batch_size=32
python recipes/finetune.py --model=WORKDIR_OR_NAME --dataset=folder:photos --learning_rate=0.003,0.01,0.03
python recipes/evaluate.py --model=WORKDIR_OR_NAME --dataset=folder:photos
python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart --guided --workdir=runs/guided
python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart --head=linear --projector_layers=1 --projector_kind=etf --entropy_weight=0.05 --label_smoothing=0.1 --workdir=runs/frozen_projector
python recipes/figure2.py --dataset=gaussian
python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart --strategy=mirrored --num_virtual_devices=2 --workdir=runs/two_devices
"""  # noqa: E501
# What stands for something of the reader's.
MEANT = {
    "runs/flowers": "runs/shapes_source_32_rn18_etf_s0",
    "runs/my_run": "runs/shapes_source_32_rn18_etf_s0",
    "runs/rn18_etf": "runs/shapes_source_32_rn18_etf_s0",
    "WORKDIR_OR_NAME": "runs/folder_photos_32_rn18_etf_s0",
}
# Run by another test, maybe with other flags.
RUN_BY = {
    "make demo": "tests/cli/pages_test.py::test_demo",
    "make test": ".ci/run::make test",
    "make test-slow": ".ci/run::make test-slow",
    "make docs": ".ci/run::make docs",
    "make lint": "Makefile::test: lint",
    "make test *": ".ci/run::make test",
    "pip install -e '.[cpu,train]'": "Makefile::'.[cpu,train,test]'",
    "pip install -e '.[cpu,train,jax]'": "Makefile::'.[cpu,train,test]'",
    "pip install -e '.[onnx]'": "Makefile::'.[cpu,train,test]'",
    "pip install --no-deps tensorflow-serving-api grpcio": "Makefile::tensorflow-serving-api",
    "python -c 'import etfzoo; print(etfzoo.data.class_names(*": (
        "tests/doctests_test.py::test_the_python_of_the_page_about_keras"
    ),
    "python recipes/pretrain.py --dataset=shapes/source --backbone=keras:EfficientNetB0 *": (
        "tests/cli/keras_backbones_test.py::test_from_pretraining_to_serving"
    ),
    "python docs/notebooks/etf_layer.py": "tests/notebooks_test.py::test_it_runs",
    "jupytext --to ipynb docs/notebooks/etf_layer.py": "tests/notebooks_test.py::test_jupyter",
    "python -m etfzoo.training --config=FILE": (
        "tests/training/job_test.py::test_a_job_runs_and_records_a_command"
    ),
    "KERAS_BACKEND=jax python recipes/pretrain.py --dataset=shapes/source *": (
        "tests/runtime/step_jax_test.py::test_recipes_from_pretraining"
    ),
    "python recipes/prepare.py --archive=*": "tests/data/tiny_imagenet_test.py::test_the_recipe",
    "python recipes/prepare.py --dataset=*": (
        "tests/data/array_record_test.py::test_converting_again_and_going_on"
    ),
    "python recipes/pretrain.py --dataset=csv:photos/labels.csv *": (
        "tests/data/csv_file_test.py::test_it_trains_and_is_evaluated"
    ),
    "python recipes/pretrain.py --dataset=hf:*": (
        "tests/data/hugging_face_test.py::test_it_trains_resumes_and_is_evaluated"
    ),
    "python recipes/publish.py --name=rn18_etf.flowers --push=*": (
        "tests/zoo/push_test.py::test_the_command"
    ),
    "pip install 'etfzoo[hf]'": "Makefile::'.[cpu,train,test]'",
    "python recipes/predict.py --model=*": "tests/zoo/serving_client_test.py::test_predict",
    "python recipes/export.py --model=rn18_etf *": "tests/zoo/export_test.py::test_recipe_in_int8",
    "python recipes/export.py --model=rn101_etf *": "tests/zoo/export_test.py::test_recipe",
    "pip install -e '.[openvino]'": "Makefile::'.[cpu,train,test]'",
    "python recipes/serve_client.py *": "tests/zoo/serving_client_test.py::test_serve_client",
    "python recipes/table1.py --quick": 'tests/experiments/sweep_test.py::run_recipe("table1"',
    "python recipes/table_longtail.py --quick": "tests/experiments/summary_test.py::--quick",
    "python recipes/table_variants.py --quick": "tests/experiments/summary_test.py::--quick",
    "python recipes/figure3.py --models=A,B,C --dataset=*": (
        "tests/experiments/figures_test.py::test_figures_of_a_trained_model"
    ),
}
IMAGENET = "ImageNet, and days of training"
TPU = "a TPU"
GPU = "a GPU"
CLUSTER = "several machines"
HOURS = "hours of training on photographs that have to be downloaded"
DOWNLOAD = "a download of hundreds of megabytes"
MEASURED = "minutes to hours of measuring on a quiet machine"
NOT_RUN = {
    "hf auth login": "an account at Hugging Face",
    "python recipes/pretrain.py --head=etf": IMAGENET,
    "python recipes/pretrain.py --dataset=imagenet2012 --data_dir=indexed": IMAGENET,
    "etfzoo pretrain --head=etf": IMAGENET,
    "python recipes/pretrain.py --head=linear --norm=sw --protocol=sw_official": IMAGENET,
    "python recipes/pretrain.py --head=etf --strategy=mirrored*": GPU,
    "python recipes/pretrain.py --head=etf --strategy=tpu": TPU,
    "KERAS_BACKEND=jax python recipes/pretrain.py --head=etf *": TPU,
    "KERAS_BACKEND=jax python recipes/benchmark.py *": TPU,
    "python recipes/compile_check.py *": "libtpu, which only some machines have",
    "pip install -e '.[cpu,tpu-check]'": "libtpu, which only some machines have",
    "pip install -e '.[tpu,train]'": TPU,
    "pip install -e '.[cpu,train]' 'jax[tpu]'": TPU,
    "pip install -e '.[cpu,train]' 'jax[cuda13]'": GPU,
    "python recipes/pretrain.py --head=etf --strategy=multiworker *": CLUSTER,
    "srun *": CLUSTER,
    "python recipes/pretrain.py --dataset=tiny_imagenet *": HOURS,
    "KERAS_BACKEND=jax python recipes/pretrain.py --dataset=tiny_imagenet *": GPU,
    "KERAS_BACKEND=jax etfzoo pretrain --dataset=tiny_imagenet *": GPU,
    "python recipes/evaluate.py --model=rn18_etf --dataset=tiny_imagenet *": DOWNLOAD,
    "python recipes/evaluate.py --model=rn18_linear --dataset=tiny_imagenet *": DOWNLOAD,
    "python recipes/evaluate.py --model=rn50_etf --dataset=tiny_imagenet *": DOWNLOAD,
    "python recipes/evaluate.py --model=rn101_etf --dataset=tiny_imagenet *": DOWNLOAD,
    "python recipes/evaluate.py --model=rn18_etf.tiny100_64_flowers102 *": DOWNLOAD,
    "python recipes/finetune.py --model=runs/tiny_*": HOURS,
    "python recipes/finetune.py --model=rn18_etf --dataset=oxford_flowers102 *": HOURS,
    "python recipes/finetune.py --model=rn18_linear --dataset=oxford_flowers102 *": HOURS,
    "python recipes/table1.py --source=tiny_imagenet *": HOURS,
    "python recipes/table_longtail.py --source=cifar100 *": HOURS,
    "python recipes/table_variants.py --source=tiny_imagenet *": HOURS,
    "KERAS_BACKEND=jax python recipes/table1.py --source=tiny_imagenet *": GPU,
    "python recipes/figure2.py --model=runs/t1_*": HOURS,
    "python recipes/figure3.py --models=runs/t1_*": HOURS,
    "python recipes/finetune.py --model=runs/table1_small/*": HOURS,
    "python recipes/figure3.py --models=runs/fig3/*": HOURS,
    "python recipes/benchmark.py --backbone=rn50 *": MEASURED,
    "python benchmarks/*": MEASURED,
    "mkdir -p runs/t1_cifar10": HOURS,
    "ln -s *": HOURS,
    "wget http://cs231n.stanford.edu/tiny-imagenet-200.zip": DOWNLOAD,
    "cd serving": "Docker",
    "docker compose up": "Docker",
    "curl *": "Docker",
    "base64 *": "Docker",
    ". .venv/bin/activate": "it is about the reader's own shell",
    "pip install jupyterlab jupytext": "it is about the reader's own Jupyter",
    "jupyter lab docs/notebooks": "it is about the reader's own Jupyter",
    "pip install pre-commit": "it is about the reader's own commits",
    "pre-commit install": "it is about the reader's own commits",
}


LINES = [*RUN.splitlines()[1:], *RUN_BY, *NOT_RUN]


def places(text) -> list[str]:
    """The lines above of a command; one that ends with * is of all that begin so."""
    return [x for x in LINES if text == x or x.endswith("*") and text.startswith(x[:-1])]


def test_every_command_is_run_or_it_is_said_why_not():
    assert len(COMMANDS) > 90
    new = [str(command) for command in COMMANDS if not places(command.text)]
    assert not new, "add each to RUN, RUN_BY or NOT_RUN: " + "\n".join(new)


def test_no_line_is_left_of_a_command_that_is_gone():
    used = {place for command in COMMANDS for place in places(command.text)}
    assert used == set(LINES)


@pytest.mark.parametrize("command, place", RUN_BY.items())
def test_what_is_run_elsewhere_is_there(command, place):
    path, _, name = place.partition("::")
    assert name in (CHECKOUT / path).read_text("utf-8")


@pytest.mark.parametrize("command", [c for c in COMMANDS + EXAMPLES if c.recipe], ids=str)
def test_flags_are_those_of_the_command(command, tmp_path):
    """They are read and checked, and nothing is opened."""
    given = [word for word in command.arguments if not word.endswith(("…", "..."))]
    with as_a_process([command.recipe, *given], tmp_path), mock.patch.object(app, "run"):
        module = importlib.import_module(f"etfzoo.cli.{command.recipe}")
        module.run()
        beside = app.read_flags([command.recipe, *given])[1:]
        takes_files = app.run.call_args.kwargs.get("arguments", False)
        assert takes_files or not beside, beside
        if command.recipe in ("pretrain", "finetune"):
            lists = [
                n for n in ("learning_rate", "weight_decay") if isinstance(FLAGS[n].value, list)
            ]
            known = {name: FLAGS[name].value[0] for name in lists}
            known |= {"init": FLAGS.model} if command.recipe == "finetune" else {}
            configs.train_config(command.recipe, **known)
        elif command.recipe.startswith("table"):
            module.COMMAND.settings()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photographs, in which the commands run one after the other."""
    folder = tmp_path_factory.mktemp("reader")
    make_image_folder(folder / "photos", {"a": 50, "b": 50, "c": 50}, (40, 40), ".jpg")
    make_image_folder(folder, {"folder": 2})
    Image.new("RGB", (40, 50)).save(folder / "photo.jpg")
    (folder / "etfzoo/zoo").mkdir(parents=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("text", RUN.splitlines()[1:])
def test_the_commands_run(text, place, embedded_dir, small_network, monkeypatch):
    monkeypatch.chdir(place)
    (command,) = pages.of_script("", text)
    if not command.recipe:
        exec(command.words[2], {})
        return
    given = [
        re.sub("=(" + "|".join(MEANT) + ")$", lambda m: "=" + MEANT[m[1]], word)
        for word in command.arguments
    ]
    if command.recipe in ("pretrain", "finetune") and "--mode=linear_probe" not in given:
        given.append("--epochs=1")
    if command.recipe in ("pretrain", "finetune", "evaluate", "neural_collapse"):
        given.append(f"--data_dir={embedded_dir}")
    if "--num_virtual_devices=2" in given:  # TensorFlow takes them before it computes
        finish(command.recipe, start_recipe(command.recipe, *given, cwd=place))
    else:
        run_recipe(command.recipe, *given)


@pytest.mark.slow
def test_demo(tmp_path, small_network, monkeypatch):
    """With fewer epochs, and without the trained model."""
    for settings in (demo.PRETRAIN, demo.FINETUNE):
        monkeypatch.setitem(settings, "epochs", 1)
    monkeypatch.setitem(demo.FINETUNE, "eval_every", 1)
    monkeypatch.setattr(demo, "_trained_model", list)
    out = run_recipe("demo", "--workdir=demo_output", cwd=tmp_path)
    assert out.count("shapes/outlines  ") == 2 and 'etfzoo.load("rn18_etf.shapes") says' in out
    report = (tmp_path / "demo_output/report.html").read_text("utf-8")
    assert report.count("<img ") >= 7 and "unknown" not in report
