"""Sequence-to-sequence models of Hugging Face's transformers, Marian (opus-mt) first, as a backend.

    backend, vocabulary = open_model("opus-mt-zh-en", device="cpu")
    Translator(backend, vocabulary)(["你好。"], beam=1)

Loaded through the Auto classes from a local folder (or what the hub has under a name), never with code
from it. Works with transformers 4.46 and later and 5; torch and transformers are imported when first used.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex

from ext_common.cli import UserError, did_you_mean
from fairseq_ext.backtranslation.models.huggingface_folder import (
    INSTALL,
    describe,
    find_folder,
    fingerprint,
    first_line,
    languages,
    read_json,
    short_code,
)
from fairseq_ext.backtranslation.models.huggingface_vocabulary import (
    HuggingFaceVocabulary,
    language_codes,
)

__all__ = [
    "HuggingFaceVocabulary",
    "describe",
    "fingerprint",
    "load_model",
    "load_vocabulary",
    "open_model",
]

# Need a language as the first piece of the output, which is not implemented.
_LANGUAGE_FIRST = ("m2m_100", "mbart", "nllb", "nllb-moe", "seamless_m4t", "plbart")


def open_model(
    path: str | os.PathLike[str],
    device: str = "cpu",
    compute_type: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
    threads: int | None = None,
) -> tuple[Any, HuggingFaceVocabulary]:
    """A model as backend and vocabulary.

    path: a folder, or a name on the hub. prefix: `>>eng<<`, where a model writes several languages.
    UserError for a folder without tokenizer or weights, with weights missing, of another kind of model,
    and for languages or a prefix that are not known.
    """
    import_transformers()
    folder = find_folder(path)
    vocabulary = load_vocabulary(folder, source_lang, target_lang, prefix, os.fspath(path))
    from ext_common.checkpoints import usable_device
    from fairseq_ext.backtranslation.models.huggingface_decoder import HuggingFaceBackend

    device = usable_device(device)
    model = load_model(folder, os.fspath(path))
    return HuggingFaceBackend(model, vocabulary, device, compute_type, threads), vocabulary


def load_vocabulary(
    folder: Path,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str | None = None,
    name: str | None = None,
) -> HuggingFaceVocabulary:
    """The tokenizer in a folder, with its languages and prefix checked."""
    name = name or str(folder)
    transformers = import_transformers()
    # older Marian folders name the tokenizer's class in config.json only, which CTranslate2 replaces
    config = read_json(folder / "config.json")
    marian = (folder / "source.spm").is_file() and "model_type" not in config
    kind = transformers.MarianTokenizer if marian else transformers.AutoTokenizer
    try:
        with quiet(transformers):
            tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # the kinds of errors differ between tokenizers
        raise UserError(
            f"{name} has no tokenizer that can be loaded ({first_line(error)}): give a folder with"
            " tokenizer_config.json and the files of the vocabulary"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name} has a tokenizer without an end of sentence: give another model")
    prefix = usable_prefix(prefix, tokenizer, target_lang, name)
    source, target = languages(folder, source_lang, target_lang, prefix, name)
    return HuggingFaceVocabulary(tokenizer, source, target, prefix)


def usable_prefix(
    prefix: str | None, tokenizer: Any, target_lang: str | None, name: str
) -> str | None:
    """The prefix as the tokenizer has it; UserError where one is needed or is not known."""
    codes = sorted(language_codes(tokenizer))
    shown = ", ".join(codes[:30]) + (", …" if len(codes) > 30 else "")
    if not prefix:
        if len(codes) < 2:
            return None
        wanted = target_lang and short_code(target_lang)
        near = [code for code in codes if short_code(code.strip("<>")) == wanted]
        hint = f": did you mean {near[0]!r}?" if near else did_you_mean(f">>{target_lang}<<", codes)
        raise UserError(
            f"{name} writes several languages{hint if target_lang else ''}: give --prefix and one of"
            f" {shown}"
        )
    if not codes and not hasattr(tokenizer, "supported_language_codes"):
        return prefix
    code = prefix if prefix.startswith(">>") else f">>{prefix}<<"
    code = code.strip()
    if code not in codes:
        there = f"it has {shown}" if codes else "it has none, so leave out --prefix"
        raise UserError(f"{name} has no prefix {prefix!r}{did_you_mean(code, codes)} ({there})")
    return code


def load_model(folder: Path, name: str | None = None) -> Any:
    """The model in a folder, on the CPU, in evaluation mode; UserError where it is not whole."""
    name = name or str(folder)
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"{name} has no config.json that can be used ({first_line(error)}): give the folder of a"
            " Hugging Face model"
        ) from error
    if not getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is a model of type {config.model_type!r}, which does not turn one text into"
            " another: give a sequence-to-sequence model such as Marian (opus-mt)"
        )
    if config.model_type in _LANGUAGE_FIRST:
        raise UserError(
            f"{name} is a model of type {config.model_type!r}, whose output begins with a language:"
            " that is not supported, so give a Marian model (opus-mt)"
        )
    try:
        with quiet(transformers):
            model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise UserError(
            f"{name} has no weights that can be loaded as a model of type {config.model_type!r}"
            f" ({first_line(error)}): fetch it again"
        ) from error
    wrong = [*missing_weights(model, report), *changed_weights(model, folder)]
    if wrong:
        raise UserError(
            f"{name}: weights missing or not those of the file after loading"
            f" ({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}): its output would be garbage,"
            " so fetch it again, or use the version of transformers it was saved with"
        )
    return model.eval().requires_grad_(False)


def missing_weights(model: Any, report: dict[str, Any]) -> list[str]:
    """Names of weights that were neither in the file, nor are tied to one that was, nor are computed."""
    missing = {str(key) for key in report.get("missing_keys", ())}
    mismatched = {
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    }
    ignored = [
        regex.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    state = model.state_dict(keep_vars=True)
    loaded = {one.data_ptr() for key, one in state.items() if key not in missing}
    return sorted(
        key
        for key in missing | mismatched
        if key in mismatched
        or not (
            (key in state and state[key].data_ptr() in loaded)
            or any(pattern.search(key) for pattern in ignored)
        )
    )


def changed_weights(model: Any, folder: Path) -> list[str]:
    """Names of weights that differ from those of the safetensors files they were loaded from.

    Upgrades of transformers tied Marian's weights in other ways, and said nothing.
    """
    from safetensors import safe_open

    state, changed = model.state_dict(), []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as saved:
            for key in saved.keys():
                if key not in state:
                    continue
                expected, found = saved.get_tensor(key).float(), state[key].float()
                # computed positions differ by rounding
                largest = float(expected.abs().max()) if expected.numel() else 0.0
                if expected.shape != found.shape or found.is_meta:
                    changed.append(key)
                elif expected.numel() and float((expected - found).abs().max()) > 1e-2 * largest:
                    changed.append(key)
    return changed


def import_transformers() -> Any:
    try:
        import torch  # noqa: F401 (transformers without it only warns)
        import transformers
    except ImportError as error:
        raise UserError(f"transformers cannot be used ({error}): {INSTALL}") from error
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and advice on stderr."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.ERROR)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
