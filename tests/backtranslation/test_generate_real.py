"""The command with a real tiny model: the same lines whatever the chunks, batches and interruptions."""

import json

import pytest

from fairseq_ext.backtranslation.generate.__main__ import GenerateOptions, generate
from fairseq_ext.backtranslation.generate.work import Worker

NASTY = [
    "",
    " \t",
    "😀龘",
    "▁",
    "</s>",
    "<BT> 我",
    ">>eng<< 我喜欢鱼",
    "我" * 900,
    "\u202e我",
    "我\u2028你",
    "12 34",
]
FILES = ("real.zh", "synthetic.en", "rejects.jsonl", "provenance.jsonl")


@pytest.fixture(scope="module")
def lines(toy_mono):
    """Ordinary lines, some of them twice, nasty ones in between."""
    found = [*toy_mono[:60], *toy_mono[:10]]
    for number, line in enumerate(NASTY):
        found.insert(6 * number + 3, line)
    return found


@pytest.fixture
def mono(tmp_path, lines):
    path = tmp_path / "mono.zh"
    path.write_bytes("\n".join(lines).encode())
    return str(path)


@pytest.fixture
def flags(reverse_checkpoint):
    return {"model": str(reverse_checkpoint), "threads": 1, "chunk_lines": 25}


def contents(dest):
    return {name: (dest / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("mode", ["topk", "noised-beam"])
def test_chunks_and_batches_do_not_matter(mono, tmp_path, flags, lines, mode):
    generate(mono, tmp_path / "a", GenerateOptions(**flags, mode=mode))
    other = {**flags, "chunk_lines": 7, "max_tokens": 60}
    generate(mono, tmp_path / "b", GenerateOptions(**other, mode=mode))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    scores = [
        [json.loads(row)["score"] for row in files.pop("provenance.jsonl").splitlines()]
        for files in (a, b)
    ]
    assert a == b
    assert scores[0] == pytest.approx(scores[1], abs=1e-4, nan_ok=True)
    rejects = [json.loads(row) for row in a["rejects.jsonl"].splitlines()]
    synthetic = a["synthetic.en"].decode().split("\n")[:-1]
    assert len(synthetic) == len(lines)
    assert {row["line"] for row in rejects} == {
        n for n, text in enumerate(synthetic, 1) if not text
    }
    assert {1 + n for n, line in enumerate(lines) if not line.strip()} <= {
        r["line"] for r in rejects
    }


@pytest.mark.parametrize("backend", ["fairseq", "ctranslate2"])
def test_interrupted_and_continued_is_the_undisturbed_run(
    mono, tmp_path, flags, monkeypatch, backend
):
    """Also where draws belong to a batch: its lines are the same again."""
    if backend == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="pip install -e '.[ctranslate2]'")
    options = GenerateOptions(**flags, mode="topk", backend=backend)
    generate(mono, tmp_path / "whole", options)
    do, done = Worker.do, []

    def interrupted(self, job, show):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.chunk)
        do(self, job, show)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Worker, "do", interrupted)
        generate(mono, tmp_path / "parts", options)
    assert len(list((tmp_path / "parts" / ".work" / "done").iterdir())) == 2
    monkeypatch.setattr(
        Worker, "do", lambda self, job, show: done.append(job.chunk) or do(self, job, show)
    )
    generate(mono, tmp_path / "parts", options)
    assert sorted(done) == list(range(-(-81 // 25)))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
