"""Over-long lines are cut where it hurts least, and nothing of them is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.translation.text.overlong import split_line


@pytest.mark.parametrize(
    "text, limit, parts",
    [
        ("short enough", 12, ["short enough"]),
        ("我走了。你呢？好！", 4, ["我走了。", "你呢？", "好！"]),
        ("我走了。你呢？好！", 7, ["我走了。你呢？", "好！"]),
        ("“我走了。”他说。", 6, ["“我走了。”", "他说。"]),
        ("One. Two? Three!", 5, ["One.", "Two?", "Thr", "ee!"]),
        ("It is 3.14 now. Yes.", 15, ["It is 3.14 now.", "Yes."]),
        ("one, two, three", 5, ["one,", "two,", "three"]),
        ("一，二二，三", 3, ["一，", "二二，", "三"]),
        ("aa bb cc dd", 5, ["aa bb", "cc dd"]),
        ("abcdefgh", 3, ["ab", "cd", "ef", "gh"]),
        ("   ", 1, []),
        ("", 1, []),
    ],
)
def test_where_it_is_cut(text, limit, parts):
    assert split_line(text, lambda part: len(part.strip()), limit) == parts


@given(st.text("ab 1.,!?。，“”\t😀", max_size=60), st.integers(1, 20))
def test_nothing_is_lost_and_nothing_too_large(text, limit):
    size = len
    parts = split_line(text, size, limit)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part == part.strip() and 0 < size(part) <= limit for part in parts)


@given(st.text(min_size=1, max_size=40), st.integers(4, 10))
def test_sizes_that_do_not_add_up(text, limit):
    """A part is measured whole: pieces of a joined text are not those of its parts."""

    def size(part: str) -> int:
        return len(part.encode("utf-8", "surrogatepass")) + part.count(" ")

    parts = split_line(text, size, limit)
    assert all(size(part) <= limit or len(part) == 1 for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_one_character_is_never_cut():
    assert split_line("😀😀", lambda part: 4 * len(part), 3) == ["😀", "😀"]


def test_a_very_long_line_without_any_mark():
    """Measuring grows with the line, not with its square."""
    calls = 0

    def size(part: str) -> int:
        nonlocal calls
        calls += len(part)
        return len(part)

    parts = split_line("x" * 100_000, size, 1000)
    assert "".join(parts) == "x" * 100_000 and max(map(len, parts)) <= 1000
    assert calls < 100_000 * 20
