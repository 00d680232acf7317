"""CTranslate2 for models of Hugging Face: converted once, checked and kept, or given ready-made.

    backend, vocabulary = open_model("opus-mt-zh-en")        # a Hugging Face folder: int8 on a CPU
    backend, vocabulary = open_model("opus-mt-zh-en-ct2")    # a folder with model.bin

A ready-made folder is one of ours, or of ct2-transformers-converter with the tokenizer's files in it or in
a folder of their own. CTranslate2's silent limits (1,024 pieces read, 256 written, a beam of 2) never hold.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import atomic_json, user_cache, versions
from fairseq_ext.backtranslation.models.huggingface import (
    import_transformers,
    load_model,
    load_vocabulary,
)
from fairseq_ext.backtranslation.models.huggingface_folder import (
    find_folder,
    fingerprint,
    first_line,
    languages,
    model_files,
    read_json,
)
from fairseq_ext.backtranslation.models.huggingface_vocabulary import (
    HuggingFaceVocabulary,
    positions,
)
from fairseq_ext.translation.decode.ctranslate import (
    opener,
    read_vocabulary,
    usable_device,
    usable_type,
)
from fairseq_ext.translation.decode.ctranslate_backend import (
    DESCRIPTION,
    VERSION,
    CTranslate2Backend,
    import_ctranslate2,
    token,
)
from fairseq_ext.translation.decode.ctranslate_folder import converted_once, read_description
from fairseq_ext.translation.decode.shortlist import with_shortlist

MODEL = "model.bin"
# In a converted folder: CTranslate2 has a config.json of its own.
TOKENIZER = "tokenizer"
SAMPLES = 100
LEAST_AGREEMENT = 0.99


class HuggingFaceCTranslate2Backend(CTranslate2Backend):
    """Decodes the ids of a Hugging Face tokenizer.

    source_eos: whether the model adds `</s>` to a source itself; what Hugging Face's are converted to
    mostly does not.
    """

    def __init__(
        self,
        model: Any,
        places: Sequence[int],
        vocabulary: HuggingFaceVocabulary,
        source_eos: bool = False,
        reopen: Any = None,
    ):
        self.ids = vocabulary.tokenizer.get_vocab()
        super().__init__(model, places, len(self.ids), reopen)
        self.names = {number: name for name, number in self.ids.items()}
        self.end = -1 if source_eos else None
        self.never = [[self.names[number]] for number in vocabulary.code_ids] or None

    def _translate(self, *batch: Any, **how: Any):
        return super()._translate(*batch, suppress_sequences=self.never, **how)

    def _sources(self, batch: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.names[i] for i in ids[: self.end]] for ids in batch]

    def _id(self, token: str) -> int:
        return self.ids[token]


def open_model(
    path: str | os.PathLike,
    device: str = "cpu",
    compute_type: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    threads: int | None = None,
    shortlist: str | None = None,
) -> tuple[CTranslate2Backend, Any]:
    """A Hugging Face folder, converted where it was not yet, or a CTranslate2 folder, ready to decode.

    compute_type: int8 on a CPU and float16 on a GPU where none is given. tokenizer: the folder of a
    ready-made model's tokenizer, where it is not in the model's. shortlist: as of
    `translation.decode.ctranslate.open_model`. UserError, in one sentence.
    """
    ctranslate2 = import_ctranslate2()
    device, index = usable_device(device, ctranslate2)
    compute_type = compute_type or ("int8" if device == "cpu" else "float16")
    compute_type = usable_type(compute_type, device, ctranslate2)
    name, folder = os.fspath(path), Path(path)
    saying = (source_lang, target_lang, prefix)
    if is_ready(folder):
        tokens = tokenizer_folder(folder, tokenizer)
    else:
        if tokenizer:
            raise UserError(f"{name} is no CTranslate2 model: leave out --tokenizer")
        tokens = find_folder(path)
        folder = converted(tokens, compute_type, saying, name)
    vocabulary: Any
    if tokens is None:
        vocabulary = read_vocabulary(folder, read_description(folder))
        naming = token
    else:
        vocabulary = load_vocabulary(tokens, *saying, name)
        check_vocabulary(folder, vocabulary, tokens)
        naming = vocabulary.tokenizer.convert_ids_to_tokens
    whole = with_shortlist(folder, shortlist, vocabulary, naming) if shortlist else folder
    models = opener(whole, device, index, compute_type, threads)
    try:
        model = models()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be loaded by CTranslate2 ({first_line(error)}): convert it again"
        ) from error
    backend: CTranslate2Backend
    if tokens is None:
        size, places = vocabulary.target.size, read_description(folder)["positions"]
        backend = CTranslate2Backend(model, places, size, lambda: models(1))
    else:
        places = places_of(folder, tokens, vocabulary)
        source_eos = bool(read_json(folder / "config.json").get("add_source_eos"))
        backend = HuggingFaceCTranslate2Backend(
            model, places, vocabulary, source_eos, lambda: models(1)
        )
    backend.shortlist = bool(shortlist)
    return backend, vocabulary


def describe(
    path: str | os.PathLike,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """{"sha256", "backend", "source_lang", "target_lang"} of a model, from its files alone."""
    folder = Path(path)
    saying = (source_lang, target_lang, prefix)
    if not is_ready(folder):
        folder = find_folder(path)
        digest, tokens = fingerprint(folder), folder
    else:
        tokens = tokenizer_folder(folder, tokenizer)
        description = read_json(folder / DESCRIPTION)
        digest = description.get("checkpoint_sha256") or fingerprint(folder)
        if tokenizer:
            both = f"{digest} {fingerprint(tokens)}"
            digest = hashlib.sha256(both.encode()).hexdigest()
    if tokens is None:
        source, target = (
            description["vocabulary"][f"{side}_lang"] for side in ("source", "target")
        )
    else:
        source, target = languages(tokens, *saying, os.fspath(path))
    return {
        "sha256": digest,
        "backend": "ctranslate2",
        "source_lang": source,
        "target_lang": target,
    }


# --- a folder with model.bin ------------------------------------------------------------------------


def is_ready(folder: Path) -> bool:
    """Whether a folder holds a CTranslate2 model."""
    return (folder / MODEL).is_file()


def tokenizer_folder(folder: Path, given: str | os.PathLike | None = None) -> Path | None:
    """Where the tokenizer of a CTranslate2 model is; None for one converted from fairseq by us.

    UserError where it is nowhere.
    """
    if given:
        return find_folder(given)
    if (folder / TOKENIZER).is_dir():
        return folder / TOKENIZER
    if (folder / DESCRIPTION).is_file():
        return None
    names = ("tokenizer_config.json", "tokenizer.json", "source.spm", "sentencepiece.bpe.model")
    if any((folder / name).is_file() for name in names):
        return folder
    raise UserError(
        f"{folder} has a CTranslate2 model but no tokenizer: give --tokenizer and the folder of the"
        " Hugging Face model it was made from"
    )


def places_of(folder: Path, tokens: Path, vocabulary: HuggingFaceVocabulary) -> tuple[int, int]:
    """How many ids a source and a target may have: as noted, else as the tokenizer's folder says."""
    noted = read_json(folder / DESCRIPTION).get("positions")
    if noted:
        return noted[0], noted[1]
    return positions(read_json(tokens / "config.json"), vocabulary.tokenizer)


def check_vocabulary(folder: Path, vocabulary: HuggingFaceVocabulary, tokens: Path) -> None:
    """UserError where a CTranslate2 model knows other pieces than its tokenizer."""
    known = vocabulary.tokenizer.get_vocab()
    for name in ("shared_vocabulary.json", "source_vocabulary.json", "target_vocabulary.json"):
        if not (folder / name).is_file():
            continue
        pieces = json.loads((folder / name).read_text(encoding="utf-8"))
        strange = [piece for piece in pieces if piece not in known and "madeupword" not in piece]
        if strange or len(pieces) + 8 < len(known):
            raise UserError(
                f"{folder} has {len(pieces):,} pieces and the tokenizer in {tokens} {len(known):,}"
                f" ({len(strange):,} of the model's are not among them): give --tokenizer and the"
                " folder of the Hugging Face model it was made from"
            )


# --- conversion -------------------------------------------------------------------------------------


def converted(
    folder: Path, compute_type: str, saying: Sequence[str | None] = (), name: str | None = None
) -> Path:
    """The folder of the converted model, made now or before; what it costs is said on stderr.

    It lies beside a local folder, or among what the user's programs keep.
    """
    name = name or str(folder)
    local = Path(name).is_dir()
    base = folder.absolute().name if local else name.replace("/", "--")
    digest = fingerprint(folder)
    called = f"{base}.ctranslate2-{digest[:8]}-{compute_type}"
    places = [*([folder.absolute().parent] if local else []), user_cache("fairseq_ext")]
    return converted_once(
        places,
        called,
        digest,
        f"{name} for CTranslate2 ({compute_type})",
        lambda new: convert(folder, new, compute_type, digest, saying, name),
    )


def convert(
    folder: Path,
    output: Path,
    compute_type: str,
    digest: str,
    saying: Sequence[str | None] = (),
    name: str | None = None,
) -> str:
    """Write a Hugging Face model as a CTranslate2 model; returns a sentence about how well it agrees.

    UserError where CTranslate2 does not know such models, and with figures where float32 does not give
    Hugging Face's output.
    """
    name = name or str(folder)
    ctranslate2 = import_ctranslate2()
    import_transformers()
    from fairseq_ext.backtranslation.models.huggingface_decoder import HuggingFaceBackend
    from fairseq_ext.translation.decode.ctranslate_convert import compare, decode_greedily

    vocabulary = load_vocabulary(folder, *saying, name=name)
    if getattr(vocabulary.tokenizer, "separate_vocabs", False):
        raise UserError(
            f"{name} has a vocabulary for each language, which CTranslate2 does not convert: use"
            " --backend huggingface"
        )
    model = load_model(folder, name)
    reference = HuggingFaceBackend(model, vocabulary)
    sources = sample_sources(reference, vocabulary, SAMPLES)
    expected = decode_greedily(reference, sources)
    # from here on the model is of no use: its weights are quantised in place
    try:
        converter_of(ctranslate2, folder, model, vocabulary.tokenizer).convert(
            str(output),
            quantization=None if compute_type == "float32" else compute_type,
            force=True,
        )
    except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{name} cannot be converted for CTranslate2 ({first_line(error)}): use --backend"
            " huggingface"
        ) from error
    (output / TOKENIZER).mkdir()
    for file in model_files(folder):
        if file.suffix not in (".safetensors", ".bin"):
            shutil.copyfile(file, output / TOKENIZER / file.name)

    # checked on the CPU, which every machine has, in the nearest type it knows
    near = "int8" if compute_type.startswith("int8") else "float32"
    translator = ctranslate2.Translator(str(output), compute_type=near, intra_threads=1)
    places = (reference.max_source, reference.max_target)
    source_eos = bool(read_json(output / "config.json").get("add_source_eos"))
    backend = HuggingFaceCTranslate2Backend(translator, places, vocabulary, source_eos)
    check = compare(expected, decode_greedily(backend, sources))
    report = (
        f"greedy output is that of Hugging Face on {check.same} of {check.lines} sample lines, and there"
        f" scores differ by at most {check.score_difference:.2g}"
    )
    if compute_type == "float32" and check.agreement < LEAST_AGREEMENT:
        raise UserError(
            f"{name} was converted for CTranslate2, but {report}: it is not used; use --backend"
            " huggingface"
        )
    files = sorted(path for path in output.rglob("*") if path.is_file())
    description = {
        "version": VERSION,
        "checkpoint_sha256": digest,
        "positions": places,
        "check": asdict(check),
        "files": {str(path.relative_to(output)): path.stat().st_size for path in files},
        "versions": versions(),
    }
    # written last, it makes the folder whole
    atomic_json(output / DESCRIPTION, description)
    return f"converted: {report}"


def converter_of(ctranslate2: Any, folder: Path, model: Any, tokenizer: Any) -> Any:
    """CTranslate2's converter, given a model and tokenizer that were loaded and checked already."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, *_, **__):
            return model

        def load_tokenizer(self, *_, **__):
            return tokenizer

    return Converter(str(folder))


def sample_sources(
    backend: Any, vocabulary: HuggingFaceVocabulary, number: int, seed: int = 1
) -> list[tuple[int, ...]]:
    """Sources of 2 to 12 ordinary pieces, as likely as their rank says; ids with `</s>`."""
    draw = random.Random(seed)
    tokenizer = vocabulary.tokenizer
    special = {*tokenizer.all_special_ids, *vocabulary.code_ids, *backend.banned}
    pieces = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    odds = [1 / (rank + 1) for rank in range(len(pieces))]
    first = [i for i in vocabulary.encode("")[:-1] if i in vocabulary.code_ids]
    return [
        (*first, *draw.choices(pieces, odds, k=2 + n % 11), tokenizer.eos_token_id)
        for n in range(number)
    ]
