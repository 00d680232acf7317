"""What is recorded stays whole, and pages say what is recorded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageChops

from benchmarks import pictures, report
from benchmarks.pages import filled, origin, spread
from benchmarks.recorded import Results
from benchmarks.speaker import report as speaker

PAGES = report.pages()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_says_what_is_recorded(name, repo_root):
    assert (repo_root / name).read_text(encoding="utf-8") == PAGES[name], f"run: {report.MADE_BY}"


def test_another_figure_is_another_page(monkeypatch):
    recorded = report.recorded

    def changed(name):
        records = recorded(name)
        for record in records:
            if record["run"] == "main-ours-1":
                record["libri251/test"] = {"top1": 0.5}
        return records

    monkeypatch.setattr(report, "recorded", changed)
    differing = {name for name, text in report.pages().items() if text != PAGES[name]}
    assert differing == {"README.md", "docs/results/speaker.md"}


def test_a_run_replaces_its_own_line(tmp_path):
    results = Results(tmp_path / "sub" / "figures.jsonl")
    assert results.all() == [] and results.get("b") is None
    for run, value in (("b", 1), ("a", "é\n"), ("b", 3)):
        results.put({"run": run, "recipe_sha256": "x", "value": value})
    assert [(one["run"], one["value"]) for one in results.all()] == [("a", "é\n"), ("b", 3)]
    assert len(results.path.read_text().splitlines()) == 2
    assert results.has("a", "x") and not results.has("a", "y") and not results.has("c", "x")


def test_runs_that_end_together_are_all_recorded(tmp_path):
    def put(number):
        Results(tmp_path / "figures.jsonl").put({"run": f"{number:02d}"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(40)))
    found = Results(tmp_path / "figures.jsonl").all()
    assert [one["run"] for one in found] == [f"{number:02d}" for number in range(40)]


def test_a_table_without_a_place_and_a_place_without_a_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n{{one}}\n\nafter {{not a place}}\n")
    text = filled(page, {"one": "| 1 |"}, "make")
    assert text.endswith("before\n\n| 1 |\n\nafter {{not a place}}\n") and "`make`" in text
    with pytest.raises(KeyError, match="two"):
        filled(page, {"one": "", "two": ""}, "make")
    with pytest.raises(KeyError, match="one"):
        filled(page, {}, "make")


def test_where_a_table_comes_from():
    records = [
        {"date": "2026-11-24", "machine": "A, 2 CPUs, load 1.5"},
        {"date": "2026-11-23", "machine": "A, 2 CPUs, load 2.5"},
        {"date": "2026-11-23"},
    ]
    line = "*`do it`, 2026-11-23 to 2026-11-24, A, 2 CPUs; processor not recorded*"
    assert origin("do it", records) == line


def test_effects_are_paired_by_seed_and_by_the_other_factors():
    def run(encoder, pooling, criterion, seed, top1):
        found = {"top1": top1 / 100}
        sets = {f"{data}/test": found for data in (speaker.AS_IS, speaker.SHIFTED)}
        return {"run": f"ablation-{encoder}-{pooling}-{criterion}-{seed}", **sets}

    runs = {
        "transformer-mean-softmax": [
            run("transformer", "mean", "softmax", s, 10 * s) for s in (1, 2)
        ],
        "transformer-mean-am_softmax": [
            run("transformer", "mean", "am_softmax", s, 10 * s + 2 * s) for s in (1, 2)
        ],
    }
    row = speaker.effects_table(runs).splitlines()[-1]
    assert row == "| softmax → am_softmax | +3.0 ± 1.4 | +3.0 ± 1.4 |"
    assert spread([]) == "–" and spread([2.0]) == "2.0"


def test_the_picture_of_digits_is_of_the_recorded_grid(tmp_path, monkeypatch, repo_root):
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    pictures.diffusion(tmp_path)
    made, shown = (
        Image.open(folder / "diffusion.png")
        for folder in (tmp_path, repo_root / "docs" / "pictures")
    )
    assert made.size == shown.size and not ImageChops.difference(made, shown).getbbox()
