"""What a codec does to a crop of stored features, by the codec itself.

Features hold no audio to encode, so noise with the crop's mel energies goes through encoder and decoder, and
what that changes in its features is changed in the crop: the bands that are dropped, and the noise that is
left in those that stay.
"""

import io
from dataclasses import dataclass, field
from typing import Any, List

import numpy as np

from ext_common.cli import UserError
from fairseq_ext.speaker.augment.crops import AUGMENTATIONS, Context, check_between
from fairseq_ext.speaker.features import FeatureSpec, log_mel

# format and subtype of soundfile, and the compression levels that are drawn from; u-law has none
KINDS: dict[str, tuple[str, str, tuple[float, float] | None]] = {
    "mp3": ("MP3", "MPEG_LAYER_III", (0.0, 0.95)),
    "ogg": ("OGG", "VORBIS", (0.0, 1.0)),
    "ulaw": ("WAV", "ULAW", None),
}


@dataclass
class CodecOptions:
    p: float = field(default=0.5, metadata={"help": "share of crops that are encoded and decoded"})
    kinds: List[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={"help": f"codecs, each as likely: {', '.join(KINDS)}"},
    )

    def __post_init__(self) -> None:
        import soundfile

        check_between(self, "p", 0, 1)
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown codec {kind!r}: known are {', '.join(KINDS)}")
            if not soundfile.check_format(*KINDS[kind][:2]):
                raise ValueError(
                    f"libsndfile was built without {kind} here: leave it out of kinds, or pip install"
                    " -U soundfile"
                )


@AUGMENTATIONS.register("codec", options=CodecOptions)
def random_codec(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """MP3, Ogg Vorbis or u-law at a random quality."""
    o = CodecOptions(**options)
    if rng.random() >= o.p:
        return x
    kind = o.kinds[int(rng.integers(len(o.kinds)))]
    levels = KINDS[kind][2]
    level = None if levels is None else rng.uniform(*levels)
    spec = context.spec.plain
    samples = noise_of(x, spec, rng)
    coded = through(samples, spec.sample_rate, kind, level)
    before, after = (log_mel(wave, spec)[: len(x)] for wave in (samples, coded))
    # what is dropped is a share of what was there, what is added is not
    added = np.exp(after) - np.exp(before)
    louder = np.logaddexp(x, np.log(np.maximum(added, context.spec.floor)))
    y = np.where(added > 0, louder, x + after - before)
    return np.asarray(np.maximum(y, context.floor), dtype=np.float32)


def noise_of(x: np.ndarray, spec: FeatureSpec, rng: np.random.Generator) -> np.ndarray:
    """float32 (T · hop,): Gaussian noise whose log-mel features are about x (T, n_mels)."""
    from fairseq_ext.speaker.export.frontend import hann, mel_bands

    bands = mel_bands(spec)
    # a band's energy spread over its bins, straight lines between the centres of bands
    density = np.exp(x.astype(np.float64)) / bands.sum(0)
    centres, bins = bands.argmax(0), np.arange(len(bands))
    power = np.stack([np.interp(bins, centres, row) for row in density])
    noise = rng.standard_normal((2, *power.shape))
    frames = np.fft.irfft(np.sqrt(power) * (noise[0] + 1j * noise[1]), spec.n_fft) * hann(spec)
    samples = np.zeros((len(x) - 1) * spec.hop_length + spec.n_fft)
    for t, frame in enumerate(frames):
        samples[t * spec.hop_length : t * spec.hop_length + spec.n_fft] += frame
    half = spec.n_fft // 2
    samples = samples[half : half + len(x) * spec.hop_length].astype(np.float32)
    level = np.exp(x.astype(np.float64)).mean() / np.exp(log_mel(samples, spec)).mean()
    scaled: np.ndarray = np.clip(np.sqrt(np.float32(level)) * samples, -1, 1)
    return scaled


def through(samples: np.ndarray, rate: int, kind: str, level: float | None) -> np.ndarray:
    """float32 (n,) samples encoded and decoded; level: soundfile's, from 0 (large) to 1 (small)."""
    import soundfile

    form, subtype, _ = KINDS[kind]
    how: dict[str, Any] = {} if level is None else {"compression_level": level}
    if kind == "mp3":
        # at a constant rate low rates are coded at another sample rate, and come back late
        how["bitrate_mode"] = "VARIABLE"
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, rate, format=form, subtype=subtype, **how)
        file.seek(0)
        found, _ = soundfile.read(file, dtype="float32")
    except soundfile.SoundFileError as error:
        raise UserError(
            f"augmentation 'codec': {kind} does not take {rate} Hz ({error}): leave it out of kinds"
        ) from None
    return np.asarray(np.pad(found, (0, max(0, len(samples) - len(found))))[: len(samples)])
