"""Which faults the tests find: `python -m benchmarks.mutation draw|run|report`.

    python -m benchmarks.mutation draw --label before --tree CHECKOUT      # needs cosmic-ray
    python -m benchmarks.mutation run --label before --tree CHECKOUT
    python -m benchmarks.mutation report

`draw` takes as many mutants from each of `mutants.MODULES` (places in the source at random, then one of
cosmic-ray's operators there; annotations and what does not compile left out) and writes them as text: the
lines before and after, their function, and which of the function's equal lines it is. By that a mutant is
found again in another checkout, whatever its file is called there; a second `draw` with another label
replaces those whose lines are gone.

`run` gives each mutant to the test files that import its module by name (without tests marked slow, or that
fail without a mutant), its own test file first, until one fails. A process that has imported torch, fairseq
and the like, but nothing of ours, forks for each. Runs on record are not done again.
"""

import ast
import contextlib
import importlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from benchmarks import mutants
from benchmarks.mutants import Mutant, candidates, path_in
from benchmarks.recorded import ROOT, SHARED
from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run

RESULTS = ROOT / "benchmarks" / "results"
MUTANTS = RESULTS / "mutation_mutants.jsonl"
RUNS = RESULTS / "mutation.jsonl"
VERDICTS = RESULTS / "mutation_survivors.jsonl"
# seconds on top of the time limit: a process that ends late is no fault
GRACE = 60.0
OURS = {"benchmarks", "diffusion_ext", "ext_common", "fairseq_ext", "tests"}
WARM = """ctranslate2 diffusers fairseq fairseq_cli.train hypothesis.strategies matplotlib.pyplot pytest
    sacrebleu scipy.stats sentencepiece sklearn.datasets soundfile torch torchaudio torchvision transformers
    """.split()


@dataclass
class Options:
    """What is mutated."""

    label: str = field(
        default="after", metadata={"help": "name of the checkout in the records: before, after"}
    )
    tree: str = field(
        default=str(ROOT), metadata={"help": "the checkout; it is copied, not changed"}
    )
    mutants: int = field(default=120, metadata={"help": "mutants in all, as many of each module"})
    seed: int = field(default=1, metadata={"help": "of the draw"})
    modules: list[str] = field(
        default_factory=lambda: list(mutants.MODULES), metadata={"help": "only mutants of these"}
    )
    patience: float = field(
        default=4.0, metadata={"help": "time limit, as a multiple of the tests' own time"}
    )
    folder: Optional[str] = field(
        default=None, metadata={"help": "for the copy; none: the system's temporary folder"}
    )


def importing(tree: Path, module: str) -> list[str]:
    """The test files that import a module by its name, its own first."""
    dotted = ".".join(path_in(tree, module).with_suffix("").parts)
    package, _, name = dotted.rpartition(".")

    def imports(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(alias.name == dotted for alias in node.names)
        return isinstance(node, ast.ImportFrom) and (
            node.module == dotted
            or (node.module == package and any(alias.name == name for alias in node.names))
        )

    files = [
        file.relative_to(tree)
        for file in sorted((tree / "tests").rglob("test_*.py"))
        if any(map(imports, ast.walk(ast.parse(file.read_text()))))
    ]
    return list(map(str, sorted(files, key=lambda f: not f.stem.startswith(f"test_{module}"))))


def draw(options: Options) -> None:
    """Record the mutants of a checkout, as far as those on record are not in it."""
    tree, share = Path(options.tree), options.mutants // len(mutants.MODULES)
    known = [Mutant.of(record) for record in read(MUTANTS)]
    for module in options.modules:
        source = (tree / path_in(tree, module)).read_text()
        mine = [mutant for mutant in known if mutant.module == module]
        here = [mutant for mutant in mine if mutant.line(source) is not None]
        order = random.Random(f"{options.seed} {module}")
        fresh = (m for m in candidates(source, module, order) if m not in mine)
        drawn = list(itertools.islice(fresh, share - len(here)))
        for mutant in drawn:
            write(MUTANTS, {"drawn_from": options.label, **asdict(mutant)})
        print(f"{module}: {len(here)} found again, {len(drawn)} drawn", flush=True)


def run_all(options: Options) -> None:
    """Run the mutants that are in a checkout and not on record."""
    done = {Mutant.of(r) for r in read(RUNS) if r["label"] == options.label and "killed" in r}
    wanted = [Mutant.of(r) for r in read(MUTANTS) if r["drawn_from"] in ("before", options.label)]
    wanted = [mutant for mutant in wanted if mutant.module in options.modules]
    warm_up()
    with tempfile.TemporaryDirectory(prefix="mutation_", dir=options.folder) as folder:
        bench = Bench(Path(options.tree), Path(folder), options)
        for mutant in progress(wanted, "mutants", "mutants"):
            if mutant not in done and mutant.line(bench.source(mutant.module)) is not None:
                write(RUNS, {"label": options.label, **asdict(mutant), **bench.try_out(mutant)})


class Bench:
    """A copy of a checkout in which one module at a time is changed."""

    def __init__(self, tree: Path, folder: Path, options: Options) -> None:
        self.copy, self.temporary, self.options = folder / "copy", folder / "tmp", options
        left_out = shutil.ignore_patterns(".git", ".venv", "*_cache", ".hypothesis", "__pycache__")
        shutil.copytree(tree, self.copy, ignore=left_out, symlinks=True)
        self.files = {
            r["file"]: r for r in read(RUNS) if r["label"] == options.label and "file" in r
        }
        self.edits = 0

    def source(self, module: str) -> str:
        return (self.copy / path_in(self.copy, module)).read_text()

    def try_out(self, mutant: Mutant) -> dict:
        """Whether tests kill the mutant, which, and in how many seconds."""
        files = [self.unchanged(file) for file in importing(self.copy, mutant.module)]
        files.sort(key=lambda f: (not is_own(f["file"], mutant.module), f["seconds"]))
        path, source = self.copy / path_in(self.copy, mutant.module), self.source(mutant.module)
        limit = GRACE + self.options.patience * sum(file["seconds"] for file in files)
        failing = [test for file in files for test in file["failed"]]
        try:
            self.write(path, mutant.apply(source))
            report = self.pytest([f["file"] for f in files], failing, limit, "-x")
        finally:
            self.write(path, source)
        return {
            "file_line": mutant.line(source) + 1,
            "killed": report["how"] != "passed",
            "how": report["how"],
            "test": report["failed"][0] if report["failed"] else None,
            "seconds": report["seconds"],
        }

    def unchanged(self, file: str) -> dict:
        """What a test file says of the code as it is, from the records or tried now."""
        if file not in self.files:
            report = self.pytest([file], [], 1800)
            if report["how"] not in ("passed", "failed", "empty"):
                log = self.copy.with_name("report.log").read_text()[-2000:]
                raise UserError(f"{file} without a mutant: {report['how']}\n{log}")
            record = {key: report[key] for key in ("tests", "failed", "seconds")}
            self.files[file] = {"label": self.options.label, "file": file, **record}
            write(RUNS, self.files[file])
        return self.files[file]

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Python takes compiled code for current by size and whole seconds
        self.edits += 1
        os.utime(path, (self.edits, self.edits))

    def pytest(self, files: list[str], without: list[str], limit: float, *flags: str) -> dict:
        """Run test files in a fork; how it ended, tests that failed, their number and the seconds."""
        report = self.copy.parent / "report.json"
        report.unlink(missing_ok=True)
        # without what a project's own options may start, such as workers that import everything anew
        arguments = [
            "-o",
            "addopts=--import-mode=importlib",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            *flags,
            *files,
        ]
        arguments += [f"--deselect={test}" for test in without]
        arguments += [f"--basetemp={self.temporary}"]
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            in_child(self.copy, arguments, report)
        how = wait(pid, limit)
        seconds = round(time.monotonic() - began, 1)
        shutil.rmtree(self.temporary, ignore_errors=True)
        found = json.loads(report.read_text()) if report.exists() else {"failed": [], "tests": 0}
        return {"how": how, "seconds": seconds, **found}


def is_own(file: str, module: str) -> bool:
    return Path(file).stem.startswith(f"test_{module}")


def wait(pid: int, limit: float) -> str:
    """passed, failed, timeout or what else ended the tests, of which nothing is left running."""
    end = time.monotonic() + limit
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if ended[0] == 0:
        os.waitpid(pid, 0)
        return "timeout"
    code = os.waitstatus_to_exitcode(ended[1])
    return {0: "passed", 1: "failed", 2: "failed", 5: "empty"}.get(code, f"exit {code}")


def in_child(copy: Path, arguments: list[str], report: Path) -> None:
    """pytest in this process, which never comes back."""
    code = 99
    try:
        os.setsid()
        output = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        # spawned workers would import the parent's
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.chdir(copy)
        sys.argv = ["pytest"]
        sys.path[:] = [
            str(copy),
            *(p for p in sys.path if p and not (Path(p) / "ext_common").is_dir()),
        ]
        os.environ.update(PYTHONPATH=str(copy), FAIRSEQ_EXT_DATA=str(SHARED.resolve()))
        import pytest

        seen = Failures(report)
        code = int(pytest.main(arguments, plugins=[seen]))
        sys.stdout.flush()
    finally:
        os._exit(code)


class Failures:
    """A plugin of pytest that writes down which tests failed."""

    def __init__(self, report: Path) -> None:
        self.report, self.failed, self.tests = report, [], 0

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.note(report.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests += report.when == "call"
        if report.failed:
            self.note(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.save()

    def note(self, test: str) -> None:
        self.failed.append(test)
        self.save()

    def save(self) -> None:
        self.report.write_text(json.dumps({"failed": self.failed, "tests": self.tests}))


def warm_up() -> None:
    """Import what tests import, but nothing of ours; the logger stays as it is."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    root.setLevel(level)
    root.handlers[:] = handlers


def report(_: Options) -> None:
    """Print the table: killed of run, before and after, by module; survivors with their verdicts."""
    runs = [record for record in read(RUNS) if "killed" in record]
    verdicts = {Mutant.of(record): record for record in read(VERDICTS)}
    labels = list(dict.fromkeys(record["label"] for record in runs))
    print("| module |", " | ".join(labels), "|\n| --- |", " | ".join("---" for _ in labels), "|")
    for module in [*mutants.MODULES, "all"]:
        cells = []
        for label in labels:
            mine = [r for r in runs if r["label"] == label and module in (r["module"], "all")]
            cells.append(f"{sum(r['killed'] for r in mine)} of {len(mine)}")
        print(f"| {module} |", " | ".join(cells), "|")
    for record in runs:
        if not record["killed"]:
            verdict = verdicts.get(Mutant.of(record), {"verdict": "not looked at", "why": ""})
            change = " → ".join(" ".join(s.strip() for s in record[k]) for k in ("before", "after"))
            print(f"{record['label']} {record['module']} {record['function']}: {change}")
            print(f"    {verdict['verdict']}: {verdict['why']}")


def read(path: Path) -> list[dict]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, record: dict) -> None:
    """Add a record."""
    with open(path, "a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv):
    """The command."""
    steps = {"draw": draw, "run": run_all, "report": report}
    parser = Parser(prog="python -m benchmarks.mutation", description=__doc__)
    parser.add_argument("step", choices=steps, help="what to do")
    add_dataclass(parser, Options)
    args = parser.parse_args(argv)
    steps[args.step](from_args(Options, args))


if __name__ == "__main__":
    run(main)
