"""What was measured, a line a run, and trainings from recipes, each recorded once."""

import copy
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ext_common.manifest import atomic_json, atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The one place where data is looked for; docs/data.md says what lies there.
SHARED = Path(os.environ.get("FAIRSEQ_EXT_DATA") or ROOT.parent / "shared" / "data")


class Results:
    """A JSON-lines file of runs: one record a line, each named by its "run", in the order of the names."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def all(self) -> list[dict]:
        """Every record; none where there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def get(self, run: str) -> dict | None:
        """The record of one run."""
        return next((record for record in self.all() if record["run"] == run), None)

    def has(self, run: str, digest: str) -> bool:
        """Whether the run is recorded with this recipe."""
        record = self.get(run)
        return record is not None and record["recipe_sha256"] == digest

    def put(self, record: dict) -> None:
        """Add a record, or replace that of the same run; safe beside other processes and threads."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            others = [one for one in self.all() if one["run"] != record["run"]]
            with atomic_write(self.path) as file:
                for one in sorted([*others, record], key=lambda one: one["run"]):
                    file.write(json.dumps(one, ensure_ascii=False) + "\n")
        finally:
            os.close(folder)


def data_file(name: str) -> Path:
    """A file of the data; SystemExit with the remedy where it is not there."""
    path = SHARED / name
    if not path.exists():
        raise SystemExit(
            f"error: {path} is not there: set FAIRSEQ_EXT_DATA to the data's folder (docs/data.md)"
        )
    return path


def changed_recipe(path: Path, changes: dict[str, Any]) -> dict:
    """The recipe in a YAML file with changes: `{"common.seed": 2}`, or a section whole."""
    config = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, _, field = key.partition(".")
        if field:
            config.setdefault(section, {})[field] = value
        else:
            config[section] = value
    return config


def digest_of(*parts: Any) -> str:
    """What tells one recipe (and data) from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def train(config: dict, data: Path, digest: str, folder: Path, models: Path) -> dict:
    """Train from a recipe in `folder`; returns wall and CPU seconds of the whole process.

    models: the folder of the model groups in the recipe's `defaults:`.
    """
    config = copy.deepcopy(config)
    config["task"]["data"] = str(data)
    config["checkpoint"]["save_dir"] = str(folder / "checkpoints")
    program = Path(sys.executable).parent / "fairseq-hydra-train"
    command = [program, "--config-dir", folder, "--config-name", "recipe"]
    return train_by(command, config, digest, folder, models)


def train_by(
    command: list, config: dict, digest: str, folder: Path, models: Path | None = None
) -> dict:
    """Write `folder`/recipe.yaml and run the command, unless that was done; returns seconds."""
    done = folder / "train.json"
    if done.exists() and json.loads(done.read_text())["recipe_sha256"] == digest:
        return json.loads(done.read_text())
    # seconds are those of one process from the first update: a half-trained run begins again
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    if models:
        (folder / "model").symlink_to(models)
    start = time.time()
    usage = run(command, folder / "train.log")
    seconds = {"seconds": round(time.time() - start, 1), "cpu_seconds": round(usage, 1)}
    atomic_json(done, {"recipe_sha256": digest, **seconds})
    return json.loads(done.read_text())


def run(command: list, log: Path, threads: int | None = 1) -> float:
    """Run with its output in `log`, threads None as many as it takes itself; CPU seconds with children."""
    environment = dict(os.environ)
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(log, "w") as f:
        child = subprocess.Popen(
            [str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"error: {command[0]} failed, see {log}")
    return usage.ru_utime + usage.ru_stime
