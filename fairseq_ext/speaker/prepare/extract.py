"""Features of many records, made in worker processes and handed back in order."""

import contextlib
import hashlib
import pickle
import warnings
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from ext_common.parallel import in_order
from ext_common.threads import limited
from fairseq_ext.speaker.features import AudioError, Recording, hear

# What one call to a worker reads at least, so that small files do not pay for the way there.
CALL_BYTES = 1 << 20


class Outcome(NamedTuple):
    """What became of a record: `features` float32 (T, n_mels) and `digest` of its content, or
    `bad`.

    number: the record's place in the source; bad: None or (reason, detail); note: what else is known of it,
    as the journal has it ("hertz" and "said" of `features.Heard`).
    """

    number: int
    features: np.ndarray | None
    digest: str | None
    bad: tuple | None
    note: dict = {}


def extract_all(tasks, spec, min_seconds, from_audio, workers):
    """Yield the outcomes of each task in order; a task is [(number, Record), ...] of one file.

    min_seconds: shorter records are bad; from_audio: whether files hold audio or ready features.
    The results do not depend on `workers`; what waits to be fetched is bounded. What one worker would do is
    done here, as starting it takes seconds.
    """
    work = (spec, min_seconds, from_audio)
    batches = batched(tasks)
    first = next(batches, [])
    if workers <= 1 or len(first) == len(tasks):
        # the split of a sum over threads would show in the last bits
        with limited(1):
            for task in tasks:
                yield extract(task, *work)
        return
    yield from chain.from_iterable(
        in_order(
            partial(extract_batch, work=work),
            chain([first], batches),
            workers,
            # fork would copy locks held by threads of whatever the caller has imported
            method="forkserver",
            preload=["torch", "torchaudio", "soundfile", __name__],
            start=start_worker,
            near=lambda batch: ", ".join(str(task[0][1].path) for task in batch),
        )
    )


def batched(tasks):
    """Lists of consecutive tasks whose files have CALL_BYTES or more together."""
    batch, size = [], 0
    for task in tasks:
        batch.append(task)
        with contextlib.suppress(OSError):
            size += task[0][1].path.stat().st_size
        if size >= CALL_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_worker():
    """One thread each."""
    import torch

    torch.set_num_threads(1)


def extract_batch(tasks, work):
    """The outcomes of several tasks, a list for each."""
    return [extract(task, *work) for task in tasks]


def extract(task, spec, min_seconds, from_audio):
    """The outcomes of one task: the file is opened once for all its cuts, read in order of time."""
    if not from_audio:
        return [guarded(n, ready_features, record, spec, min_seconds) for n, record in task]
    try:
        recording = Recording(task[0][1].path, spec.channel)
    except AudioError as error:
        return [Outcome(number, None, None, (error.reason, str(error))) for number, _ in task]
    in_time = sorted(task, key=lambda item: item[1].start or 0.0)
    with recording:
        outcomes = [
            guarded(n, cut_features, record, spec, min_seconds, recording) for n, record in in_time
        ]
    return sorted(outcomes, key=lambda outcome: outcome.number)


def guarded(number, function, record, *args):
    """Outcome of `function`; what it raises about the data becomes `bad`."""
    try:
        features, digest, note = function(record, *args)
    except AudioError as error:
        return Outcome(number, None, None, (error.reason, str(error)))
    return Outcome(number, features, digest, None, note)


def cut_features(record, spec, min_seconds, recording):
    """(features, digest, note) of a record of an open recording."""
    heard = hear(recording, spec, record.start, record.end, min_seconds)
    check_length(heard.features, record, spec, min_seconds)
    note = {"hertz": heard.hertz} | ({"said": heard.said} if heard.said else {})
    return heard.features, content_digest(heard.samples, heard.rate), note


def ready_features(record, spec, min_seconds):
    """(features, digest, note) of a .pt file with a float32 tensor (T, n_mels)."""
    tensor = load_tensor(record.path)
    if tensor.ndim != 2:
        raise AudioError(
            "shape", f"{record.path}: shape {tuple(tensor.shape)}, expected (T, n_mels)"
        )
    if tensor.shape[1] != spec.n_mels:
        raise AudioError(
            "feature size",
            f"{record.path}: {tensor.shape[1]} mels, metadata.json says {spec.n_mels}",
        )
    if str(tensor.dtype) != "torch.float32":
        raise AudioError("dtype", f"{record.path}: {tensor.dtype}, expected torch.float32")
    features = np.ascontiguousarray(tensor.numpy())
    if not len(features):
        raise AudioError("empty", f"{record.path}: holds no frames")
    if record.frames is not None and len(features) != record.frames:
        detail = f"{len(features)} frames, mel_len says {record.frames}"
        raise AudioError("mel_len", f"{record.path}: {detail}")
    if not np.isfinite(features).all():
        raise AudioError("nan", f"{record.path}: holds NaN or infinite values")
    check_length(features, record, spec, min_seconds)
    if features.max() == features.min():
        raise AudioError("silent", f"{record.path}: all values are {features[0, 0]:g}")
    return features, content_digest(features, spec.sample_rate), {}


def load_tensor(path):
    """The tensor in a .pt file, never running what a pickle asks for; AudioError where there is
    none.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            detail = "holds code, not only a tensor; it was refused, nothing was run"
            raise AudioError("refused", f"{path}: {detail}") from None
        raise AudioError("corrupt", f"{path}: not a tensor written by torch.save") from None
    except EOFError:
        raise AudioError("empty", f"{path}: the file has no bytes") from None
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError … for damaged files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AudioError("corrupt", f"{path}: not readable as a .pt file ({first})") from None
    if not isinstance(content, torch.Tensor) or content.layout != torch.strided:
        raise AudioError("shape", f"{path}: holds {type(content).__name__}, expected a tensor")
    return content.detach()


def check_length(features, record, spec, min_seconds):
    """AudioError "too short" for features of less than `min_seconds`."""
    found = (len(features) - 1) * spec.seconds_per_frame
    # A frame may begin up to one hop before the end.
    if found + spec.seconds_per_frame < min_seconds:
        raise AudioError(
            "too short", f"{record.path}: {len(features)} frames, --min-seconds is {min_seconds}"
        )


def content_digest(array, rate):
    """Hex digest of an array's values and rate: equal content under two names has one."""
    digest = hashlib.blake2b(f"{array.shape} {rate} ".encode(), digest_size=16)
    digest.update(array.data)
    return digest.hexdigest()
