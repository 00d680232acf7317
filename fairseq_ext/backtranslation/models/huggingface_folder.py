"""What a Hugging Face model's files say before it is loaded: where it is, what it is, which languages."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import regex

from ext_common.cli import UserError
from ext_common.manifest import known_sha256
from fairseq_ext.translation.text.normalise import language

INSTALL = "pip install -e '.[huggingface]'"
# Of ISO 639-3 (and 639-2/B) to 639-1, beside those that `text.language` knows.
_TWO_LETTERS = dict(
    pair.split(":")
    for pair in "afr:af sqi:sq amh:am hye:hy aze:az eus:eu bel:be ben:bn bos:bs bul:bg cat:ca ces:cs cze:cs "
    "cym:cy dan:da deu:de ger:de nld:nl dut:nl ell:el gre:el epo:eo est:et fas:fa per:fa pes:fa fin:fi "
    "fra:fr fre:fr gle:ga glg:gl guj:gu heb:he hin:hi hrv:hr hun:hu isl:is ice:is ind:id ita:it kan:kn "
    "kat:ka geo:ka kaz:kk kir:ky lat:la lav:lv lit:lt mal:ml mar:mr mkd:mk mlt:mt mon:mn msa:ms zsm:ms "
    "nep:ne nob:nb nno:nn nor:no pan:pa pol:pl por:pt ron:ro rum:ro sin:si slk:sk slv:sl som:so spa:es "
    "srp:sr swa:sw swh:sw swe:sv tam:ta tat:tt tel:te tgl:tl tuk:tk tur:tr uig:ug ukr:uk urd:ur uzb:uz "
    "vie:vi yid:yi zul:zu".split()
)
_NAMED = regex.compile(
    r"opus[-_]?mt(?:[-_]tc)?(?:[-_](?:big|base|tiny))?-([a-z]{2,3})-([a-z]{2,3})$"
)
# What is loaded: weights, vocabulary, configuration; not a README, a log or another framework's copy.
_SUFFIXES = (".json", ".jinja", ".model", ".spm", ".txt", ".safetensors", ".bin")
_IGNORED = ("training_args.bin", "trainer_state.json", "all_results.json", "requirements.txt")


def find_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a model: `path` itself, or a copy of what the hub has under this name.

    What was fetched once is used again without asking. UserError where there is neither.
    """
    name = os.fspath(path)
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file: give the folder of a Hugging Face model")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is no folder: give the folder of a Hugging Face model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{name} is no folder, and the hub cannot be asked ({error}): {INSTALL}"
        ) from error
    wanted = [f"*{suffix}" for suffix in _SUFFIXES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except Exception:  # whatever its reason: then it is fetched
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # huggingface_hub passes on errors of several libraries
        raise UserError(
            f"{name} is no folder and cannot be fetched from the Hugging Face hub"
            f" ({first_line(error)}): give a local folder"
        ) from error


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 over names and contents of the files of a folder that a model is loaded from."""
    folder = find_folder(path)
    digest = hashlib.sha256()
    for file in model_files(folder):
        digest.update(f"{file.name}\0{known_sha256(file)}\n".encode())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files that decide what a model does; of two formats of weights the one that is loaded."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in _SUFFIXES and file.name not in _IGNORED and file.is_file()
    ]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if not file.name.startswith("pytorch_model")]
    return files


def describe(
    path: str | os.PathLike[str],
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
) -> dict[str, Any]:
    """{"sha256", "backend", "source_lang", "target_lang"} of a model, from its files alone."""
    folder = find_folder(path)
    source, target = languages(folder, source_lang, target_lang, prefix, os.fspath(path))
    return {
        "sha256": fingerprint(folder),
        "backend": "huggingface",
        "source_lang": source,
        "target_lang": target,
    }


def languages(
    folder: Path,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
    name: str | None = None,
) -> tuple[str, str]:
    """(source, target) in two letters where there are: as given, as the files or the name say.

    prefix: `>>eng<<` says the target. UserError where nothing does, or where two contradict.
    """
    name = name or str(folder)
    saved = [read_json(folder / file) for file in ("tokenizer_config.json", "config.json")]
    named = _NAMED.search(Path(name).name.lower()) or _NAMED.search(folder.resolve().name.lower())
    found = []
    given = {"source": source_lang, "target": target_lang}
    for number, side in enumerate(given):
        said = [given[side]]
        if side == "target" and prefix and prefix.startswith(">>"):
            said.append(prefix.strip("<> "))
        said += [one.get(f"{side}_lang") for one in saved]
        said += [named[number + 1]] if named else []
        codes = [short_code(one) for one in said if isinstance(one, str) and one]
        if not codes:
            raise UserError(
                f"{name} does not say its {side} language: give --model-{side} (such as zh)"
            )
        # "roa" or "mul" in the files is a family, which a language may be one of
        if given[side] and len(codes) > 1 and len(codes[1]) == 2 and codes[0] != codes[1]:
            raise UserError(
                f"{name} has the {side} language {codes[1]}, not {codes[0]}: give another model, or"
                f" leave out --model-{side}"
            )
        found.append(codes[0])
    return found[0], found[1]


def short_code(code: str) -> str:
    """ISO 639-1 of a code of 639-3, with or without script and country; others as they are."""
    base = language(code)
    return _TWO_LETTERS.get(base, base)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): fetch the model again"
        ) from error
    return found if isinstance(found, dict) else {}


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line that can be read."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 300 else line[:300] + "…"
