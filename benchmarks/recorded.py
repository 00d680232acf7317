"""Trainings from recipes, each recorded once: what the table scripts of this folder have in common."""

import copy
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

from ext_common.manifest import atomic_json

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FAIRSEQ_EXT_DATA") or ROOT.parent / "shared" / "data")


def changed_recipe(path: Path, changes: dict[str, Any]) -> dict:
    """The recipe in a YAML file with changes: ``{"common.seed": 2}``, or a section whole."""
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


def is_recorded(path: Path, digest: str) -> bool:
    """Whether a result of this recipe is in the file."""
    return path.exists() and json.loads(path.read_text())["recipe_sha256"] == digest


def train(config: dict, data: Path, digest: str, folder: Path, models: Path) -> dict:
    """Train from a recipe in ``folder``; returns wall and CPU seconds of the whole process.

    models: the folder of the model groups in the recipe's ``defaults:``.
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
    """Write ``folder``/recipe.yaml and run the command, unless that was done; returns seconds."""
    done = folder / "train.json"
    if is_recorded(done, digest):
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


def run(command: list, log: Path) -> float:
    """Run on one thread with its output in `log`; CPU seconds of the process and its children."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "w") as f:
        child = subprocess.Popen(
            [str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"error: {command[0]} failed, see {log}")
    return usage.ru_utime + usage.ru_stime
