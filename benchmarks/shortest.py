"""What the shortest commands reach: `python -m benchmarks.shortest [speaker translation diffusion minutes]`.

`fairseq-train DATA --user-dir … --task …` and nothing else but a seed and a folder for each, on one thread,
3 seeds a job, judged as the recipes of the job's own table are; and `--minutes 3` once a job, on all threads,
one at a time. One line of benchmarks/results/shortest.jsonl a run, written when it is done; a run that has
its line is not done again. `--report` only prints the table.
"""

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import machine
from benchmarks.diffusion import tables as diffusion
from benchmarks.pages import markdown, spread
from benchmarks.recorded import RESULTS, ROOT, Results, data_file, run
from benchmarks.speaker import tables as speaker
from benchmarks.speaker.protocols import prepare_libri
from benchmarks.translation import runs as translation
from ext_common.manifest import versions

RECORDED = Results(RESULTS / "shortest.jsonl")
SEEDS = (1, 2, 3)
MINUTES = 3
TASKS = {
    "speaker": ("fairseq_ext", "speaker_id"),
    "translation": ("fairseq_ext", "translation_spm"),
    "diffusion": ("diffusion_ext", "diffusion"),
}
# the runs of today's recipes: table, how their names begin, where the figure is
RECIPES = {
    "speaker": ("speaker_tables", "main-ours-", lambda r: 100 * r["libri251/test"]["top1"]),
    "translation": ("translation_tables", "noam-0.45-", lambda r: r["test"]["bleu"]),
    "diffusion": (
        "diffusion_tables",
        "digits-",
        lambda r: r["evaluation"]["metrics"]["frechet"]["ratio"],
    ),
}
FIGURES = {
    "speaker": "libri251, test top-1 %",
    "translation": "cmn-eng, test BLEU, average of the last 5",
    "diffusion": "digits in class folders, Fréchet distance × floor",
}


def prepare_bitext(work: Path) -> Path:
    """cmn-eng with the defaults."""
    data = work / "cmn-eng"
    if not (data / "manifest.json").exists():
        command = [*translation.python("translation.prepare"), data_file("cmn-eng/cmn.txt"), data]
        run([*command, "--source-lang", "en", "--target-lang", "zh"], work / "prepare-cmn-eng.log")
    return data


def write_digits(work: Path) -> Path:
    """digits/<class>/<number>.png: scikit-learn's at 16 × 16, as `diffusion_ext.prepare` makes them."""
    from diffusion_ext.store import Images

    folder, store = work / "digits-folders", work / diffusion.DIGITS.name
    diffusion.prepare(diffusion.DIGITS, work)
    if not folder.exists():
        images, new = Images.open(store), work / "digits-folders.new"
        shutil.rmtree(new, ignore_errors=True)
        for i, (pixels, label) in enumerate(
            zip(np.asarray(images.pixels), images.labels, strict=True)
        ):
            path = new / str(images.classes[label]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0]).save(path)
        new.rename(folder)
    return folder


DATA = {"speaker": prepare_libri, "translation": prepare_bitext, "diffusion": write_digits}


def command(job: str, data: Path, *flags) -> list:
    """The shortest command of a job, and flags."""
    plugin, task = TASKS[job]
    program = Path(sys.executable).parent / "fairseq-train"
    return [program, data, "--user-dir", plugin, "--task", task, *flags]


def judged(job: str, folder: Path, data: Path) -> float:
    """The figure of FIGURES for what was trained into `folder`/checkpoints."""
    if job == "speaker":
        return 100 * speaker.evaluate(folder.name, data, "test", folder.parent)["top1"]
    checkpoints = folder / "checkpoints"
    if job == "translation":
        average = [*translation.python("translation.average"), checkpoints, "--last", 5]
        run([*average, "--output", checkpoints / "average.pt"], folder / "average.log")
        return translation.evaluate(folder, data, "test", "en", "zh")["bleu"]
    last = checkpoints / "checkpoint_last.pt"
    store = folder.parent / diffusion.DIGITS.name
    found = diffusion.judge(folder, diffusion.DIGITS, store, last, name="samples")
    return found["metrics"]["frechet"]["ratio"]


def one(job: str, name: str, data: Path, work: Path, *flags, all_threads: bool = False) -> None:
    """Train by the shortest command and judge, unless that is recorded."""
    if RECORDED.get(name):
        print(f"{name}: done before", flush=True)
        return
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = command(job, data, *flags, "--save-dir", folder / "checkpoints")
    began = time.time()
    cpu = run(words, folder / "train.log", threads=None if all_threads else 1)
    record = {"run": name, "date": date.today().isoformat(), "machine": machine()}
    record |= {"seconds": round(time.time() - began, 1), "cpu_seconds": round(cpu, 1)}
    record |= {"command": ["fairseq-train", data.name, *map(str, words[2:-2])]}
    if not all_threads:
        record["figure"] = judged(job, folder, data)
    RECORDED.put({**record, "versions": versions()})
    figure = f"{record['figure']:.2f}, " if "figure" in record else ""
    print(f"{name}: {figure}{record['seconds']:.0f} s", flush=True)


def report() -> str:
    """The table of what is done, beside today's recipes."""
    rows = []
    for job, figure in FIGURES.items():
        done = [r for r in RECORDED.all() if r["run"].startswith(f"{job}-") and "figure" in r]
        table, begin, of = RECIPES[job]
        names = {f"{begin}{seed}" for seed in SEEDS}
        recipes = [r for r in Results(RESULTS / f"{table}.jsonl").all() if r["run"] in names]
        minutes = RECORDED.get(f"{job}-minutes")
        rows.append(
            [
                figure,
                two(done, lambda r: r["figure"]),
                two(recipes, of),
                f"{spread([r['cpu_seconds'] for r in done])}",
                f"{spread([r['cpu_seconds'] for r in recipes])}",
                f"{minutes['seconds']:.0f} s" if minutes else "–",
            ]
        )
    head = [
        "",
        "shortest command",
        "recipe before",
        "CPU s",
        "CPU s before",
        f"--minutes {MINUTES}",
    ]
    return markdown(head, rows)


def two(records: list[dict], of) -> str:
    """Mean ± deviation with two decimals."""
    values = [of(record) for record in records]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="of the above (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "shortest")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="print the table of what is done")
    args = parser.parse_args()
    wanted = args.groups or [*TASKS, "minutes"]
    if unknown := set(wanted) - {*TASKS, "minutes"}:
        parser.error(f"unknown group {', '.join(sorted(unknown))}")
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            done = []
            for job in (job for job in TASKS if job in wanted):
                data = DATA[job](args.work)
                done += [
                    pool.submit(one, job, f"{job}-{seed}", data, args.work, "--seed", seed)
                    for seed in SEEDS
                ]
        for future in done:
            future.result()
        for job in TASKS if "minutes" in wanted else ():
            data, flags = DATA[job](args.work), ("--minutes", MINUTES)
            one(job, f"{job}-minutes", data, args.work, *flags, all_threads=True)
    print(report())


if __name__ == "__main__":
    main()
