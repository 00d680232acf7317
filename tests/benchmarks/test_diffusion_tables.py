"""The diffusion tables: every recorded run is one of the recipes as they are now."""

import json

import pytest

from benchmarks import recorded
from benchmarks.diffusion import emoji, report, tables
from benchmarks.recorded import changed_recipe, digest_of

RECORDED = {record["run"]: record for record in tables.RECORDED.all()}
RUNS = {name: run for runs in tables.GROUPS.values() for name, run in runs().items()}


def record(name, frechet, precision=0.5, **more):
    numbers = {"frechet": (frechet, frechet / 2), "precision": (precision, 1), "recall": (0.25, 1)}
    metrics = {key: {"value": v, "ratio": ratio} for key, (v, ratio) in numbers.items()}
    return {"run": name, "evaluation": {"metrics": metrics}, **more}


def test_the_ablation_is_every_combination_twice():
    ablation = {n: run for n, run in tables.ablation_runs().items() if "rarely" not in n}
    assert len(ablation) == 36
    seen = {json.dumps(changes, sort_keys=True) for _, _, changes in ablation.values()}
    assert len(seen) == 36


@pytest.mark.parametrize("name", sorted(RUNS))
def test_what_is_recorded_is_of_the_recipe_as_it_is(name):
    """A figure of the README is reproduced by the recipe in the repository, or is not there."""
    data, recipe, changes, *flags = RUNS[name]
    config = changed_recipe(tables.CONFIGS / f"{recipe}.yaml", changes)
    digest = digest_of(config, data.name, data.size, tables.SAMPLES)
    stem, _, seed = name.rpartition("-")
    ways = [f"{stem}{suffix}-{seed}" for suffix in (flags[0] if flags else {"": []})]
    for way in ways:
        assert way in RECORDED, f"run: python -m benchmarks.diffusion.tables (for {way})"
        found = RECORDED[way]
        assert found["recipe_sha256"] == digest
        assert found["evaluation"]["metrics"]["frechet"]["n"] == tables.SAMPLES


def test_a_run_that_is_recorded_is_not_run_again(tmp_path, monkeypatch, capsys):
    """And one whose training is done is only judged."""
    trained, judged = [], []

    def train(command, log):
        trained.append(command)
        return 1.5

    def judge(folder, *_, name, **__):
        judged.append(name)
        (folder / f"{name}.grid.png").write_bytes(b"")
        return record(name, 3.0)["evaluation"]

    results = recorded.Results(tmp_path / "results.jsonl")
    monkeypatch.setattr(tables, "RECORDED", results)
    monkeypatch.setattr(tables, "GRIDS", tmp_path)
    monkeypatch.setattr(recorded, "run", train)
    monkeypatch.setattr(tables, "judge", judge)
    what = tables.digits_runs()["digits-1"]
    for _ in range(2):
        tables.one("digits-1", *what, work=tmp_path)
    assert len(trained) == 1
    assert judged == ["digits-1", "digits_guidance_1.25-1", "digits_guidance_1.5-1"]
    assert "done before" in capsys.readouterr().out
    others = [line for line in results.path.read_text().splitlines(True) if "_1.5-1" not in line]
    results.path.write_text("".join(others))
    tables.one("digits-1", *what, work=tmp_path)
    assert len(trained) == 1 and judged[3:] == ["digits_guidance_1.5-1"]


def test_scores_are_means_over_records():
    two = [record("x-1", 2.0, 0.4), record("x-2", 4.0, 0.6)]
    assert report.scores(two) == "1.5 ± 0.71 (0.50, 0.25)"
    assert report.scores(two[:1]) == "1 (0.40, 0.25)"


def test_the_table_of_samplers_has_sets_of_a_cell_in_one():
    records = [
        record(f"sampler-a-{n}", 2.0 * n, sampler="a", spacing="trailing", steps=10) for n in (1, 2)
    ]
    records.append(record("sampler-b-1", 8.0, sampler="b", spacing="logsnr", steps=5))
    lines = report.sampler_table(records).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "a",
        "trailing",
        "",
        "1.5 ± 0.71 (0.50, 0.25)",
    ]
    assert lines[0].endswith("| 5 steps | 10 steps |")


LISTED = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # grinning face
# subgroup: heart
2764 FE0F ; fully-qualified # red heart
# group: People & Body
# subgroup: person-sport
1F3C3 ; fully-qualified # person running
# group: Component
# subgroup: skin-tone
1F3FB ; component # light skin tone
"""


def test_emoji_are_in_the_groups_of_unicode(tmp_path, monkeypatch, capsys):
    """One that is younger than the list is what it begins with; what belongs to none is counted."""
    names = ["1f600", "2764-fe0f", "1f3c3-200d-27a1-fe0f", "1f3fb", "1fae8"]
    (tmp_path / "emoji64").mkdir()
    for name in names:
        (tmp_path / "emoji64" / f"{name}.png").write_bytes(b"")
    (tmp_path / "list").write_text(LISTED)
    monkeypatch.setattr(emoji, "LISTED", tmp_path / "list")
    monkeypatch.setattr(emoji, "data_file", tmp_path.joinpath)
    found = emoji.class_folders(tmp_path)
    assert {(p.parent.name, p.stem) for p in found.rglob("*.png")} == {
        ("faces", "1f600"),
        ("symbols", "2764-fe0f"),
        ("people", "1f3c3-200d-27a1-fe0f"),
    }
    assert capsys.readouterr().out.startswith("2 of no class")
