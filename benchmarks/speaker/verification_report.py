"""The tables of verification and open sets as Markdown, from their records."""

import statistics

import numpy as np

from benchmarks.pages import markdown, origin, spread

NAMES = {
    "cosine": "cosine",
    "mean_cosine": "cosine, mean taken off",
    "as_norm": "the same, AS-norm",
    "plda": "PLDA",
    "plda, as_norm": "PLDA, AS-norm",
}

PROTOCOLS = {
    "asc20": """\
On asc20 the gallery is 01-08, enrolled by 40 words each, and scored by PLDA; one recording each of the six
people 09-14 (rounds 5 and 9; the mean is of round 1) gives the threshold, and 15-20 are the strangers. Six
people can promise 1/7; what is less is refused. A rate is promised in the mean over strangers like those
given: here these are the same six people a thousand times, and the tested ones six others, so that it can be
missed either way.""",
    "libri251": """\
On libri251 gallery, calibration and strangers are drawn anew each time from 149 people that the model was not
trained on, and scored by cosine with the mean of training taken off. Everybody has one recording, so that
enrolment and test share it. The larger gallery has those, too, whom the model was trained on.""",
}


def tables(asc20: list[dict], open_sets: list[dict]) -> dict[str, str]:
    """Name → table; empty where nothing is recorded."""
    return {
        "strangers": joined(
            strangers_table(asc20), "python -m benchmarks.speaker.strangers", asc20
        ),
        "open set": joined(
            "\n\n".join(filter(None, [open_set_table(open_sets), *open_set_words(open_sets)])),
            "python -m benchmarks.speaker.open_set",
            open_sets,
        ),
    }


def joined(table: str, command: str, records: list[dict]) -> str:
    return f"{table}\n\n{origin(command, records)}" if table else "Not measured yet."


def strangers_table(records: list[dict]) -> str:
    """Mean over three models beside Resemblyzer, a row each score; the difference is paired by speakers."""
    by_run = {record["run"].removeprefix("asc20-"): record["results"] for record in records}
    ours = [results for name, results in sorted(by_run.items()) if name.startswith("ours")]
    other = by_run.get("resemblyzer", {})
    rows = []
    for key in ours[0] if ours else ():
        condition, name = key.split(", ", 1)
        mine = [results[key] for results in ours]
        theirs = other.get(key)
        rows.append(
            [
                condition,
                NAMES[name],
                f"{spread([100 * one['metrics']['eer'] for one in mine])} {between(mine)}",
                f"{100 * theirs['metrics']['eer']:.1f} {between([theirs])}" if theirs else "–",
                difference(mine, theirs) if theirs else "–",
                beside(mine, theirs, "min_dcf_0.05"),
                beside(mine, theirs, "cllr"),
                beside(mine, theirs, "min_cllr"),
            ]
        )
    head = ["asc20", "score", "EER, %", "Resemblyzer", "difference, points"]
    return markdown([*head, "min DCF at 0.05", "Cllr", "its minimum"], rows)


def between(runs: list[dict]) -> str:
    """The ends of the 95 % intervals of the EER, in the mean over runs."""
    low, high = (
        100 * statistics.mean(one["interval95"]["eer"][end] for one in runs) for end in (0, 1)
    )
    return f"({low:.0f} to {high:.0f})"


def difference(mine: list[dict], theirs: dict) -> str:
    """Mean EER less theirs, with the middle 95 % of the same draws of speakers."""
    found = statistics.mean(one["metrics"]["eer"] for one in mine) - theirs["metrics"]["eer"]
    drawn = np.mean([one["eer_draws"] for one in mine], axis=0) - theirs["eer_draws"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{100 * found:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def beside(mine: list[dict], theirs: dict | None, metric: str) -> str:
    ours = f"{statistics.mean(one['metrics'][metric] for one in mine):.3f}"
    return f"{ours} / {theirs['metrics'][metric]:.3f}" if theirs else ours


def open_set_table(records: list[dict]) -> str:
    """Promised and found rates, a row each data set and rate, in the mean over models."""
    rows = []
    of = {
        name: [r["results"] for r in records if r["run"].startswith(name)]
        for name in ("asc20", "libri251")
    }
    larger = [run["larger"] for run in of["libri251"] if "larger" in run]
    galleries = [("asc20", "8 people", of["asc20"]), ("libri251", "25 people", of["libri251"])]
    if larger:
        galleries.append(("libri251", f"these and {larger[0]['more']} trained on", larger))
    for data, gallery, runs in galleries:
        for rate in [key for key in runs[0] if key[0] == "0"] if runs else ():
            found = [run[rate] for run in runs]
            errors = statistics.mean(100 * one["fpir_error"] for one in found)
            rows.append(
                [
                    *(data, gallery, f"{100 * float(rate):g} %"),
                    f"{spread([100 * one['fpir'] for one in found])} % (s.e. {errors:.2f})",
                    f"{spread([100 * one['dir'] for one in found])} %",
                    str(len(runs)),
                ]
            )
    head = ["data", "gallery", "FPIR asked for", "FPIR found", "DIR", "models"]
    return markdown(head, rows)


def open_set_words(records: list[dict]) -> list[str]:
    """What is measured on which data, for those that are recorded."""
    there = {record["run"].rpartition("-")[0] for record in records}
    return [words for data, words in PROTOCOLS.items() if data in there]


def speed_section(records: list[dict]) -> str:
    """What `python -m benchmarks.speaker.verification` measured; empty where it was not run yet."""
    parts = []
    for record in records:
        steps = record["steps"]
        rows = [
            [f"{step}: {name}", f"{seconds:.2f} s", f"{found['peak_mb']:.0f} MB"]
            for step, found in steps.items()
            for name, seconds in found.items()
            if name not in ("peak_mb", "before_mb") and not name.endswith("eer")
        ]
        note = (
            f"{record['trials']:,} trials of 5,000 recordings, 192 dimensions, a cohort of 1,000."
        )
        head = ["step", "time", "peak memory of its process"]
        parts += [note, markdown(head, rows), origin(record["command"], [record])]
    return "\n\n".join(["## Ten million trials", *parts]) if parts else ""
