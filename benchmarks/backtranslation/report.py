"""The tables of `benchmarks.backtranslation.tables` and `benchmarks.backtranslation` as Markdown."""

from benchmarks.pages import markdown, origin
from benchmarks.translation.report import main_table
from benchmarks.translation.significance import Pairs, significance_table

COMMAND = "python -m benchmarks.backtranslation.tables"
BITEXT, EARLY, OURS, NOISY = "bitext", "_early", "_ours", "_noisy"
REVERSE = {
    "reverse": "zh → en",
    "reverse_ours": "zh → en, our Transformer",
    "reverse2_ours": "the same on the second round's mixture",
}
# How the names of its runs end → (head, groups) of a table.
TABLES = {
    "": ("same updates", "modes toggles"),
    EARLY: ("two thirds of them", "early"),
    OURS: ("our Transformer", "ours rounds"),
    NOISY: ("a manual as monolingual text", "noisy"),
}


def report(records: list[dict], tests: list[dict]) -> str:
    """All tables of which at least one run is done."""
    return "\n\n".join(tables(records, tests).values()) or "no run is recorded yet"


def tables(records: list[dict], tests: list[dict]) -> dict[str, str]:
    """Scores of every mixture, and each beside the bitext alone."""
    found = {}
    for head, systems in systems_of(records).items():
        runs = [run for some in systems.values() for run in some]
        titled = {title_of(name): some for name, some in systems.items()}
        made = [main_table(head, titled), significance_table(tests, head)]
        made += [origin(f"{COMMAND} {dict(TABLES.values())[head]}", runs)]
        found[head] = "\n\n".join(part for part in made if part)
    named = by_name(records)
    reverse = {title: named[name] for name, title in REVERSE.items() if name in named}
    if reverse:
        runs = [run for some in reverse.values() for run in some]
        found["reverse"] = f"{main_table('reverse model', reverse)}\n\n{origin(COMMAND, runs)}"
    return found


def systems_of(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Head of a table → name → runs of all seeds."""
    found: dict[str, dict[str, list[dict]]] = {}
    named = by_name(records)
    if BITEXT in named and any(name.endswith(NOISY) for name in named):
        # what other monolingual text is beside is the same
        named = {f"{BITEXT}{NOISY}": named[BITEXT], **named}
    for name, runs in named.items():
        if name not in REVERSE:
            found.setdefault(TABLES[parts_of(name)[2]][0], {})[name] = runs
    return found


def compared(records: list[dict]) -> dict[str, Pairs]:
    """Head of a table → what is tested."""
    return {head: differences(some) for head, some in systems_of(records).items()}


def differences(systems: dict[str, list[dict]]) -> Pairs:
    """What is compared: each mixture with the bitext alone, each toggle with what it toggles."""
    pairs = {}
    for name, runs in systems.items():
        mode, toggle, suffix = parts_of(name)
        if name == BITEXT + suffix:
            continue
        bases = [BITEXT + suffix]
        if toggle and mode != BITEXT:
            # of what is toggled twice the last is tested
            fewer = toggle.rpartition(", ")[0]
            bases.append(f"{mode}_{fewer}{suffix}" if fewer else mode + suffix)
        for base in bases:
            same = [one for one in systems.get(base, []) if seed_of(one) in map(seed_of, runs)]
            if len(same) == len(runs):
                pairs[f"{title_of(name)} − {title_of(base)}"] = (runs, same)
    return pairs


def by_name(records: list[dict]) -> dict[str, list[dict]]:
    """Runs by name without the seed; the bitext first."""
    found: dict[str, list[dict]] = {}
    for run in records:
        found.setdefault(run["run"].rsplit("-", 1)[0], []).append(run)
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith(BITEXT), item[0])))


def seed_of(run: dict) -> str:
    return run["run"].rsplit("-", 1)[1]


def parts_of(name: str) -> tuple[str, str, str]:
    """(mode, what of it is toggled, suffix of the table that it belongs to)."""
    suffix = next((one for one in TABLES if one and name.endswith(one)), "")
    mode, _, toggle = name.removesuffix(suffix).partition("_")
    return mode, toggle, suffix


def title_of(name: str) -> str:
    mode, toggle, _ = parts_of(name)
    title = "bitext only" if mode == BITEXT else f"+ {mode}"
    return f"{title}, {toggle}" if toggle else title


def speed_tables(records: list[dict]) -> dict[str, str]:
    """Of the last run of each part of `python -m benchmarks.backtranslation`."""
    made = {"speed": speed_table, "quality": quality_table, "memory": memory_table}
    return {
        f"backtranslation {f['run']}": f"{made[f['run']](f)}\n\n{origin(f['command'], [f])}"
        for f in records
    }


def speed_table(figures: dict) -> str:
    sides = figures["sides"]
    peers = list(next(iter(sides.values()))["over"])
    letters = dict(zip(peers, "abc", strict=True))
    rows = []
    for name, side in sides.items():
        title = f"({letters[name]}) {name}" if name in letters else name
        ratios = [f"{side['over'][peer]['ratio']:.2f} ×" for peer in peers]
        rows.append([title, f"{side['median']:.2f}", *ratios, f"{side['peak_mb']:,.0f} MB"])
    heads = [f"beside ({letter})" for letter in letters.values()]
    goals = [f"{goal:g} × over ({letters[peer]})" for peer, goal in figures["goals"].items()]
    table = markdown(["", "lines/s", *heads, "peak memory"], rows)
    return f"{table}\n\nThe goals were {' and '.join(goals)}."


def quality_table(figures: dict) -> str:
    rows = [
        [
            name,
            f"{side['bleu']:.2f}",
            f"{side['difference']:+.2f}",
            f"{100 * side['same_lines']:.1f} %",
            f"{side['rate']:.1f}",
        ]
        for name, side in figures["sides"].items()
    ]
    head = f"{figures['sentences']} sentences, beam {figures['beam']}"
    return markdown([head, "BLEU", "difference", "same lines", "lines/s"], rows)


def memory_table(figures: dict) -> str:
    rows = [
        [
            f"{one['lines']:,}",
            f"{one['input_mb']:.1f} MB",
            f"{one['peak_mb']:.0f} MB",
            f"{one['rate']:,.0f}",
        ]
        for one in figures["runs"]
    ]
    return markdown(["lines", "text", "peak memory of `generate`", "lines/s"], rows)
