"""The tables of `benchmarks.speaker` and its `tables` as Markdown, from their records."""

import statistics
from collections import defaultdict

from benchmarks.pages import latest_first, markdown, origin, spread

AS_IS, SHIFTED = "libri251", "libri251-shifted"
CHANGES = [("transformer", "conformer"), ("mean", "self_attention"), ("softmax", "am_softmax")]

# What benchmarks.speaker.audio measures, and how it is called.
AUDIO = {
    "whole.wav": "WAV as it is",
    "without_length.mp3": "MP3 without a length",
    "twice.mp3": "two MP3 in one file",
    "cut.wav": "WAV, its last third missing",
    "cut.ogg": "OGG, its last third missing",
    "pipe.wav": "WAV of size 0, from a pipe",
    "pipe.flac": "FLAC without a length, from a pipe",
    "hertz.wav": "10 samples of a WAV whose header says 1 Hz",
    "inverted.wav": "stereo, one channel inverted: cosine to itself",
    "short.wav": "25 ms of noise",
    "ten minutes": "10 minutes: CPU s, MB more",
    "hour": "an hour: CPU s, MB more",
    "wide": "3 s of people not trained on: EER, %",
    "narrow": "the same at 8 kHz against 16, EER, %",
}


def audio_table(records: list[dict]) -> str:
    """The figures of `benchmarks.speaker.audio`, the versions side by side, before first."""
    if not records:
        return ""
    columns = sorted(records, key=lambda record: record["run"] != "before")
    rows = [
        [text, *(record["results"].get(name, "not run") for record in columns)]
        for name, text in AUDIO.items()
    ]
    made = markdown(["", *(record["run"] for record in columns)], rows)
    return f"{made}\n\n{origin('python -m benchmarks.speaker.audio CKPT PEOPLE.json', records)}"


def variants_table(records: list[dict]) -> str:
    """The figures of `benchmarks.speaker.variants`, a model a row."""
    if not records:
        return ""
    names = {
        "libri251": "as it is",
        "narrowed": "half of the crops narrowed",
        "narrowed_long": "half of them narrowed, twice as many updates",
        "large_margin": "the first, trained on with longer crops and a larger margin",
        "muon": "with Muon at the same rate",
    }
    keys = ("wide", "narrow", "top1")
    rows = [
        [name, *(record["results"][key] for key in keys)]
        for run, name in names.items()
        for record in records
        if record["run"].rpartition("-")[0] == run
    ]
    words = (
        "The recipe libri251 on 102 people: as it is, with `--augment 'bandwidth;channel;specaugment'`, which"
        " narrows half of the crops as a telephone does, and trained on for a large margin as in"
        " docs/speaker.md. Pieces of 3 s of the 149 others, and test segments of those trained on:"
    )
    head = ["libri251", "others, EER %", "at 8 kHz against 16, EER %", "known, top-1 %"]
    line = origin("python -m benchmarks.speaker.variants", records)
    return f"{words}\n\n{markdown(head, rows)}\n\n{line}"


def imbalance_table(records: list[dict]) -> str:
    """The figures of `benchmarks.speaker.imbalance`, mean ± deviation over seeds."""
    names = {"none": "in proportion to the recordings", "speaker": "as many of each speaker"}
    rows = []
    for balance, name in names.items():
        runs = [r["results"] for r in records if r["run"].rpartition("-")[0] == balance]
        if runs:
            both = [spread([run[key] for run in runs]) for key in ("speakers", "many", "few")]
            rows.append([f"`--balance {balance}`: {name}", *both, str(len(runs))])
    if not rows:
        return ""
    head = ["crops", "accuracy, mean over speakers, %", "of the one", "of the five", "seeds"]
    line = origin("python -m benchmarks.speaker.imbalance", records)
    return f"{markdown(head, rows)}\n\n{line}"


def report(records: list[dict]) -> str:
    """All tables of which at least one run is done."""
    return "\n\n".join(tables(records).values()) or "no run is recorded yet"


def tables(records: list[dict]) -> dict[str, str]:
    """Name → table: mean ± standard deviation over seeds."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    for run in records:
        group, rest = run["run"].split("-", 1)
        groups[group][rest.rsplit("-", 1)[0]].append(run)
    made = {
        "main": main_table(groups["main"]),
        "ablation": ablation_table(groups["ablation"]),
        "effects": effects_table(groups["ablation"]),
        "choices": choices_table(groups["choices"], groups["ablation"]),
        "digits": digits_table(groups["digits"]),
    }
    return {
        name: f"{table}\n\n{origin(command(name), of_group(groups, name))}"
        for name, table in made.items()
        if table
    }


def command(table: str) -> str:
    group = "ablation" if table == "effects" else table
    return f"python -m benchmarks.speaker.tables {group}"


def of_group(groups: dict, table: str) -> list[dict]:
    named = groups["ablation" if table == "effects" else table]
    return [run for runs in named.values() for run in runs]


def main_table(runs: dict) -> str:
    rows = [
        [name, top1s(r, f"{AS_IS}/test"), top1s(r, f"{SHIFTED}/test"), *cost(r)]
        for name, r in sorted(runs.items(), reverse=True)
    ]
    head = ["libri251, test top-1 %", "as it is", "channel-shifted", "updates", "CPU s", "seeds"]
    return markdown(head, rows)


def digits_table(runs: dict) -> str:
    rows = [[n, top1s(r, "fsdd/test"), *cost(r)] for n, r in sorted(runs.items(), reverse=True)]
    return markdown(["fsdd, test top-1 %", "as it is", "updates", "CPU s", "seeds"], rows)


def ablation_table(runs: dict) -> str:
    rows = [
        [*name.split("-"), top1s(r, f"{AS_IS}/test"), top1s(r, f"{SHIFTED}/test"), *cost(r)]
        for name, r in sorted(runs.items(), reverse=True)
    ]
    head = ["encoder", "pooling", "criterion", "as it is", "channel-shifted", "updates", "CPU s"]
    return markdown([*head, "seeds"], rows)


def choices_table(runs: dict, ablation: dict) -> str:
    """One change at a time to the Conformer with self-attention pooling and AM-softmax, on valid."""
    reference = {"(the reference)": ablation.get("conformer-self_attention-am_softmax", [])}
    rows = [
        [
            name.replace("_", " "),
            top1s(r, f"{AS_IS}/valid"),
            top1s(r, f"{SHIFTED}/valid"),
            *cost(r),
        ]
        for name, r in {**reference, **runs}.items()
        if r
    ]
    head = ["one change, valid top-1 %", "as it is", "channel-shifted", "updates", "CPU s", "seeds"]
    return markdown(head, rows)


def effects_table(runs: dict) -> str:
    """What each change earns: the mean over the other two factors and the seeds, paired by run."""
    rows = []
    for before, after in CHANGES:
        cells = []
        for data in (AS_IS, SHIFTED):
            gains = []
            for name, with_change in runs.items():
                parts = name.split("-")
                if after in parts:
                    parts[parts.index(after)] = before
                    old = {r["run"][-1]: r for r in runs.get("-".join(parts), [])}
                    gains += [
                        top1(r, f"{data}/test") - top1(old[r["run"][-1]], f"{data}/test")
                        for r in with_change
                        if r["run"][-1] in old
                    ]
            cells.append(spread(gains, signed=True))
        rows.append([f"{before} → {after}", *cells])
    return markdown(["change", "as it is, points", "channel-shifted, points"], rows if runs else [])


def speed_tables(speed: list[dict], prepared: list[dict]) -> dict[str, str]:
    """Of the last run of `python -m benchmarks.speaker` on each processor, and of `.prepare`."""
    found, tables = {}, []
    for figures in latest_first(speed):
        head = ["the same work", "ours", "beside", "ratio", "its smallest to largest", "goal"]
        rows = [row for case in figures["cases"] for row in speed_rows(case)]
        table = markdown([*head, "peak memory, ours / beside"], rows)
        tables.append(f"{table}\n\n{origin(figures['command'], [figures])}")
    found["speaker"] = "\n\n".join(tables)
    for figures in prepared:
        found["speaker prepare"] = (
            f"{prepare_line(figures)}\n\n{origin(figures['command'], [figures])}"
        )
    return found


def speed_rows(case: dict) -> list[list[str]]:
    """A row each other side of a case."""
    ours, *others = case["sides"]
    rows = []
    for name in others:
        here, beside = case["sides"][ours], case["sides"][name]
        main = name == case["against"]
        memory = [f"{s['memory']['peak_mb']:.0f}" for s in (here, beside) if s["memory"]]
        rows.append(
            [
                case["case"],
                f"{here['median']:,.0f} {case['unit']}",
                f"{beside['median']:,.0f}, {name}",
                f"{'**' * main}{case['ratios'][name]:.2f} ×{'**' * main}",
                f"{case['ratio_min']:.2f} to {case['ratio_max']:.2f}" if main else "",
                goal(case) if main else "",
                f"{' / '.join(memory)} MB" if len(memory) == 2 else "",
            ]
        )
    return rows


def goal(case: dict) -> str:
    if case["goal"] is None:
        return ""
    return f"{case['goal']:g}: {'met' if case['ratio'] >= case['goal'] else 'missed'}"


def prepare_line(f: dict) -> str:
    """What preparing the generated set costs."""
    shape, read = f["set"], (f["first_crops_file_cached"], f["first_crops_file_not_cached"])
    seconds = " to ".join(f"{one['total_s']:.1f}" for one in read)
    note = f" {f['note']}" if "note" in f else ""
    return (
        f"{shape['utterances']:,} + {shape['unlabelled']:,} generated utterances,"
        f" {f['features_gb']:.1f} GB: `prepare` takes {f['prepare_s']:.0f} s,"
        f" {f['peak_rss_main_mb']:.0f} MB in its main process and {f['peak_pss_tree_mb']:.0f} MB with its"
        f" workers; starting Python, opening DATA and reading the first crops ({f['crops']}) takes"
        f" {seconds} s.{note}"
    )


def top1(run: dict, key: str) -> float:
    return 100 * run[key]["top1"]


def top1s(runs: list, key: str) -> str:
    return spread([top1(r, key) for r in runs])


def cost(runs: list) -> list:
    updates = runs[0]["recipe"]["optimization"]["max_update"]
    seconds = statistics.mean(r["cpu_seconds"] for r in runs)
    return [str(updates), f"{seconds:.0f}", str(len(runs))]
