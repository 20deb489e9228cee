"""Tables of images: the same data set as folders of classes, and one line for what is wrong."""

import csv
import os
import random

import pytest

import etfzoo
from etfzoo.data import sources
from etfzoo.data.source import Places
from etfzoo.errors import EtfzooError
from testing import leftovers, make_image_folder, run_recipe

ROLES = ("train", "fit", "select", "test")


def write(table, rows, header=("path", "label"), **dialect):
    """Writes a table with Python's csv module; returns the name of its data set."""
    with open(table, "w", newline="", encoding=dialect.pop("encoding", "utf-8")) as file:
        csv.writer(file, **dialect).writerows([header, *rows])
    return f"csv:{table}"


def listed(root, splits=False):
    """The rows of a folder of images, in a drawn order."""
    rows = []
    for path in sorted(root.rglob("*.png")):
        parts = path.relative_to(root).parts
        rows.append(("/".join(parts), parts[splits], *parts[:splits]))
    random.Random(0).shuffle(rows)
    return rows


def columns(source, split, shuffle_seed=None, places=Places()):  # noqa: B008
    return list(source.records(split, shuffle_seed, places=places).as_numpy_iterator())


def names(source, split):
    return [os.fsdecode(record["record"]) for record in columns(source, split)]


def assert_same_data(table, folder):
    table, folder = sources.resolve(table), sources.resolve(folder)
    assert table.fingerprint() == folder.fingerprint()
    for role in ROLES:
        for seed in (None, 3):
            assert columns(table, role, seed) == columns(folder, role, seed)


def test_the_same_data_set_as_a_folder_of_classes(tmp_path):
    make_image_folder(tmp_path, {"b": 11, "a": 20, "a/deep": 2, "a b": 7, "é, ü": 5})
    rows = [(path, path.split("/")[0]) for path, _ in listed(tmp_path)]
    assert_same_data(write(tmp_path / "labels.csv", rows), f"folder:{tmp_path}")


@pytest.mark.parametrize(
    "splits", [("train", "val", "test"), ("train", "valid"), ("train", "test")]
)
def test_the_same_data_set_as_folders_of_splits(splits, tmp_path):
    for split in splits:
        make_image_folder(tmp_path / split, {"a": 6, "b": 9 if split == "train" else 3})
    header = ("path", "label", "split")
    rows = listed(tmp_path, splits=True)
    assert_same_data(write(tmp_path / "labels.csv", rows, header), f"folder:{tmp_path}")


@pytest.fixture
def photos(tmp_path):
    make_image_folder(tmp_path, {"a": 5, "b": 5})
    return tmp_path


def test_what_programs_write(photos):
    rows = listed(photos)
    plain = sources.resolve(write(photos / "plain.csv", rows)).fingerprint()
    others = {
        "bom.csv": {"encoding": "utf-8-sig"},
        "quoted.csv": {"quoting": csv.QUOTE_ALL},
        "unix.csv": {"lineterminator": "\n"},
        "mac.csv": {"lineterminator": "\r"},
    }
    for name, dialect in others.items():
        assert sources.resolve(write(photos / name, rows, **dialect)).fingerprint() == plain, name
    lines = [f"{number}, {label} , ./x/../{path}" for number, (path, label) in enumerate(rows)]
    (photos / "loose.csv").write_text("\n,,\n".join(["id, label ,path", *lines]) + "\n\n")
    assert sources.resolve(f"csv:{photos}/loose.csv").fingerprint() == plain
    absolute = [(photos / path, label) for path, label in rows]
    assert sources.resolve(write(photos / "absolute.csv", absolute)).fingerprint() == plain


def test_a_table_beside_the_working_directory(photos, monkeypatch):
    write(photos / "labels.csv", [(photos / path, label) for path, label in listed(photos)])
    found = sources.resolve(f"csv:{photos}/labels.csv").fingerprint()
    monkeypatch.chdir(photos)
    assert sources.resolve("csv:labels.csv").fingerprint() == found
    assert len(columns(sources.resolve("csv:labels.csv"), "all")) == 10
    monkeypatch.setenv("HOME", str(photos))
    assert sources.resolve("csv:~/labels.csv").fingerprint() == found


def test_labels_that_are_numbers_count(photos):
    make_image_folder(photos, {"more": 14})
    rows = [(f"more/{i:03d}.png", i % 12) for i in range(14)]
    name = write(photos / "labels.csv", rows + [(f"a/00{i}.png", i) for i in range(5)])
    assert etfzoo.data.class_names(name) == tuple(map(str, range(12)))
    source = sources.resolve(name)
    wanted = {path: int(label) for path, label in rows}
    for record in columns(source, "all"):
        if record["record"].startswith(b"more"):
            assert record["label"] == wanted[record["record"].decode()]
    mixed = write(photos / "mixed.csv", [(path, f"{label}x") for path, label in rows])
    assert etfzoo.data.class_names(mixed)[:4] == ("0x", "10x", "11x", "1x")


def test_names_that_are_not_utf_8(photos):
    odd = os.fsdecode(b"a/caf\xe9.png")
    os.rename(photos / "a" / "000.png", photos / odd)
    name = write(photos / "labels.csv", [], lineterminator="\n")
    rows = [f"{path},{label}" for path, label in [*listed(photos)]]
    (photos / "labels.csv").write_bytes(os.fsencode("\n".join(["path,label", *rows])))
    assert odd in names(sources.resolve(name), "all")
    (photos / "labels.csv").write_bytes(b"path,label\na/001.png,\xe9\nb/001.png,b\n")
    with pytest.raises(EtfzooError, match="is not UTF-8: rename it"):
        sources.resolve(name)


def test_workers_share_an_epoch(photos):
    source = sources.resolve(write(photos / "labels.csv", listed(photos)))
    whole = columns(source, "train", 7)
    parts = [columns(source, "train", 7, Places(0, 8, 4, i, 2)) for i in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    shared = parts[0][:2] + parts[1][:2] + parts[0][2:] + parts[1][2:]
    assert [r["record"] for r in shared] == [r["record"] for r in whole]


HEAD = "path,label\na/000.png,a\nb/000.png,b\n"
SPLIT = "path,label,split\na/000.png,a,train\nb/000.png,b,train\n"
BAD = {
    "empty": ("", "first line of .*labels.csv must name the columns path, label .*; got ''"),
    "no header": ("a/000.png,a\n", "must name the columns path, label .*; got 'a/000.png,a'"),
    "semicolons": (HEAD.replace(",", ";"), "with commas between them; got 'path;label'"),
    "two labels": ("path,label,label\n", "must name the columns"),
    "UTF-16": (HEAD.encode("utf-16"), "must name the columns"),
    "no rows": ("path,label\n", r"no images in .*labels.csv \(train\): expected a row for each"),
    "one class": ("path,label\na/000.png,a\n", "needs at least two labels.*; found 1"),
    "missing": (HEAD + "a/x.png,a\n", "labels.csv lists 1 images that do not exist in .*: a/x.png"),
    "many": (
        HEAD + "".join(f"a/{i}.png,a\n" for i in range(5)),
        r"lists 5 images that do not exist in .*: a/0.png, a/1.png, a/2.png, \.\.\.",
    ),
    "a folder": (HEAD + "a,a\n", "or are no files: a$"),
    "a FIFO": (HEAD + "fifo.png,a\n", "or are no files: fifo.png"),
    "a null": (HEAD + "a/\0.png,a\n", r"or are no files: a/\\x00.png"),
    "a long name": (HEAD + "x" * 300 + ",a\n", "or are no files: xxx"),
    "twice": (HEAD + "a/../a/000.png,b\n", "lists a/000.png twice, in lines 2 and 4"),
    "outside": (HEAD + "../x.png,a\n", r"labels.csv, line 4: \.\./x.png is outside of the folder"),
    "in detours": (HEAD + "a/../../x.png,a\n", "x.png is outside of the folder"),
    "absolute": (HEAD + "/etc/passwd,a\n", "line 4: /etc/passwd is outside of the folder"),
    "no label": (HEAD + "a/001.png, \n", "line 4 has no label"),
    "no path": (HEAD + ",a\n", "line 4 has no path"),
    "a comma": (HEAD + "a/a,b.png,a\n", "line 4 has 3 fields, and the first line 2: quote"),
    "short": (HEAD + "a/001.png\n", "line 4 has 1 fields, and the first line 2"),
    "a quote": (HEAD + '"a/001.png,a\n', "labels.csv, line 4 is no CSV: unexpected end of data"),
    "a huge field": (HEAD + "x" * 200_000 + ",a\n", "line 4 is no CSV: field larger than"),
    "another split": (SPLIT + "a/001.png,a,dev\n", "line 4 has the split 'dev'; known: train, val"),
    "no split": (SPLIT + "a/001.png,a,\n", "line 4 has the split ''; known: train"),
    "only test": (SPLIT.replace("train", "test"), "test split of .* has labels that the training"),
    "a new label": (SPLIT + "a/001.png,z,test\n", "the test split of .* has labels .* lacks: z"),
    "nothing to hold out": (HEAD, "no class has two images, so none can be held out"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_cannot_be_used(name, photos):
    content, message = BAD[name]
    os.mkfifo(photos / "fifo.png")
    table = photos / "labels.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EtfzooError, match=message) as error:
        sources.resolve(f"csv:{table}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_tables_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.csv")
    for name, message in {
        "none.csv": "No such file",
        "fifo.csv": "it is no regular file",
        "": "is no path",
        ".": "cannot be read",
        "a\0b": "is no path",
    }.items():
        with pytest.raises(EtfzooError, match=message):
            sources.resolve(f"csv:{tmp_path / name if name.endswith('csv') else name}")


def test_unknown_split(photos):
    source = sources.resolve(write(photos / "labels.csv", listed(photos)))
    with pytest.raises(EtfzooError, match="labels.csv has no split 'val'; it has: train, test"):
        source.size("val")


@pytest.mark.slow
@pytest.mark.small_rn18
def test_it_trains_and_is_evaluated(photos, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    name = write(photos / "labels.csv", listed(photos))
    flags = (f"--dataset={name}", "--batch_size=4")
    small = ("--protocol=quickstart", "--epochs=1", "--learning_rate=0.01")
    place = (f"--workdir={runs}/a", "--backbone=rn18", "--image_size=32")
    run_recipe("pretrain", *flags, *small, *place)
    run_recipe("finetune", f"--model={runs}/a", *flags, *small, f"--workdir={runs}/b")
    report = f"--output={runs}/report"
    out = run_recipe("evaluate", f"--model={runs}/b", f"--dataset={name}", report)
    assert "on 2 images" in out
    out = run_recipe("predict", f"--model={runs}/b", photos / "a" / "000.png")
    assert "000.png" in out and "a " in out
    assert sorted(leftovers(photos)) == ["a", "b", "labels.csv"]
    batches = etfzoo.data.load(name, "test", etfzoo.load(runs / "b"), batch_size=2)
    assert batches.class_names == ("a", "b")
    ((images, labels),) = batches
    assert images.shape == (2, 32, 32, 3) and labels.numpy().tolist() == [0, 1]
