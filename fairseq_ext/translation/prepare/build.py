"""What prepare builds inside a new folder: splits, models, dictionaries, ids."""

import shutil
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from ext_common.parallel import cpus
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.filter_chain import FilterChain
from fairseq_ext.translation.prepare.hashes import key_hash
from fairseq_ext.translation.prepare.leaks import LeakGuard
from fairseq_ext.translation.prepare.report import about_leaks, say, warn
from fairseq_ext.translation.prepare.settings import Settings, held_out_splits
from fairseq_ext.translation.prepare.splits import SPLITS, split, split_sha256
from fairseq_ext.translation.prepare.steps import (
    Cleaner,
    Kept,
    clean,
    open_lines,
    open_rejects,
    survey,
    write_splits,
)
from fairseq_ext.translation.text.identify import check_language
from fairseq_ext.translation.text.moses import looks_tokenised
from fairseq_ext.translation.text.spm import Codec, train_model
from fairseq_ext.translation.text.tables import RECORDS, Layout, kind_of, read_pairs, read_rows

# SentencePiece adds up in threads, so another number of them is another model.
SPM_THREADS = 2
QUANTILES = (1, 5, 25, 50, 75, 95, 99)


def fill(
    folder: Path,
    inputs: list[Path],
    given: dict[str, list[Path]],
    options,
    settings: Settings,
    chain: FilterChain,
    cleaner: Cleaner,
) -> dict[str, Any]:
    """Write everything but manifest.json into a new folder; returns the report."""
    workers = options.workers or cpus()
    text, work = folder / "text", folder / "work"
    text.mkdir()
    work.mkdir()
    given = {name: files for name, files in given.items() if files}
    layout = Layout(options.columns, options.languages, options.fields)
    held_out = {
        name: write_given(files, layout, cleaner, text, name) for name, files in given.items()
    }
    check_columns(inputs, layout)
    total, drawn = survey(inputs, layout, cleaner, options.seed)
    for lang, other, side in zip(
        options.languages, options.languages[::-1], zip(*drawn, strict=True), strict=False
    ):
        if options.check_language:
            name = f"the {'source' if lang == options.source_lang else 'target'}"
            remedy = "; --no-check-language where it is of that language all the same"
            check_language(side, lang, name, other, remedy)
        why = looks_tokenised(side, lang)
        if why:
            warn(
                f"the {lang} text looks as if it had been tokenised ({why}), and a model writes as it has "
                "learnt: --detokenise undoes it"
            )
    chain.fit(drawn)
    cleaner.use(chain, make_guard(text, given, options.languages, settings.base))
    with open_rejects(folder / "rejects.tsv.gz") as rejects:
        pairs = read_pairs(inputs, layout)
        keep = options.on_leak == "keep"
        kept, removed, leaks = clean(pairs, total, chain, cleaner, work, rejects, workers, keep)
    if leaks.first and options.on_leak != "remove":
        names = [f"--{name}" for name in given] + ([settings.base.path] if settings.base else [])
        told = about_leaks(leaks, names)
        if not keep:
            raise UserError(
                f"{told}: leave them out with --on-leak remove, or, where these are the official splits of "
                "a data set, --on-leak keep"
            )
        warn(f"{told}: they are kept, as --on-leak keep says, and scores are the better for it")
    counts = {"in": total, "out": len(kept), "removed": dict(removed.most_common())}
    counts |= {"leaks_kept": leaks.equal + leaks.near} if keep else {}
    check_enough(counts, inputs, 3 if settings.base is None else 1)
    codes = divide(kept, settings, options.seed)
    found = {name: int((codes == code).sum()) for code, name in enumerate(SPLITS)}
    write_splits(
        kept, codes, options.languages, [n for n in SPLITS if found[n] or n == "train"], text
    )
    for name, column in held_out.items():
        found[name] = len(column[0])
    corpus = Corpus(
        path=folder,
        languages=options.languages,
        normalise=settings.normalise,
        joint=settings.joint,
        extra_symbols=settings.extra_symbols,
        spm=write_vocabulary(folder, found["train"], options, settings),
        splits={name: number for name, number in found.items() if number},
        split_sha256=hash_of_split(kept, codes, held_out),
        opencc=settings.opencc,
    )
    splits = write_ids(corpus, workers)
    shutil.rmtree(work)
    corpus.save()
    quantiles = np.quantile(np.frombuffer(kept.ratios, dtype=np.float32), np.divide(QUANTILES, 100))
    return {
        "languages": list(options.languages),
        "counts": counts,
        "splits": splits,
        "vocabulary": {lang: corpus.codec(lang).size for lang in corpus.languages},
        "joint": settings.joint,
        "length_ratio": {
            f"{q} %": round(float(x), 3) for q, x in zip(QUANTILES, quantiles, strict=True)
        },
        "split_sha256": corpus.split_sha256,
    }


def write_given(
    files: list[Path], layout: Layout, cleaner: Cleaner, folder: Path, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise the pairs of a given valid or test into `folder`; all of them, in their order.

    Returns the hashes of their sides, uint64 (N,) each. UserError for a pair with an empty side.
    """
    check_columns(files, layout)
    keys = array("Q"), array("Q")
    source, target = cleaner.languages
    with (
        open_lines(folder / f"{name}.{source}", "w") as source_file,
        open_lines(folder / f"{name}.{target}", "w") as target_file,
        open_lines(folder / f"{name}.ids", "w") as ids,
    ):
        for number, *raw in read_pairs(files, layout):
            pair = cleaner.pair(*raw)
            for column, file, side, line in zip(
                keys, (source_file, target_file), ("source", "target"), pair, strict=True
            ):
                if not line:
                    raise UserError(
                        f"{files[0]}, line {number}: the {side} is empty, but --{name} is used as it "
                        "is: remove the pair"
                    )
                file.write(line + "\n")
                column.append(key_hash(line))
            ids.write(f"{number}\n")
    if not keys[0]:
        raise UserError(f"{files[0]} has no pairs: give another --{name}, or leave it out")
    return tuple(np.frombuffer(column, dtype=np.uint64) for column in keys)


def check_columns(files: list[Path], layout: Layout) -> None:
    """UserError where the first row of a table has not the columns asked for."""
    if len(files) == 2 or layout.fields or kind_of(files[0]) in RECORDS:
        return
    columns = layout.columns
    for number, row in enumerate(read_rows(files[0]), 1):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < max(columns):
            found = "no tab" if len(row) == 1 else f"only {len(row)} columns"
            raise UserError(
                f"{files[0]}, line {number} has {found}, but columns {columns[0]} and {columns[1]} are "
                "to be read: give --columns, or two parallel files"
            )
        return


def make_guard(folder: Path, given, languages, base: Corpus | None) -> LeakGuard | None:
    """What finds lines of given valid and test, and of those of the folder the vocabulary is from."""
    files = {lang: [folder / f"{name}.{lang}" for name in given] for lang in languages}
    if base is not None:
        for lang in languages:
            files[lang] += [base.text(name, lang) for name in held_out_splits(base)]
    return LeakGuard.from_files(files) if files[languages[0]] else None


def check_enough(counts: dict[str, Any], inputs: list[Path], least: int) -> None:
    """UserError where filters leave fewer than `least` pairs."""
    if counts["out"] >= least:
        return
    name = " and ".join(map(str, inputs))
    if not counts["in"]:
        raise UserError(f"{name} is empty: give a file with pairs")
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts["removed"].items())
    removed = f" (removed: {reasons})" if reasons else ""
    raise UserError(
        f"{counts['out']} of {counts['in']:,} pairs of {name} are left{removed}, at least {least} are "
        "needed: give more, or other --filters"
    )


def divide(kept: Kept, settings: Settings, seed: int) -> np.ndarray:
    """int8 (N,): place in SPLITS of each pair."""
    keys = [np.frombuffer(column, dtype=np.uint64) for column in kept.keys]
    codes = split(*keys, seed, settings.fractions["valid"], settings.fractions["test"])
    for code, name in enumerate(SPLITS):
        if settings.fractions.get(name) and not (codes == code).any():
            warn(
                f"no pair could be held out for {name}, because too many share a sentence with each "
                f"other: give one with --{name}"
            )
    return codes


def hash_of_split(kept: Kept, codes: np.ndarray, held_out: dict[str, tuple]) -> str:
    """:func:`split_sha256` of all pairs, those of a given valid and test among them."""
    codes, keys = [codes], [[np.frombuffer(c, dtype=np.uint64)] for c in kept.keys]
    for name, columns in held_out.items():
        codes.append(np.full(len(columns[0]), SPLITS.index(name), dtype=np.int8))
        for all_keys, column in zip(keys, columns, strict=True):
            all_keys.append(column)
    return split_sha256(np.concatenate(codes), *(np.concatenate(parts) for parts in keys))


def write_vocabulary(folder: Path, pairs: int, options, settings: Settings) -> dict[str, dict]:
    """spm.LANG.model and dict.LANG.txt, trained on train only; returns corpus.json's "spm"."""
    languages = options.languages
    models = {lang: folder / f"spm.{lang}.model" for lang in languages}
    texts = [folder / "text" / f"train.{lang}" for lang in languages]
    if settings.base is not None:
        from fairseq_ext.translation.prepare.binarise import check_dictionary

        for lang, path in models.items():
            shutil.copyfile(settings.base.path / settings.base.spm[lang]["file"], path)
            shutil.copyfile(settings.base.dictionary_path(lang), folder / f"dict.{lang}.txt")
            check_dictionary(settings.base.codec(lang), folder / f"dict.{lang}.txt")
    else:
        for files in [texts] if settings.joint else [[text] for text in texts]:
            say(f"SentencePiece learns from {', '.join(file.name for file in files)}")
            model = train_model(
                files,
                options.spm_size,
                options.spm_kind,
                pairs,
                settings.extra_symbols,
                options.seed,
                SPM_THREADS,
                options.character_coverage,
            )
            for file in files:
                models[file.name.removeprefix("train.")].write_bytes(model)
        # here, because SentencePiece needs the memory that torch and fairseq would already occupy
        from fairseq_ext.translation.prepare.binarise import write_dictionary

        for lang, path in models.items():
            codec = Codec.from_file(path, settings.extra_symbols)
            write_dictionary(codec, folder / f"dict.{lang}.txt")
    return {lang: {"file": path.name, "sha256": sha256_file(path)} for lang, path in models.items()}


def write_ids(corpus: Corpus, workers: int) -> dict[str, dict[str, Any]]:
    """Binarise all splits; returns split → pairs, tokens and unknown pieces of each language."""
    from fairseq_ext.translation.prepare.binarise import binarise

    found = {}
    for name, pairs in corpus.splits.items():
        tokens, unknown = {}, {}
        for lang in corpus.languages:
            summary = binarise(
                corpus.text(name, lang), corpus.codec(lang), corpus.binarised(name, lang), workers
            )
            if summary.num_seq != pairs:
                raise UserError(
                    f"{summary.num_seq:,} of {pairs:,} lines of {name}.{lang} were binarised: please "
                    "report this"
                )
            tokens[lang], unknown[lang] = summary.num_tok, summary.num_replaced
        found[name] = {"pairs": pairs, "tokens": tokens, "unknown": unknown}
    return found
