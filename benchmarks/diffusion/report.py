"""The tables of `benchmarks.diffusion.tables` as Markdown, from their records."""

from collections import defaultdict
from statistics import mean, stdev

from benchmarks.pages import markdown, origin

COMMAND = "python -m benchmarks.diffusion.tables"
CONTROL = "control: "


def report(records: list[dict]) -> str:
    """All tables of which at least one run is done."""
    return "\n\n".join(tables(records).values()) or "no run is recorded yet"


def tables(records: list[dict]) -> dict[str, str]:
    """Name → table: mean ± standard deviation over seeds, or over sets of images."""
    runs = defaultdict(list)
    for record in records:
        runs[record["run"].rsplit("-", 1)[0]].append(record)
    digits = {n: r for n, r in runs.items() if n.startswith(("digits", "flow", "unlabelled"))}
    controls = {n: r for n, r in runs.items() if n.startswith(CONTROL)}
    ablation = {n: r for n, r in runs.items() if n.startswith(("sigmoid", "cosine", "linear"))}
    samplers = {n: r for n, r in runs.items() if n.startswith("sampler-")}
    emoji = {n: runs[n] for n in EMOJI if n in runs}
    made = {
        "digits flow muon unlabelled": (digits_table({**digits, **controls}), digits),
        "ablation": (ablation_table(ablation), ablation),
        "emoji": (emoji_table(emoji), emoji),
        "samplers": (sampler_table([r for rs in samplers.values() for r in rs]), samplers),
        "nearest": (nearest_table(runs), {"nearest": runs.get("nearest", [])}),
    }
    return {
        group: f"{table}\n\n{origin(f'{COMMAND} {group}', [r for rs in some.values() for r in rs])}"
        for group, (table, some) in made.items()
        if table
    }


EMOJI = {
    "emoji_default": "the default: sigmoid and v",
    "emoji_augmented": "with `--hflip 0.5 --color-jitter 0.5,0.5,0.5,0.1`",
    "emoji_cosine_eps": "cosine and eps",
}
COLUMNS = ("Fréchet distance", "× floor", "precision", "recall", "CPU s", "seeds")


def cells(records: list[dict]) -> list[str]:
    metrics = [record["evaluation"]["metrics"] for record in records]
    return [
        spread([m["frechet"]["value"] for m in metrics]),
        spread([m["frechet"]["ratio"] for m in metrics]),
        spread([m["precision"]["value"] for m in metrics]),
        spread([m["recall"]["value"] for m in metrics]),
        f"{mean(r['cpu_seconds'] for r in records):.0f}" if "cpu_seconds" in records[0] else "",
        str(len(records)),
    ]


def emoji_table(runs: dict) -> str:
    rows = [[EMOJI[name], *cells(records)] for name, records in runs.items()]
    return markdown(["emoji 32 × 32, 898 images", *COLUMNS], rows)


def digits_table(runs: dict) -> str:
    def more(found: list[dict]) -> list[str]:
        near = [f["memorisation"]["pixels"] for f in found]
        distances = spread([n["median"] for n in near]), f"{near[0]['median_held_out']:.3g}"
        return [" / ".join(distances), str(min(10 - len(f["classes"]["missing"]) for f in found))]

    rows = []
    for name, records in runs.items():
        title = name.replace("digits", "samples").replace("flow", "learnt by `--objective flow`")
        title = title.replace("unlabelled", "learnt without classes")
        title = title.replace("_distilled", ", distilled")
        title = title.replace("_muon", " and Muon").replace("_600", ", 600")
        title = title.replace("_guidance_", ", guidance ").replace("_steps_", ", steps ")
        rows.append([title, *cells(records), *more([r["evaluation"] for r in records])])
    heads = ["digits, 898 images", *COLUMNS, "nearest training image / of held-out", "classes"]
    return markdown(heads, rows)


def nearest_table(runs: dict) -> str:
    """Samples of the recipe beside held-out digits, and beside these without their own hand."""
    if not runs.get("nearest"):
        return ""
    samples = [r["evaluation"]["memorisation"]["pixels"]["median"] for r in runs["digits"]]
    rows = [
        [
            f"without images less than {least} away" if least != "0" else "of all training images",
            f"{distance:.2f}",
            spread([one / distance for one in samples]),
        ]
        for least, distance in runs["nearest"][0]["held_out"].items()
    ]
    return markdown(["nearest to a held-out digit", "median distance", "samples / this"], rows)


def sampler_table(records: list[dict]) -> str:
    """A row each sampler and spacing, a column each number of steps."""
    steps = sorted({record["steps"] for record in records})
    rows = defaultdict(lambda: defaultdict(list))
    for record in records:
        rows[record["sampler"], record["spacing"]][record["steps"]].append(record)

    lines = [
        [name, spacing, *[scores(row[s]) if s in row else "" for s in steps]]
        for (name, spacing), row in rows.items()
    ]
    heads = ["Fréchet distance × floor (precision, recall), 500 digits", "spacing"]
    heads += [f"{s} steps" for s in steps]
    return markdown(heads, lines)


def ablation_table(runs: dict) -> str:
    """Fréchet distance in floors, with precision and recall."""
    rows = []
    for schedule in ("sigmoid", "cosine", "linear"):
        for objective in ("v", "eps"):
            row = [f"{schedule}, {objective}"]
            for augmentation in ("none", "leaky", "nonleaky", "rarely"):
                records = runs.get(f"{schedule}_{objective}_{augmentation}", [])
                row.append(scores(records) if records else "")
            if any(row[1:]):
                rows.append(row)
    heads = [
        "Fréchet distance × floor (precision, recall), digits",
        "no augmentation",
        "leaky",
        "non-leaky",
        "non-leaky, 15 %",
    ]
    return markdown(heads, rows)


AVERAGES = {"usual": "the usual average", "posthoc": "of a length chosen on valid"}


def objective_sections(records: list[dict]) -> dict[str, str]:
    """What `benchmarks.diffusion.objectives` measured, with its headings; empty where it was not run yet."""
    runs = defaultdict(list)
    for record in records:
        runs[record["run"].rsplit("-", 1)[0]].append(record)
    command = "python -m benchmarks.diffusion.objectives"

    def section(group: str, prefix: str, heading: str, head: list[str], rows: list) -> str:
        some = [r for name, found in runs.items() if name.startswith(prefix) for r in found]
        if not some:
            return ""
        return "\n\n".join([heading, markdown(head, rows), origin(f"{command} {group}", some)])

    first, *others = ("Fréchet distance × floor (precision, recall), 500 digits", "average")
    steps = (2, 5, 10, 20)
    rows = [
        [name.removeprefix("objective_"), AVERAGES[average]]
        + [cell_scores(found, f"{average}-{n}") for n in steps]
        for name, found in runs.items()
        if name.startswith("objective_")
        for average in AVERAGES
    ]
    heading = "## What is predicted, and in how many steps"
    if len(rows) == 3 * len(AVERAGES):
        heading += "\n\n![Steps against distance, a line an objective](../pictures/objectives.png)"
    made = {
        "objectives": section(
            "objectives",
            "objective_",
            heading,
            [first, *others, *[f"{n} steps" for n in steps]],
            rows,
        )
    }
    judged = ["Fréchet distance × floor", "precision", "recall", "nearest / of held-out"]
    found = runs.get("guidance_v", [])
    rows = [[way, *cell_more(found, way)] for way in (found[0]["cells"] if found else [])]
    head = ["guided, 10 steps", *judged]
    made["guidance"] = section("guidance", "guidance_", "## Guidance", head, rows)
    rows = [
        [
            name.removeprefix("muon_"),
            str(len(found)),
            f"{mean(record['cpu_seconds'] for record in found):.0f}",
            *cell_more(found, "10"),
        ]
        for name, found in sorted(runs.items())
        if name.startswith("muon_")
    ]
    head = ["500 digits, 10 steps", "seeds", "CPU s", *judged]
    made["muon"] = section("muon", "muon_", "## Muon", head, rows)
    rows = []
    for objective, own in {"edm": "edm", "flow": "uniform"}.items():
        found = runs.get(f"objective_{objective}", [])
        rows.append(
            [objective, f"`{own}`, its own", str(len(found)), *cell_more(found, "usual-10")]
        )
        start = f"times_{objective}, "
        rows += [
            [objective, f"`{name.removeprefix(start)}`", str(len(found)), *cell_more(found, "10")]
            for name, found in sorted(runs.items())
            if name.startswith(start)
        ]
    head = ["500 digits, 10 steps", "`--time-sampling`", "seeds", *judged]
    made["times"] = section("times", "times_", "", head, rows).strip()
    return made


def cell_scores(records: list[dict], cell: str) -> str:
    """Fréchet distance in floors, and (precision, recall)."""
    found = [record["cells"][cell] for record in records if cell in record["cells"]]
    if not found:
        return ""
    others = [mean(one[name] for one in found) for name in ("precision", "recall")]
    return f"{spread([one['ratio'] for one in found])} ({others[0]:.2f}, {others[1]:.2f})"


def cell_more(records: list[dict], cell: str) -> list[str]:
    found = [record["cells"][cell] for record in records if cell in record["cells"]]
    names = ("ratio", "precision", "recall", "nearest")
    return [spread([one[name] for one in found]) for name in names]


def scores(records: list[dict]) -> str:
    """Fréchet distance in floors, and (precision, recall)."""
    metrics = [record["evaluation"]["metrics"] for record in records]
    others = [mean(m[name]["value"] for m in metrics) for name in ("precision", "recall")]
    return f"{spread([m['frechet']['ratio'] for m in metrics])} ({others[0]:.2f}, {others[1]:.2f})"


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def emoji_section(records: list[dict]) -> str:
    """What `benchmarks.diffusion.emoji` measured; empty where it was not run yet."""
    if not records:
        return ""
    record = records[-1]
    heads = ["500 emoji", "Fréchet distance", "× floor", "precision", "recall"]
    heads += ["nearest training image / of held-out", "copies", "taken for their class"]
    rows = [
        [
            name,
            f"{cell['frechet']:.3g}",
            f"{cell['ratio']:.2f}",
            f"{cell['precision']:.2f}",
            f"{cell['recall']:.2f}",
            f"{cell['nearest']:.2f}",
            f"{cell['copies']}",
            f"{100 * cell['right']:.0f} %" if "right" in cell else "",
        ]
        for name, cell in record["cells"].items()
    ]
    rows.append(["real ones held out", *[""] * 6, f"{100 * record['real']:.0f} %"])
    return f"{markdown(heads, rows)}\n\n{origin('python -m benchmarks.diffusion.emoji', records)}"
