"""CTranslate2: a fairseq Transformer converted once, checked, and kept beside its checkpoint.

What is converted is found again by the SHA-256 of the checkpoint's content, and using it needs neither torch
nor fairseq.
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import replace_folder, sha256_file, user_cache
from fairseq_ext.translation.decode.checkpoint import Vocabulary
from fairseq_ext.translation.decode.options import Candidate, DecodeOptions, SampleOptions
from fairseq_ext.translation.text.spm import SPECIALS, Codec

VERSION = 1  # of what a converted folder holds
DESCRIPTION = "translation.json"
COMPUTE_TYPES = ("float32", "int8", "float16", "bfloat16", "int8_float16", "int8_bfloat16")
# Zero would let CTranslate2 stop at the first finished hypothesis, which fairseq never does.
_NO_PENALTY = 1e-9
_SPECIAL_TOKENS = ["<s>", "<blank>", "</s>", "<unk>"]
_SEEDING = threading.Lock()


class CTranslate2Backend:
    """Decodes ids with a converted model.

    model: a ctranslate2.Translator whose tokens are :func:`tokens`. positions: of source and target.
    size: of the target vocabulary. reopen: makes another such Translator with one worker, for `sample`.
    """

    name = "ctranslate2"

    def __init__(
        self,
        model: Any,
        positions: Sequence[int],
        size: int,
        reopen: Callable[[], Any] | None = None,
    ):
        self.model, self.size, self.reopen = model, size, reopen
        self.max_source, self.max_target = positions
        self.max_tokens = 1024 if model.device == "cpu" else 4096
        self.workers = model.num_translators

    def decode(
        self, batch: Sequence[Sequence[int]], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """For each source (ids, ``</s>`` at its end) the ``nbest`` best targets, best first."""
        search = {
            "beam_size": min(options.beam, self.size - 1),
            "num_hypotheses": min(options.nbest, self.size - 1),
            # as in fairseq, scores are divided by the length with </s> to this power
            "length_penalty": options.lenpen or _NO_PENALTY,
        }
        return self._translate(self.model, batch, options, limit, **search)

    def sample(
        self,
        batch: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: SampleOptions,
        limit: int,
    ) -> list[Candidate]:
        """For each source a target, drawn by CTranslate2's one generator for all rows of a batch.

        So on a CPU the whole answer depends on (batch, seeds, options, limit) alone, and a batch that is
        drawn again is the same to the byte; but what a line gets depends on its neighbours in the batch too.
        """
        digest = blake2b(" ".join(map(str, seeds)).encode(), digest_size=4).digest()
        # a thread has a generator, seeded when it first draws: a new model has a new thread
        with _SEEDING:
            set_seed(int.from_bytes(digest, "little"))
            model = self.reopen()
            # an empty source would draw nothing
            self._translate(model, [max(batch, key=len)[-2:]], SampleOptions(), 1, sampling_topk=0)
        drawn = {
            "sampling_topk": min(options.topk, self.size - 1),
            "sampling_topp": options.topp,
            "sampling_temperature": options.temperature,
        }
        found = self._translate(model, batch, options, limit, beam_size=1, **drawn)
        return [one for (one,) in found]

    def _translate(self, model, batch, options: DecodeOptions, limit: int, **how: Any):
        if 0 < options.unkpen < float("inf"):
            raise UserError(
                "the backend ctranslate2 either allows <unk> (--unkpen 0) or not (inf): "
                "another --unkpen needs --backend fairseq"
            )
        results = model.translate_batch(
            self._sources(batch),
            no_repeat_ngram_size=options.no_repeat_ngram,
            disable_unk=options.unkpen > 0,
            max_input_length=0,
            # one more for </s>, which fairseq does not count
            max_decoding_length=limit + 1,
            min_decoding_length=min(options.min_len, limit),
            return_scores=True,
            **how,
        )
        return [self._candidates(result, limit) for result in results]

    def _sources(self, batch: Sequence[Sequence[int]]) -> list[list[str]]:
        # the model itself adds </s>
        return [list(map(_token, ids[:-1])) for ids in batch]

    def _candidates(self, result: Any, limit: int) -> list[Candidate]:
        # an output that did not end has one piece more, where fairseq has </s>
        found = (list(map(self._id, tokens[:limit])) for tokens in result.hypotheses)
        return [
            Candidate(ids, score, len(ids) >= limit)
            for ids, score in zip(found, result.scores, strict=True)
        ]

    def _id(self, token: str) -> int:
        return int(token) if token[0] != "<" else _SPECIAL_TOKENS.index(token)


def set_seed(seed: int) -> None:
    """The seed of generators of threads that have not drawn yet."""
    import_ctranslate2().set_random_seed(seed)


def tokens(size: int) -> list[str]:
    """The vocabulary that CTranslate2 sees: ids as text, so that no two pieces can collide."""
    return [*_SPECIAL_TOKENS, *map(str, range(SPECIALS, size))]


def _token(i: int) -> str:
    return str(i) if i >= SPECIALS else _SPECIAL_TOKENS[i]


def open_model(
    paths: Sequence[str],
    device: str = "cpu",
    compute_type: str | None = None,
    user_dir: str | None = None,
    threads: int | None = None,
) -> tuple[CTranslate2Backend, Vocabulary]:
    """A checkpoint as backend and vocabulary, converted where it was not yet.

    UserError for an ensemble, a device or type that CTranslate2 lacks here, and a model it does not
    support (all of the reasons in one).
    """
    if len(paths) > 1:
        raise UserError(
            "the backend ctranslate2 takes one checkpoint: average several with"
            " python -m fairseq_ext.translation.average, or use --backend fairseq"
        )
    ctranslate2 = import_ctranslate2()
    device, index = usable_device(device, ctranslate2)
    compute_type = usable_type(compute_type, device, ctranslate2)
    folder = converted(Path(paths[0]), compute_type, user_dir)
    description = read_description(folder)
    vocabulary = read_vocabulary(folder, description)
    models = opener(folder, device, index, compute_type, threads)
    backend = CTranslate2Backend(
        models(), description["positions"], vocabulary.target.size, lambda: models(1)
    )
    return backend, vocabulary


def opener(
    folder: Path, device: str, index: int, compute_type: str, threads: int | None = None
) -> Callable[..., Any]:
    """What makes a ctranslate2.Translator of a folder, with so many workers (none: as many as sensible)."""
    # a batch for each thread: threads within one wait for each other, on a busy machine mostly
    usual = (threads or len(os.sched_getaffinity(0))) if device == "cpu" else 1
    make = functools.partial(
        import_ctranslate2().Translator,
        str(folder),
        device=device,
        device_index=index,
        compute_type=compute_type,
        intra_threads=1,
    )
    return lambda workers=usual: make(inter_threads=workers)


def import_ctranslate2() -> Any:
    try:
        import ctranslate2
    except ImportError as error:
        raise UserError(
            f"the backend ctranslate2 cannot be used ({error}): pip install ctranslate2,"
            " or use --backend fairseq"
        ) from error
    return ctranslate2


def usable_device(device: str, ctranslate2: Any) -> tuple[str, int]:
    """("cpu" or "cuda", number of the device)."""
    kind, _, index = device.partition(":")
    count = ctranslate2.get_cuda_device_count()
    if kind == "auto":
        return ("cuda" if count else "cpu"), 0
    if kind == "cpu" or (kind == "cuda" and (index or "0").isdigit() and int(index or 0) < count):
        return kind, int(index or 0) if kind == "cuda" else 0
    raise UserError(
        f"device {device!r} cannot be used by CTranslate2 (it sees {count} CUDA devices): try cpu"
    )


def usable_type(compute_type: str | None, device: str, ctranslate2: Any) -> str:
    """The compute type, float32 where none is given; UserError where the device has not got it."""
    compute_type = compute_type or "float32"
    known = ctranslate2.get_supported_compute_types(device)
    if compute_type not in COMPUTE_TYPES or compute_type not in known:
        there = ", ".join(name for name in COMPUTE_TYPES if name in known)
        raise UserError(
            f"compute type {compute_type!r} cannot be used by CTranslate2 on {device}: give {there}"
        )
    return compute_type


# --- the folder of a converted model ----------------------------------------------------------------


def converted(checkpoint: Path, compute_type: str, user_dir: str | None = None) -> Path:
    """The folder of the converted model, made now or before; what it costs is said on stderr."""
    if not checkpoint.is_file():
        from fairseq_ext.translation.decode.checkpoint import read_state

        read_state(checkpoint)  # says why not
    digest = sha256_file(checkpoint)
    name = f"{checkpoint.name}.ctranslate2-{digest[:8]}-{compute_type}"
    places = [checkpoint.absolute().parent, user_cache("fairseq_ext")]
    for place in places:
        if is_whole(place / name, digest):
            return place / name
    print(
        f"converting {checkpoint} for CTranslate2 ({compute_type}); this happens once",
        file=sys.stderr,
    )
    from fairseq_ext.translation.decode.ctranslate_convert import convert

    with writable(places) as (place, temporary):
        report = convert(checkpoint, temporary, compute_type, digest, user_dir)
        print(report, file=sys.stderr)
        # one that is there already is damaged, or was quicker
        folder = replace_folder(temporary, place / name)
    for old in place.glob(f"{_glob_safe(checkpoint.name)}.ctranslate2-*-{compute_type}"):
        # of a file of this name that is no more
        if old.name != name and (old / DESCRIPTION).is_file():
            shutil.rmtree(old, ignore_errors=True)
    return folder


@contextlib.contextmanager
def writable(places: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(the first place that can be written to, a new folder in it, removed on failure).

    Where none can, a folder that lasts as long as the process.
    """
    for place in places:
        temporary = place / f".ctranslate2-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir(parents=True)
            break
        except OSError:
            continue
    else:
        place = Path(tempfile.mkdtemp(prefix="ctranslate2-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        temporary = place / "new"
        temporary.mkdir()
    try:
        yield place, temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(folder: Path, digest: str) -> bool:
    """Whether a folder holds what was converted from the checkpoint with this SHA-256."""
    try:
        description = read_description(folder)
        sizes = {name: (folder / name).stat().st_size for name in description["files"]}
        return (
            description["version"] == VERSION
            and description["checkpoint_sha256"] == digest
            and sizes == description["files"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))


def read_vocabulary(folder: Path, description: dict[str, Any]) -> Vocabulary:
    saved = description["vocabulary"]
    source, target = (
        Codec.from_file(folder / f"spm.{side}.model", saved["extra_symbols"])
        for side in ("source", "target")
    )
    return Vocabulary(
        source, target, saved["source_lang"], saved["target_lang"], saved["convention"]
    )


def _glob_safe(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
