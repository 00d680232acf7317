"""Trainings of translation models from recipes, averaged, scored and recorded: what its tables share."""

import json
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.common import machine
from benchmarks.recorded import Results, changed_recipe, digest_of, run, train
from ext_common.manifest import sha256_file, versions
from fairseq_ext.translation.score.scoring import score
from fairseq_ext.translation.text.normalise import read_lines

AVERAGED = 5
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Runs:
    """results: what is recorded; configs: folder of the recipes; work: of what is trained.

    best_of: the average is used only where it translates valid better than the best checkpoint.
    """

    results: Results
    configs: Path
    work: Path
    best_of: bool = False

    def do(self, wanted: Mapping[str, tuple[str, dict, Path]], jobs: int) -> None:
        """Do what is not recorded of name → (recipe, changes, DATA), `jobs` at a time."""
        with ThreadPoolExecutor(jobs) as pool:
            done = [pool.submit(self.one, name, *what) for name, what in wanted.items()]
        for one in done:
            one.result()

    def model(self, name: str, recipe: str, changes: dict, data: Path) -> Path:
        """The averaged model of one run, trained again where only its result is left."""
        average = self.work / name / "checkpoints" / "average.pt"
        self.one(name, recipe, changes, data, again=not average.exists())
        return average

    def one(
        self, name: str, recipe: str, changes: dict, data: Path, *, again: bool = False
    ) -> None:
        """Train, average, translate and score one run, unless that is recorded.

        again: train and average what is recorded, too.
        """
        config = changed_recipe(self.configs / f"{recipe}.yaml", changes)
        corpus = json.loads((data / "corpus.json").read_text())
        model = self.configs / "model" / f"{config['defaults'][0]['model']}.yaml"
        source, target = direction(config, corpus)
        digest = digest_of(config, model.read_text(), corpus["split_sha256"], *extra(data))
        recorded = self.results.has(name, digest)
        if recorded and not again:
            print(f"{name}: done before", flush=True)
            return
        folder = self.work / name
        trained = train(config, data, digest, folder, self.configs / "model")
        checkpoints = folder / "checkpoints"
        average = [*python("translation.average"), checkpoints, "--last", str(AVERAGED)]
        average += ["--best-of"] if self.best_of else []
        run([*average, "--output", checkpoints / "average.pt"], folder / "average.log")
        if recorded:
            return
        result = {"run": name, "date": date.today().isoformat(), "recipe_sha256": digest}
        result.update(trained, threads=1, machine=machine(), recipe=config)
        result["parameters"] = parameters(checkpoints)
        result["split_sha256"] = corpus["split_sha256"]
        for subset in ("valid", "test"):
            result[subset] = evaluate(folder, data, subset, source, target)
            references = data / "text" / f"{subset}.{target}"
            result[subset]["reference_sha256"] = sha256_file(references)
        self.results.put({**result, "versions": versions()})
        scores = f"BLEU {result['test']['bleu']:.1f}, chrF {result['test']['chrf']:.1f}"
        print(f"{name}: {scores}, {result['cpu_seconds']:.0f} CPU s", flush=True)


def direction(config: dict, corpus: dict) -> tuple[str, str]:
    """(source, target) of a recipe on a corpus."""
    task = config["task"]
    source, target = corpus["languages"]
    return task.get("source_lang") or source, task.get("target_lang") or target


def extra(data: Path) -> list[str]:
    """Hash of the training text where something was added to a bitext, which its split does not know."""
    manifest = json.loads((data / "manifest.json").read_text())
    if manifest.get("kind") != "assembled":
        return []
    return [sha256_file(path) for path in sorted((data / "text").glob("train.*"))]


def python(noun: str) -> list:
    return [sys.executable, "-m", f"fairseq_ext.{noun}"]


def evaluate(folder: Path, data: Path, subset: str, source: str, target: str) -> dict:
    """BLEU and chrF of the averaged model's translations with beam 5, and these translations."""
    with ONE_AT_A_TIME:
        output = folder / f"{subset}.{target}"
        path = folder / "checkpoints" / "average.pt"
        command = [*python("translation.translate"), data / "text" / f"{subset}.{source}", output]
        run([*command, "--path", path, "--beam", "5"], folder / f"translate-{subset}.log")
        lines = list(read_lines(output))
        references = list(read_lines(data / "text" / f"{subset}.{target}"))
        scores = score(lines, references, target)
    signatures = [scores.metrics[name].signature for name in ("bleu", "chrf")]
    found = {"bleu": scores.bleu, "chrf": scores.chrf, "signatures": signatures}
    return {**found, "translations": lines}


def parameters(checkpoints: Path) -> int:
    """Number of parameters, tied ones once."""
    from fairseq_ext.average import read

    state = read(checkpoints / "average.pt")["model"]
    # tensors of one element are marks of fairseq, no parameters
    sizes = {t.untyped_storage().data_ptr(): t.numel() for t in state.values() if t.numel() > 1}
    return sum(sizes.values())
