"""Changes the package in small ways, one at a time: does a test of the fast suite fail?

  python benchmarks/mutation_testing.py --count=40 --seed=0 --only=etfzoo/training
  python benchmarks/mutation_testing.py --given --output=benchmarks/mutation_testing_given.log

A mutation swaps an operator, moves a constant, negates a condition, drops or exchanges arguments,
returns None or leaves out a statement; text, messages and type annotations stay. It is made in a
copy of the checkout, where the tests that may see it run until one fails: first the file that
mirrors the module, then those that import it, of its folder and of others, then the rest of its
folder. Slow tests are left out. At the end the tests that caught something must pass in a
copy that is not changed.

Each outcome is appended at once to a .jsonl beside the log: the same command goes on where it was
stopped. mutation_testing.json holds what is `given`, rows of a file and a text that occurs in it
once, and the mutations that are judged `equivalent`, with the reason; these are not drawn.
"""

import argparse
import ast
import copy
import dataclasses
import fcntl
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".json")
NOT_COPIED = (".git", ".venv", "__pycache__", "runs", ".pytest_cache", ".ruff_cache", ".build")

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# Names that stand for each other all too easily.
NAMES = {"fit": "train", "train": "fit", "select": "test", "test": "select"}
NAMES |= {"top1": "mean_per_class", "mean_per_class": "top1"}
# Calls whose arguments are for people.
MESSAGES = re.compile(r"(log\.\w+|print|notify|unknown|warnings\.warn|\w*(Error|Progress)|setting)")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """Other text between two bytes of a file.

    Attributes:
        file: relative to the checkout.
        line: from 1.
        start, end: bytes that are replaced by `text`.
        key: names it for ever: file, function, old and new code.
    """

    file: str
    line: int
    start: int
    end: int
    text: str
    key: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


class Finder(ast.NodeVisitor):
    """All mutations of a file."""

    def __init__(self, file, source: bytes):
        self.file, self.found, self.scope, self.keys = file, [], [], Counter()
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.visit(ast.parse(source))

    def add(self, node, new, how=None):
        """Another expression, or statement, in place of a node; `how` where it does not show."""
        text = new if isinstance(new, str) else ast.unparse(new)
        where = ".".join(self.scope)
        key = f"{self.file} {where}: {_short(ast.unparse(node))} -> {how or _short(text)}"
        self.keys[key] += 1
        key += f" #{self.keys[key]}" if self.keys[key] > 1 else ""
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        text = f"({text})" if isinstance(node, ast.expr) else text
        self.found.append(Mutation(self.file, node.lineno, start, end, text, key))

    def changed(self, node, how=None, **fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        self.add(node, new, how)

    def generic_visit(self, node):
        # A statement that is left out, if nothing that follows has to have a name by it.
        if isinstance(node, ast.Assign):
            named = any(isinstance(n, ast.Name | ast.Tuple) for n in node.targets)
        else:
            called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            named = not (called and not _is_message(node.value))
            named = named and not isinstance(node, ast.AugAssign | ast.Raise)
        if isinstance(node, ast.stmt) and not named:
            self.add(node, "pass")
        if not isinstance(node, ast.Raise):
            super().generic_visit(node)

    def _scoped(self, node, parts):
        self.scope.append(node.name)
        for part in parts:
            self.visit(part)
        self.scope.pop()

    def visit_FunctionDef(self, node):  # noqa: N802 - as ast has it
        defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
        self._scoped(node, [*defaults, *node.body])

    def visit_ClassDef(self, node):  # noqa: N802
        self._scoped(node, node.body)

    def visit_AnnAssign(self, node):  # noqa: N802
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node):  # noqa: N802
        pass

    def visit_Call(self, node):  # noqa: N802
        if _is_message(node):
            return
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                kept = node.keywords[:i] + node.keywords[i + 1 :]
                self.changed(node, f"without {keyword.arg}", keywords=kept)
        if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            first, second, *rest = node.args
            if ast.dump(first) != ast.dump(second):
                self.changed(node, "arguments exchanged", args=[second, first, *rest])
        self.generic_visit(node)

    def visit_Compare(self, node):  # noqa: N802
        for i, op in enumerate(node.ops):
            self.changed(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
        self.generic_visit(node)

    def visit_BinOp(self, node):  # noqa: N802
        if type(node.op) in SWAPS:
            self.changed(node, op=SWAPS[type(node.op)]())
        self.generic_visit(node)

    def visit_BoolOp(self, node):  # noqa: N802
        self.changed(node, op=SWAPS[type(node.op)]())
        self.generic_visit(node)

    def visit_UnaryOp(self, node):  # noqa: N802
        if isinstance(node.op, ast.Not):
            self.add(node, node.operand)
        self.generic_visit(node)

    def visit_If(self, node):  # noqa: N802
        self.add(node.test, ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    visit_IfExp = visit_If  # noqa: N815

    def visit_Return(self, node):  # noqa: N802
        if node.value is not None and not _is_none(node.value):
            self.add(node, "return None")
        self.generic_visit(node)

    def visit_Constant(self, node):  # noqa: N802
        value = node.value
        if isinstance(value, bool):
            self.add(node, repr(not value))
        elif isinstance(value, int):
            self.add(node, repr(value + 1))
            self.add(node, repr(value - 1))
        elif isinstance(value, float):
            self.add(node, repr(2 * value if value else 1.0))
        elif isinstance(value, str) and value in NAMES:
            self.add(node, repr(NAMES[value]))


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _is_message(call):
    return bool(MESSAGES.fullmatch(ast.unparse(call.func)))


def _short(code, width=70):
    code = " ".join(code.split())
    return code if len(code) <= width else f"{code[: width - 20]}...{code[-17:]}"


def drawn(only, count, seed, left_out) -> list[Mutation]:
    """Mutations of the files below some paths, evenly among all that there are."""
    found = []
    for path in sorted((ROOT / "etfzoo").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(tuple(only)):
            found += Finder(file, path.read_bytes()).found
    print(f"{len(found)} mutations to draw from", flush=True)
    random.Random(seed).shuffle(found)
    # After the draw, so that one that is left out gives its place to the next and changes no other.
    return [mutation for mutation in found if mutation.key not in left_out][:count]


def given(rows, only) -> list[Mutation]:
    """The mutations of the list; ends the program where one of them fits no more."""
    found = []
    for row in rows:
        if not row["file"].startswith(tuple(only)):
            continue
        source = (ROOT / row["file"]).read_text("utf-8")
        if source.count(row["find"]) != 1:
            sys.exit(
                f"{LIST.name}: {row['find']!r} is {source.count(row['find'])} x in {row['file']}"
            )
        before = source[: source.index(row["find"])]
        start = len(before.encode())
        key = f"{row['file']}: {_short(row['find'])} -> {_short(row['replace'])}"
        found.append(
            Mutation(
                row["file"], before.count("\n") + 1, start, start + len(row["find"].encode()),
                row["replace"], key,
            )
        )  # fmt: skip
    return found


def tests_of(file) -> list[str]:
    """The test files that may see a change of a module, likeliest first."""
    package, _, module = file.removesuffix(".py").rpartition("/")
    dotted = package.replace("/", ".")
    imports = re.compile(
        rf"{re.escape(dotted)}\.{module}\b|from {re.escape(dotted)} import [^\n]*\b{module}\b"
    )
    folder = Path("tests", package.removeprefix("etfzoo").strip("/"))
    ranked = []
    for path in sorted((ROOT / "tests").rglob("*_test.py")):
        path = path.relative_to(ROOT)
        imported = bool(imports.search((ROOT / path).read_text("utf-8")))
        mirrored = path == folder / f"{module}_test.py"
        near = path.parent == folder
        if mirrored or near or imported:
            ranked.append(((not mirrored, not imported, not near), path.as_posix()))
    return [path for _, path in sorted(ranked)]


class Checkout:
    """A copy of the checkout in which tests run.

    Args:
        folder: where it is made.
        limit: seconds of a run of tests.
        lock: path of a file that is locked meanwhile, or None.
    """

    def __init__(self, folder, limit, lock=None):
        self.folder, self.limit, self.lock = Path(folder) / "checkout", limit, lock
        self.output = Path(folder) / "output.txt"
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))

    def pytest(self, tests, *options):
        """Exit code (None: no end in time), output and CPU seconds."""
        arguments = ["-q", "--tb=no", "-rfE", "-m", "not slow", "-p", "no:cacheprovider"]
        with open(self.lock or self.output, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A process of its own, with TensorFlow as it was imported here: that takes seconds.
            process = os.fork()
            if not process:
                self._child([*arguments, *options, *tests])
            end = time.monotonic() + self.limit
            while not (done := os.wait4(process, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    os.killpg(process, signal.SIGKILL)
                    done = os.wait4(process, 0)
                    break
                time.sleep(0.1)
        _, status, usage = done
        code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        return code, self.output.read_text("utf-8"), usage.ru_utime + usage.ru_stime

    def _child(self, arguments):
        os.setsid()
        os.chdir(self.folder)
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.dont_write_bytecode = True  # of the same size and second, an old one would count
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.folder)}
        sys.path[0] = str(self.folder)
        code = 3  # pytest's, of an internal error
        try:
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def outcome(self, mutation, tests) -> dict:
        """What the tests say of a mutation; `tests` None are those of its file."""
        path = self.folder / mutation.file
        source = path.read_bytes()
        try:
            path.write_bytes(mutation.apply(source))
            code, output, seconds = self.pytest(tests or tests_of(mutation.file), "-x")
        finally:
            path.write_bytes(source)
        caught = re.findall(r"^(?:FAILED|ERROR) (\S+?::\S+|\S+)", output, re.M)
        if code == 0:
            outcome = "SURVIVED"
        elif code is None:
            outcome = "NO END"
        elif caught:
            outcome = "caught"
        else:  # not even the set-up of the tests
            outcome, caught = "caught", [_short(output.strip().splitlines()[-1])]
        return {
            "outcome": outcome,
            "by": caught[-1] if caught else "",
            "seconds": round(seconds, 1),
        }

    def failing(self, tests) -> set[str]:
        """Those of some tests that fail where nothing is changed."""
        tests = sorted({test for test in tests if "::" in test})
        if not tests:
            return set()
        _, output, _ = self.pytest(tests)
        return set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M))


def read_rows(path) -> dict[str, dict]:
    """Outcomes by key; of several the last."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def table(mutations, rows) -> str:
    """A line a mutation, and the sums."""
    lines, totals = [], Counter()
    for mutation in mutations:
        row = rows.get(mutation.key)
        if row is None:
            continue
        totals[row["outcome"]] += 1
        what = mutation.key.removeprefix(mutation.file).strip(" :")
        by = f" by {row['by']}" if row["by"] else ""
        lines.append(
            f"{mutation.file}:{mutation.line}: {what}: {row['outcome']}{by}, {row['seconds']} s"
        )
    sums = ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items()))
    return "\n".join([*lines, f"{len(lines)} mutations: {sums}", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--given", action="store_true", help="those of the list, not drawn ones")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="etfzoo/", help="beginnings of paths, with commas")
    parser.add_argument("--tests", help="paths of tests, with commas (default: see above)")
    parser.add_argument("--limit", type=int, default=900, help="seconds for a mutation's tests")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    parser.add_argument("--lock", help="file that is locked while the tests of a mutation run")
    parser.add_argument("--output", type=Path, default=LIST.with_suffix(".log"))
    args = parser.parse_args()
    known = json.loads(LIST.read_text("utf-8"))
    only = args.only.split(",")
    if args.given:
        mutations = given(known["given"], only)
    else:
        mutations = drawn(only, args.count, args.seed, known["equivalent"])
    journal = args.output.with_suffix(".jsonl")
    rows = read_rows(journal)
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    for module in ("tensorflow", "keras", "sklearn.linear_model", "matplotlib.figure"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(folder, args.limit, args.lock)
        for number, mutation in enumerate(mutations, 1):
            row = rows.get(mutation.key)
            if row is None or args.again and row["outcome"] != "caught":
                row = {"key": mutation.key} | checkout.outcome(
                    mutation, args.tests and args.tests.split(",")
                )
                with open(journal, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                rows[mutation.key] = row
                args.output.write_text(table(mutations, rows), "utf-8")
            print(
                f"{number}/{len(mutations)} {row['outcome']} {mutation.key} {row['by']}", flush=True
            )
        caught = {rows[m.key]["by"] for m in mutations if rows[m.key]["outcome"] == "caught"}
        broken = checkout.failing(caught)
    text = table(mutations, rows)
    if broken:
        text += f"These fail where nothing is changed, and have caught nothing: {sorted(broken)}\n"
    args.output.write_text(text, "utf-8")
    print(text.splitlines()[-1])
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
