"""What assemble builds inside a new folder: one train split of bitext and synthetic pairs."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.parallel import cpus
from fairseq_ext.backtranslation.assemble.checks import check_languages, check_scripts
from fairseq_ext.backtranslation.assemble.clean import (
    LEAK,
    Cleaner,
    Found,
    clean,
    draw,
    draw_place,
    part_files,
    survey,
)
from fairseq_ext.backtranslation.assemble.synthetic import SourceEncoder, Synthetic
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.filter_chain import FilterChain, sample
from fairseq_ext.translation.prepare.leaks import LeakGuard
from fairseq_ext.translation.prepare.report import short
from fairseq_ext.translation.prepare.settings import held_out_splits
from fairseq_ext.translation.prepare.steps import open_lines, open_rejects
from fairseq_ext.translation.text.normalise import read_lines

TRAIN = "train"


def fill(
    folder: Path,
    corpus: Corpus,
    synths: list[Synthetic],
    direction: tuple[str, str],
    options: Any,
    chain: FilterChain,
) -> dict[str, Any]:
    """Write everything but manifest.json into a new folder; returns the report.

    direction: (synthetic language, real language), the direction that the folder trains.
    """
    workers, work = options.workers or cpus(), folder / "work"
    work.mkdir()
    texts = [corpus.text(TRAIN, lang) for lang in direction]
    bitext = sample(zip(*map(read_lines, texts), strict=True), seed=options.seed)
    chain.fit(bitext)
    guard = make_guard(corpus, direction)
    scorers = [one for one in chain.filters.values() if getattr(one, "wants_score", False)]
    place = None if options.max_synthetic is None else draw_place(options.seed)
    found: list[Found] = []
    with open_rejects(folder / "rejects.tsv.gz") as rejects:
        for number, synthetic in enumerate(synths, 1):
            drawn = survey(synthetic, bool(scorers), options.seed)
            check_scripts(synthetic, direction, drawn.pairs, bitext[: len(drawn.pairs)])
            check_languages(synthetic, chain, drawn.pairs)
            for one in scorers:
                one.fit_scores(drawn.scores)
            cleaner = Cleaner(f"bt{number}", synthetic, direction, corpus.convention, chain, guard)
            found.append(clean(synthetic, cleaner, chain, work, rejects, workers, place))
        if options.on_leak == "refuse":
            refuse_leaks(found, corpus)
        draw(found, options.max_synthetic, work, rejects)
    check_enough(found)
    copy_vocabulary(corpus, folder, direction)
    pairs = corpus.splits[TRAIN] * options.upsample + sum(one.kept for one in found)
    new = replace(
        corpus,
        path=folder,
        languages=direction,
        splits={TRAIN: pairs, **{name: corpus.splits[name] for name in held_out_splits(corpus)}},
        one_way=True,
    )
    copy_held_out(corpus, new)
    write_text(corpus, new, found, work, options)
    tokens = write_ids(corpus, new, found, synths, work, options, workers)
    shutil.rmtree(work)
    new.save()
    Corpus.open(folder)
    return make_report(corpus, new, found, synths, tokens, options)


def make_guard(corpus: Corpus, direction: tuple[str, str]) -> LeakGuard | None:
    """What finds lines of the bitext's valid and test; None where it has neither."""
    names = held_out_splits(corpus)
    files = {lang: [corpus.text(name, lang) for name in names] for lang in direction}
    return LeakGuard.from_files(files) if names else None


def refuse_leaks(found: list[Found], corpus: Corpus) -> None:
    """UserError where synthetic pairs hold a line of valid or test."""
    count = sum(one.removed[LEAK] for one in found)
    if count:
        rows = [row for one in found for row in one.leaks][:3]
        shown = "; ".join(f"{row.name}: {short(row.target)}" for row in rows)
        raise UserError(
            f"{count:,} synthetic pairs hold a line of valid or test of {corpus.path} ({shown}): leave "
            "them out with --on-leak remove"
        )


def check_enough(found: list[Found]) -> None:
    """UserError where nothing synthetic is left."""
    if any(one.kept for one in found):
        return
    removed = sum((one.removed for one in found), Counter())
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in removed.most_common())
    raise UserError(
        f"none of {sum(one.read for one in found):,} synthetic pairs is left"
        f"{f' (removed: {reasons})' if reasons else ''}: give more, or other --filters"
    )


def copy_vocabulary(corpus: Corpus, folder: Path, direction: tuple[str, str]) -> None:
    """Models and dictionaries of the bitext, byte for byte; UserError where they do not belong together."""
    from fairseq_ext.translation.prepare.binarise import check_dictionary

    for lang in direction:
        check_dictionary(corpus.codec(lang), corpus.dictionary_path(lang))
        for source in (corpus.path / corpus.spm[lang]["file"], corpus.dictionary_path(lang)):
            shutil.copyfile(source, folder / source.name)


def copy_held_out(corpus: Corpus, new: Corpus) -> None:
    """Valid and test byte for byte; ids get the name of the direction that is trained."""
    (new.path / "text").mkdir()
    for name in held_out_splits(corpus):
        shutil.copyfile(corpus.ids(name), new.ids(name))
        for lang in corpus.languages:
            shutil.copyfile(corpus.text(name, lang), new.text(name, lang))
            for end in ("bin", "idx"):
                source, target = corpus.binarised(name, lang), new.binarised(name, lang)
                shutil.copyfile(f"{source}.{end}", f"{target}.{end}")


def write_text(corpus: Corpus, new: Corpus, found: list[Found], work: Path, options: Any) -> None:
    """text/train.*: copies of the bitext, then what is kept of each folder, its sources with the tag."""
    synthetic, real = new.languages
    columns = [
        (corpus.text(TRAIN, synthetic), new.text(TRAIN, synthetic), options.tag),
        (corpus.text(TRAIN, real), new.text(TRAIN, real), None),
        (corpus.ids(TRAIN), new.ids(TRAIN), None),
    ]
    for column, (source, target, tag) in enumerate(columns):
        with open(target, "wb") as file:
            for _ in range(options.upsample):
                with open(source, "rb") as copy:
                    shutil.copyfileobj(copy, file)
            for one in found:
                part = part_files(work, one.name)[column]
                if tag is None:
                    with open(part, "rb") as copy:
                        shutil.copyfileobj(copy, file)
                    continue
                with open_lines(part) as lines:
                    for line in lines:
                        file.write(f"{tag} {line}".encode())


def write_ids(
    corpus: Corpus,
    new: Corpus,
    found: list[Found],
    synths: list[Synthetic],
    work: Path,
    options: Any,
    workers: int,
) -> dict[str, dict[str, int]]:
    """Ids of train: the bitext's own, and those of the synthetic pairs.

    Returns language → tokens of one copy of the "bitext", of "synthetic" and, among these, "fillers".
    """
    from fairseq_ext.translation.prepare.binarise import (
        binarise,
        check_counts,
        concatenate,
        sentence_lengths,
    )

    tokens = {}
    for side, lang in enumerate(new.languages):
        codec, bitext = corpus.codec(lang), corpus.binarised(TRAIN, lang)
        check_counts(corpus.text(TRAIN, lang), bitext)
        counts = {"bitext": int(sentence_lengths(bitext).sum()), "synthetic": 0, "fillers": 0}
        stems = [bitext] * options.upsample
        for one, synthetic in zip(found, synths, strict=True):
            if not one.kept:
                continue
            encode, fillers = None, False
            if side == 0:
                tag = None if options.tag is None else codec.symbol_id(options.tag)
                fillers = synthetic.fillers
                encode = SourceEncoder(codec, tag, fillers)
            text, stem = part_files(work, one.name)[side], work / f"{one.name}.{lang}"
            summary = binarise(text, codec, stem, workers, encode=encode)
            if summary.num_replaced and not fillers:
                raise UserError(
                    f"{synthetic.path}: {summary.num_replaced:,} pieces of its {lang} side are unknown "
                    f"to the models of {corpus.path}: please report this, nothing was kept"
                )
            counts["synthetic"] += summary.num_tok
            counts["fillers"] += summary.num_replaced
            stems.append(stem)
        concatenate(stems, codec.size, new.binarised(TRAIN, lang))
        check_counts(new.text(TRAIN, lang), new.binarised(TRAIN, lang))
        if len(sentence_lengths(new.binarised(TRAIN, lang))) != new.splits[TRAIN]:
            raise UserError(
                f"train.{lang} has not {new.splits[TRAIN]:,} sentences: {corpus.path} is damaged, "
                "prepare it again"
            )
        tokens[lang] = counts
    return tokens


def make_report(
    corpus: Corpus,
    new: Corpus,
    found: list[Found],
    synths: list[Synthetic],
    tokens: dict[str, dict[str, int]],
    options: Any,
) -> dict[str, Any]:
    """What manifest.json keeps and the table shows."""
    removed = sum((one.removed for one in found), Counter())
    reasons = sum((one.reasons for one in found), Counter())
    bitext, kept = corpus.splits[TRAIN], sum(one.kept for one in found)
    return {
        "languages": list(new.languages),
        "tag": options.tag,
        "counts": {
            "in": sum(one.read for one in found),
            "out": kept,
            "removed": dict(removed.most_common()),
        },
        "unusable": dict(reasons.most_common()),
        "folders": [dict(_folder(*both)) for both in zip(found, synths, strict=True)],
        "effective": {
            "bitext": bitext,
            "copies": options.upsample,
            "synthetic": kept,
            "share": kept / new.splits[TRAIN],
            "tokens": tokens,
        },
        "splits": new.splits,
        "joint": new.joint,
        "split_sha256": new.split_sha256,
    }


def _folder(one: Found, synthetic: Synthetic) -> Iterator[tuple[str, Any]]:
    yield "name", one.name
    yield "mode", synthetic.mode
    yield "round", synthetic.round
    yield "fillers", synthetic.fillers
    yield "counts", {"in": one.read, "out": one.kept, "removed": dict(one.removed.most_common())}
