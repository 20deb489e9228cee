"""Tests of the packaging: version, Bazel targets and the contents of a wheel."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from etfzoo.version import __version__
from etfzoo.zoo import index
from testing import fresh_python

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def _copy_of_the_package(target: Path) -> Path:
    """Copies what a wheel is built from, so that the build leaves nothing in the checkout."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    shutil.copytree(
        ROOT / "etfzoo", target / "etfzoo", ignore=shutil.ignore_patterns("__pycache__")
    )
    # What a checkout has and a wheel must not.
    (target / "saved_models/rn18_etf.here/1/variables").mkdir(parents=True)
    (target / "saved_models/rn18_etf.here/1/saved_model.pb").touch()
    (target / "saved_models/rn18_etf.here/1/variables/variables.index").touch()
    return target


def _evaluate_build_file() -> dict[str, list[dict]]:
    """Calls in BUILD by name of the rule. The file is in the part of Starlark that is Python."""
    calls = {}

    def record(rule):
        return lambda *args, **kwargs: calls.setdefault(rule, []).append(kwargs)

    def glob(patterns, allow_empty=False):
        files = [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)]
        assert files or allow_empty, patterns
        return sorted(files)

    rules = ("exports_files", "filegroup", "licenses", "load", "package")
    rules += ("py_binary", "py_library", "py_test")
    exec((ROOT / "BUILD").read_text("utf-8"), {r: record(r) for r in rules} | {"glob": glob})
    return calls


def test_setup_py_has_the_version_of_the_package():
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    assert version == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_installed_metadata_has_the_version_of_the_package():
    try:
        installed = importlib.metadata.version("etfzoo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("etfzoo is not installed here")
    assert installed == __version__


def test_build_has_a_binary_for_each_recipe():
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"recipe.py"}
    binaries = {binary["name"]: binary["srcs"] for binary in _evaluate_build_file()["py_binary"]}
    assert binaries == {name.removesuffix(".py"): [f"recipes/{name}"] for name in recipes}


def test_build_has_a_test_for_each_test_file():
    tests = {path.name.removesuffix(".py") for path in (ROOT / "tests").rglob("*_test.py")}
    assert {test["name"] for test in _evaluate_build_file()["py_test"]} == tests


def test_files_in_build_exist():
    calls = _evaluate_build_file()
    targets = [call for rule in calls.values() for call in rule if "name" in call]
    names = {target["name"] for target in targets}
    assert len(names) == len(targets), "two targets of one name"
    for target in targets:
        for label in target.get("srcs", []) + target.get("deps", []) + target.get("data", []):
            if label.startswith(":"):
                assert label[1:] in names, f"{target['name']}: {label}"
            else:
                assert (ROOT / label).is_file(), f"{target['name']}: {label}"


@pytest.fixture(scope="module")
def source_and_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = _copy_of_the_package(folder / "source")
    entry = {"sha256": "0" * 64, "size": 1}
    names = ["saved_model.pb", "variables/variables.index"]
    names += ["assets.extra/etfzoo.json", "assets.extra/files.json"]
    published = {"urls": [], "files": dict.fromkeys(names, entry), "metrics": {}, "created": None}
    row = {"dataset": "x", "num_classes": 2, "input_shape": [32, 32, 3], "command": "make"}
    row |= {"metrics": {}, "licence": None}
    index.add(source / "etfzoo/zoo/index.json", "rn18_etf.here", 1, row, published)
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["--disable-pip-version-check", "--wheel-dir", str(folder), str(source)],
        env=os.environ | {"PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_a_wheel_loads_published_models_offline_in_another_folder(source_and_wheel, tmp_path):
    """No checkout is near: the names are those of the wheel's own index and of the cache."""
    import etfzoo
    from testing import randomize

    model = randomize(etfzoo.build_classifier("rn18", 5, input_shape=(32, 32, 3)))
    etfzoo.publish(model, tmp_path / "cache/rn18_etf.x")
    with zipfile.ZipFile(source_and_wheel[1]) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import etfzoo, numpy\n"
        "print(etfzoo.__file__)\n"
        "print(etfzoo.list_models())\n"
        "x = numpy.full((1, 40, 50, 3), 100, numpy.uint8)\n"
        "model = etfzoo.load('rn18_etf.x')\n"
        "print(model(etfzoo.preprocess(model, x)).shape)\n"
        "print(etfzoo.load('rn18_etf.x', num_classes=37).output_shape)\n"
        "print(etfzoo.load('rn18_etf.x', head=None).output_shape)\n"
        "for name in ('rn101_etf.in1k', 'rn18_etf.here'):\n"
        "    try: etfzoo.load(name)\n"
        "    except etfzoo.EtfzooError as e: print(e)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "ETFZOO_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | environment | {"ETFZOO_OFFLINE": "1", "ETFZOO_INDEX": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path / "site"))
    assert "'rn18_etf.x'" in lines[1] and "'rn50_sw.in1k'" in lines[1]
    assert lines[2:5] == ["(1, 5)", "(None, 37)", "(None, 512)"]
    assert "train them with `python recipes/pretrain.py --backbone=rn101 --head=etf`" in lines[5]
    assert lines[6].startswith(
        f"the weights of rn18_etf.here@1 are not in {tmp_path}/cache/rn18_etf"
    )
    assert "saved_models/ of its source repository and in no wheel: copy" in lines[6]
    assert len(lines) == 7


def test_what_the_extra_train_is_for(tmp_path):
    """Without its packages: layers, load, predict and publish; the rest names it in one line."""
    packages = {re.split(r"\W", line)[0] for line in EXTRAS["train"]}
    modules = {name: name for name in packages} | {"scikit-learn": "sklearn"}
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(modules[name] for name in packages)}))\n"
        "import etfzoo, numpy\n"
        "from testing import run_recipe\n"
        "model = etfzoo.build_classifier('rn18', 3, input_shape=(32, 32, 3))\n"
        "etfzoo.layers.ETFClassifier(3), etfzoo.layers.SwitchableWhitening()\n"
        "folder = etfzoo.publish(model, 'rn18_etf.a')\n"
        "pixels = etfzoo.preprocess(model, numpy.zeros((2, 40, 50, 3), numpy.uint8))\n"
        "assert numpy.array_equal(model(pixels), etfzoo.load(folder)(pixels))\n"
        "etfzoo.data.load('shapes/outlines', 'test', image_size=32, data_dir='data')\n"
        "from PIL import Image\n"
        "Image.new('RGB', (40, 50)).save('a.png')\n"
        "assert 'a.png  ' in run_recipe('predict', '--model=rn18_etf.a', 'a.png')\n"
        "publish = '--model=rn18_etf.a', '--name=rn18_etf.b', '--licence=CC0', '--models_dir=b'\n"
        "assert 'published b/rn18_etf.b/1' in run_recipe('publish', *publish)\n"
        "for name in ('callbacks', 'neural_collapse'):\n"
        "    try: getattr(etfzoo, name)\n"
        "    except ImportError as error: print(f'{type(error).__name__}: {error}')\n"
        "data = '--data_dir=data'\n"
        "for command, *flags in (\n"
        "    ('pretrain', '--dataset=shapes/source', '--protocol=quickstart', data),\n"
        "    ('finetune', '--model=rn18_etf.a', '--dataset=digits', data),\n"
        "    ('finetune', '--model=rn18_etf.a', '--dataset=digits', '--mode=linear_probe', data),\n"
        "    ('evaluate', '--model=rn18_etf.a', '--dataset=digits', data),\n"
        "    ('table1', '--quick'),\n"
        "    ('demo',),\n"
        "):\n"
        "    print(run_recipe(command, *flags, code=2).splitlines()[-1])\n"
    )
    printed = fresh_python(
        f"import os; os.chdir({str(tmp_path)!r})\nos.mkdir('data')\n{code}"
    ).splitlines()
    assert len(printed) == 8
    for line in printed:
        assert re.fullmatch(
            r"(error|NotInstalled): (scipy|matplotlib) is not installed: "
            r"pip install 'etfzoo\[train\]'",
            line,
        )
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b", "data", "rn18_etf.a"]


def _imports(tree, extra=None):
    """Modules that a file imports, each with the extra that its import names, if it does."""
    for node in ast.iter_child_nodes(tree):
        inner = extra
        if isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith("extra("):
            inner = node.items[0].context_expr.args[0].value
        if isinstance(node, ast.Import):
            yield from ((alias.name, extra) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, extra
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node, inner)


def test_imports_name_the_extra_that_brings_them():
    brought = dict.fromkeys(("matplotlib", "sklearn", "scipy", "tensorboard"), "train")
    brought |= {"huggingface_hub": "hf", "libtpu": "tpu-check"}
    seen = set()
    for path in (ROOT / "etfzoo").rglob("*.py"):
        for module, extra in _imports(ast.parse(path.read_text("utf-8"))):
            package = module.partition(".")[0]
            if package in brought:
                seen.add(package)
                assert extra == brought[package], f"{path}: {module}"
    assert seen == brought.keys()


def test_all_of_the_extras_are_tested():
    """What the suite would skip without its package is in the environment that CI installs."""
    tested = EXTRAS["test"] + EXTRAS["train"]
    for name in ("jax", "hf", "onnx", "openvino"):
        assert set(EXTRAS[name]) <= set(tested)
    assert "'.[cpu,train,test]'" in (ROOT / "Makefile").read_text("utf-8")


def test_wheel_has_all_modules_and_the_index(source_and_wheel):
    source, wheel = source_and_wheel
    assert wheel.name == f"etfzoo-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        requirements = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    modules = {str(path.relative_to(source)) for path in (source / "etfzoo").rglob("*.py")}
    assert packed == modules | {"etfzoo/py.typed", "etfzoo/zoo/index.json"}
    # Extras bring TensorFlow and what trains, never the package itself.
    always = " ".join(line for line in requirements if "extra ==" not in line)
    assert "tensorflow-datasets" in always and "tensorflow-cpu" in " ".join(requirements)
    for name in ("tensorflow", "tensorflow-cpu", *EXTRAS["train"]):
        assert not re.search(rf"Requires-Dist: {name}\b(?!-)", always), name
