"""English–Chinese sentence pairs generated from CLDR, the Unicode locale data, by Babel: no download.

python scripts/cldr_corpus.py DEST

Writes DEST/train.tsv, valid.tsv and test.tsv (English, Chinese, kind), which
`python -m fairseq_ext.translation.prepare DEST/train.tsv DATA --valid DEST/valid.tsv --test DEST/test.tsv
--source-lang en --target-lang zh` reads, and mono.zh: lines of Chinese alone, for back-translation. Dates,
times, numbers with units and amounts of money stand in a few sentences written by hand (kinds date, time,
number, money), and so do names of countries, languages and currencies (kind name). The split is by value and
by name: a date, a number or a name of test is in no line of train or of mono.zh, and the same holds for every
two of the four. Values can be worked out from their parts; a name that was never seen cannot be known, so
that lines of the kind name have a low score by nature. This is generated text: figures on it say nothing
about the translation of real text. The same command writes the same bytes.
"""

import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.manifest import atomic_write, write_manifest
from fairseq_ext.translation.text.normalise import match_key

SPLITS = ("train", "valid", "test", "mono")
# The small ones first, mono last: what is alike but for punctuation is left out of the later one.
MADE_IN_ORDER = ("test", "valid", "train", "mono")
# Shares of names and of other values in test, in valid and in mono.zh, and of the kinds among the lines.
HELD_OUT = {
    "name": {"test": 0.06, "valid": 0.06, "mono": 0.06},
    "else": {"test": 0.03, "valid": 0.03, "mono": 0.2},
}
KINDS = {"date": 25, "time": 15, "number": 25, "money": 15, "name": 20}

TEMPLATES = {
    "date": [
        ("The meeting is on {date}.", "会议在{date}举行。"),
        ("He was born on {date}.", "他出生于{date}。"),
        ("The shop has been closed since {date}.", "这家店从{date}起关门了。"),
        ("Please answer before {date}.", "请在{date}之前答复。"),
        ("The letter of {date} did not arrive.", "{date}的信没有寄到。"),
        ("We will be away from {date} to {date2}.", "我们从{date}到{date2}不在。"),
        ("What happened on {date}?", "{date}发生了什么事？"),
        ("The school opens on {date} at {time}.", "学校于{date}{time}开门。"),
    ],
    "time": [
        ("The train leaves at {time}.", "火车{time}开。"),
        ("It is {time} now.", "现在是{time}。"),
        ("Wake me up at {time}, please.", "请在{time}叫醒我。"),
        ("The film begins at {time} and ends at {time2}.", "电影{time}开始，{time2}结束。"),
        ("Nobody was here before {time}.", "{time}之前没有人在这里。"),
        ("Can you come at {time}?", "你能{time}来吗？"),
    ],
    "number": [
        ("This weighs more than {unit}.", "这个超过{unit}。"),
        ("There are {number} people in the hall.", "大厅里有{number}个人。"),
        ("He counted {number} birds.", "他数了{number}只鸟。"),
        ("The machine needs {unit}.", "这台机器需要{unit}。"),
        ("Is it {unit} or {unit2}?", "是{unit}还是{unit2}？"),
        ("The answer is {number}.", "答案是{number}。"),
        ("We measured {unit} on {date}.", "我们在{date}测得{unit}。"),
        ("Only {percent} of them agreed.", "他们当中只有{percent}同意。"),
    ],
    "money": [
        ("The ticket costs {money}.", "这张票要{money}。"),
        ("She paid {money} for {number} books.", "她花{money}买了{number}本书。"),
        ("I owe you {money}.", "我欠你{money}。"),
        ("The price rose from {money} to {money2}.", "价格从{money}涨到了{money2}。"),
        ("He won {money} on {date}.", "他在{date}赢了{money}。"),
    ],
    "name": [
        ("She has never been to {territory}.", "她从来没有去过{territory}。"),
        ("Where is {territory}?", "{territory}在哪里？"),
        ("We will stay in {territory} until {date}.", "我们会在{territory}待到{date}。"),
        ("My neighbour speaks {language}.", "我的邻居会说{language}。"),
        ("This book is in {language}, not in {language2}.", "这本书是{language}的，不是{language2}的。"),
        ("The word for currency number {number} is {currency}.", "第{number}种货币叫做{currency}。"),
        ("Do they speak {language} in {territory}?", "{territory}的人说{language}吗？"),
    ],
}  # fmt: skip
UNITS = """mass-kilogram mass-gram mass-tonne length-kilometer length-meter length-centimeter
    length-mile volume-liter volume-cubic-meter duration-hour duration-minute duration-second
    duration-day duration-week duration-year temperature-celsius speed-kilometer-per-hour
    area-square-kilometer area-hectare power-watt power-kilowatt digital-megabyte digital-gigabyte
    electric-volt frequency-hertz""".split()
# Draws in a row that bring no new pair, after which there are no more.
MISSES = 2000


@dataclass
class CorpusOptions:
    """How much to make."""

    pairs: int = field(default=12_000, metadata={"help": "pairs of train"})
    valid: int = field(default=300, metadata={"help": "pairs of valid"})
    test: int = field(default=500, metadata={"help": "pairs of test"})
    mono: int = field(default=2_000, metadata={"help": "lines of mono.zh; 0: do not write it"})
    seed: int = field(
        default=1, metadata={"help": "seed of values, names, sentences and the split"}
    )

    def __post_init__(self):
        if min(self.pairs, self.valid, self.test) < 1:
            raise ValueError("--pairs, --valid and --test must be at least 1")
        if self.mono < 0:
            raise ValueError(f"--mono must not be negative, got {self.mono}")


class Pair(NamedTuple):
    """A line of a corpus; values: what stands in it, as (group, key)."""

    source: str
    target: str
    kind: str
    values: tuple[tuple[str, str], ...]


class Value(NamedTuple):
    """group, key: what decides the split. The same thing has the same key in every format."""

    group: str
    key: str
    source: str
    target: str


def main(argv):
    """The command."""
    parser = Parser(prog="python scripts/cldr_corpus.py", description=__doc__)
    parser.add_argument("dest", metavar="DEST", help="folder to write")
    add_dataclass(parser, CorpusOptions)
    args = parser.parse_args(argv)
    options = from_args(CorpusOptions, args)
    if Path(args.dest).exists() and not Path(args.dest).is_dir():
        raise UserError(f"{args.dest} is a file: give a folder to write")
    corpus = make_corpus(options)
    for split, pairs in corpus.items():
        if split == "mono":
            continue
        with atomic_write(Path(args.dest) / f"{split}.tsv") as file:
            for pair in pairs:
                file.write(f"{pair.source}\t{pair.target}\t{pair.kind}\n")
    if corpus["mono"]:
        with atomic_write(Path(args.dest) / "mono.zh") as file:
            file.writelines(f"{pair.target}\n" for pair in corpus["mono"])
    counts = {split: len(pairs) for split, pairs in corpus.items()}
    # Last: where it lies, all of the folder does.
    write_manifest(args.dest, inputs={}, counts=counts, options=options, seed=options.seed)
    print(
        f"{args.dest}: {counts['train']:,} pairs of generated text to train on, {counts['valid']:,} to "
        f"validate and {counts['test']:,} to test, {counts['mono']:,} lines of Chinese alone; no value or "
        "name of one of them is in another"
    )


def make_corpus(options: CorpusOptions) -> dict[str, list[Pair]]:
    """{"train", "valid", "test", "mono"} → pairs, no two of them alike on either side.

    Raises UserError where the sentences and values do not give as many.
    """
    values = Values(options.seed)
    wanted = {"train": options.pairs, "valid": options.valid}
    wanted |= {"test": options.test, "mono": options.mono}
    seen: set[str] = set()
    corpus: dict[str, list[Pair]] = {}
    for split in MADE_IN_ORDER:
        rng = random.Random(f"{options.seed} {split}")
        pairs, misses = [], 0
        while len(pairs) < wanted[split]:
            if misses > MISSES:
                raise UserError(
                    f"there are only {len(pairs)} different pairs for {split}: ask for fewer than "
                    f"{wanted[split]}"
                )
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            pair = make_pair(kind, split, values, rng)
            keys = {f"source {match_key(pair.source)}", f"target {match_key(pair.target)}"}
            misses += 1
            if keys.isdisjoint(seen):
                seen |= keys
                pairs.append(pair)
                misses = 0
        corpus[split] = pairs
    return {split: corpus[split] for split in SPLITS}


def make_pair(kind: str, split: str, values: "Values", rng: random.Random) -> Pair:
    """A sentence of `kind` with values of `split`."""
    source, target = rng.choice(TEMPLATES[kind])
    fields = [
        name
        for name in (*values.draws, *(f"{n}2" for n in values.draws))
        if f"{{{name}}}" in source
    ]
    found = {name: values.draw(name.removesuffix("2"), split, rng) for name in fields}
    return Pair(
        source.format(**{name: value.source for name, value in found.items()}),
        target.format(**{name: value.target for name, value in found.items()}),
        kind,
        tuple((value.group, value.key) for value in found.values()),
    )


class Values:
    """Values and names in both languages, and which split each belongs to."""

    def __init__(self, seed: int):
        from babel import Locale

        self.seed = seed
        self.en, self.zh = Locale("en"), Locale("zh")
        self.names = {
            group: both_names(getattr(self.en, attribute), getattr(self.zh, attribute))
            for group, attribute in (
                ("territory", "territories"),
                ("language", "languages"),
                ("currency", "currencies"),
            )
        }
        self.codes = sorted(code for code in self.en.currencies if code in self.zh.currencies)
        self.draws: dict[str, Callable[[random.Random], Value]] = {
            "date": self.date,
            "time": self.time,
            "number": self.number,
            "percent": self.percent,
            "unit": self.unit,
            "money": self.money,
            **{group: lambda rng, group=group: self.name(group, rng) for group in self.names},
        }

    def draw(self, name: str, split: str, rng: random.Random) -> Value:
        """A value of a split."""
        while True:
            value = self.draws[name](rng)
            if self.split_of(value.group, value.key) == split:
                return value

    def split_of(self, group: str, key: str) -> str:
        """The split that a value belongs to: a function of the value and the seed alone."""
        digest = hashlib.sha256(f"{self.seed} {group} {key}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        for split, share in HELD_OUT["name" if group in self.names else "else"].items():
            place -= share
            if place < 0:
                return split
        return "train"

    def date(self, rng: random.Random) -> Value:
        from babel.dates import format_date

        day = datetime.date(1950, 1, 1) + datetime.timedelta(rng.randrange(36_525))
        style, english = rng.choice(("full", "long", "medium")), rng.choice(("en", "en_GB"))
        chinese = "full" if style == "full" else "long"
        return Value(
            "date",
            day.isoformat(),
            format_date(day, style, english),
            format_date(day, chinese, self.zh),
        )

    def time(self, rng: random.Random) -> Value:
        from babel.dates import format_time

        style = rng.choice(("short", "medium"))
        seconds = rng.randrange(60) if style == "medium" else 0
        time = datetime.time(rng.randrange(24), rng.randrange(60), seconds)
        # CLDR puts a narrow no-break space before PM.
        english = format_time(time, style, locale=self.en).replace("\u202f", " ")
        return Value("time", f"{time:%H%M}", english, format_time(time, style, locale=self.zh))

    def number(self, rng: random.Random) -> Value:
        from babel.numbers import format_decimal

        number = self._number(rng, decimals=0)
        return self._value(*(format_decimal(number, locale=one) for one in (self.en, self.zh)))

    def percent(self, rng: random.Random) -> Value:
        from babel.numbers import format_decimal

        number = rng.randrange(1, 1000) / 10
        return self._value(
            *(f"{format_decimal(number, locale=one)}%" for one in (self.en, self.zh))
        )

    def unit(self, rng: random.Random) -> Value:
        number, unit = self._number(rng, decimals=rng.randrange(2)), rng.choice(UNITS)
        return self._value(*(in_unit(number, unit, locale) for locale in (self.en, self.zh)))

    def money(self, rng: random.Random) -> Value:
        from babel.numbers import format_currency

        # The ISO code of the currency, which is copied; its name would be one more name to know.
        number, code = self._number(rng, decimals=2), rng.choice(self.codes)
        texts = (
            format_currency(number, code, "#,##0.00 ¤¤", locale, currency_digits=False)
            for locale in (self.en, self.zh)
        )
        return self._value(*texts)

    def name(self, group: str, rng: random.Random) -> Value:
        source, target = rng.choice(self.names[group])
        return Value(group, match_key(source), source, target)

    def _number(self, rng: random.Random, decimals: int) -> float:
        # As many of two digits as of six.
        return round(10 ** rng.uniform(0.5, 6), decimals)

    def _value(self, source: str, target: str) -> Value:
        # By digits alone: 1.5 and 15 look alike to whatever leaves punctuation out.
        return Value("number", "".join(c for c in source if c.isdigit()), source, target)


def both_names(english, chinese) -> list[tuple[str, str]]:
    """(English, Chinese) names, sorted, without those that are explained or shared."""
    found: dict[str, tuple[str, str]] = {}
    taken: set[str] = set()
    for code in sorted(english):
        names = english[code], chinese.get(code, "")
        plain = all(name and not set(name) & set("()（）[]0123456789") for name in names)
        keys = set(map(match_key, names))
        if plain and not names[1].isascii() and keys.isdisjoint(taken):
            taken |= keys
            found[code] = names
    return sorted(found.values())


def in_unit(number: float, unit: str, locale) -> str:
    """A number with its unit in words."""
    from babel.units import format_unit

    text = format_unit(number, unit, "long", locale=locale)
    # Where CLDR has the long form by an alias only, Babel writes the name of the unit itself.
    return format_unit(number, unit, "short", locale=locale) if unit in text else text


if __name__ == "__main__":
    run(main)
