"""How the synthetic side is written: searched, drawn, or searched and then disturbed.

    mode = make_mode("topk", "k=10")
    mode.search(nbest=1, max_len_b=50)       # the options of the decoder
    mode.finish(text, line_seed(1, 17, 1))   # what is done to its text

Edunov et al. 2018 (Understanding Back-Translation at Scale) compare them; which is best depends on how much
bitext there is. Someone's own is a class that their `--user-dir` registers:

    @MODES.register("my_mode", options=MyOptions)
    class MyMode(Mode): ...
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import regex

from ext_common.cli import OptionError
from ext_common.random import STREAM, uniforms
from ext_common.registry import Registry
from fairseq_ext.translation.decode.options import DecodeOptions, SampleOptions
from fairseq_ext.translation.text.normalise import unit

MODES = Registry("mode")
FILLER = "<BLANK>"
"""In place of a word; in training data it is the piece <unk>, which no text can turn into."""
# Latin words and numbers are one word between Han characters too.
_CHARACTERS = regex.compile(r"[\p{Latin}\p{M}\d]+|\S")


class Mode:
    """Name and options, as they stand in a manifest, and what they mean to a decoder.

    uses_draws: whether the output depends on the seed of the line; stream: of `ext_common.random.uniforms`.
    """

    name: str
    options: dict[str, Any]
    uses_draws = True
    stream: str | None = STREAM

    def search(self, nbest: int = 1, **more: Any) -> DecodeOptions:
        """Options of the decoder; more: fields of :class:`DecodeOptions` on lengths and batches."""
        raise NotImplementedError

    def finish(self, text: str, seed: int, lang: str) -> str:
        """The synthetic text of what the decoder wrote in `lang`; seed: of the line and its rank."""
        return text


@dataclass
class BeamOptions:
    beam: int = field(default=5, metadata={"help": "hypotheses kept (1: greedy)"})
    lenpen: float = field(
        default=1.0, metadata={"help": "scores are divided by length to this power"}
    )

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise OptionError(f"beam must be at least 1, got {self.beam}")


@MODES.register("beam", options=BeamOptions)
class Beam(Mode):
    """The most probable translation that beam search finds."""

    uses_draws = False

    def __init__(self, beam: int, lenpen: float) -> None:
        self.beam, self.lenpen = beam, lenpen

    def search(self, nbest: int = 1, **more: Any) -> DecodeOptions:
        return DecodeOptions(beam=max(self.beam, nbest), lenpen=self.lenpen, nbest=nbest, **more)


@dataclass
class SamplingOptions:
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits: below 1 is nearer to greedy search"}
    )


@dataclass
class TopKOptions(SamplingOptions):
    k: int = field(default=10, metadata={"help": "pieces to draw from, the most probable ones"})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise OptionError(f"k must be at least 1, got {self.k}")


@dataclass
class TopPOptions(SamplingOptions):
    p: float = field(
        default=0.9, metadata={"help": "pieces to draw from: the fewest that sum to this"}
    )


class _Drawn(Mode):
    def __init__(self, temperature: float, **limits: float) -> None:
        self.how: dict[str, Any] = {"topk": 0, "topp": 1.0, "temperature": temperature, **limits}
        try:
            SampleOptions(**self.how)
        except ValueError as error:
            raise OptionError(str(error)) from None

    def search(self, nbest: int = 1, **more: Any) -> SampleOptions:
        return SampleOptions(nbest=nbest, stream=self.stream, **self.how, **more)


@MODES.register("sampling", options=SamplingOptions)
class Sampling(_Drawn):
    """A piece at a time from the whole of the model's distribution."""


@MODES.register("topk", options=TopKOptions)
class TopK(_Drawn):
    """A piece at a time from the k most probable ones (Fan et al. 2018)."""

    def __init__(self, temperature: float, k: int) -> None:
        super().__init__(temperature, topk=k)


@MODES.register("topp", options=TopPOptions)
class TopP(_Drawn):
    """A piece at a time from the most probable ones that sum to p (Holtzman et al. 2020)."""

    def __init__(self, temperature: float, p: float) -> None:
        super().__init__(temperature, topp=p)


@dataclass
class NoisedBeamOptions(BeamOptions):
    drop: float = field(default=0.1, metadata={"help": "probability that a word is left out"})
    fill: float = field(default=0.1, metadata={"help": f"probability that a word becomes {FILLER}"})
    shuffle: int = field(default=3, metadata={"help": "places that a word moves at most"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.drop < 1 and 0 <= self.fill <= 1):
            raise OptionError(
                f"drop must lie in [0, 1) and fill in [0, 1], got {self.drop:g} and {self.fill:g}"
            )
        if self.shuffle < 0:
            raise OptionError(f"shuffle must not be negative, got {self.shuffle}")


@MODES.register("noised-beam", options=NoisedBeamOptions)
class NoisedBeam(Beam):
    """Beam search, then words dropped, blanked and shuffled (Edunov et al. 2018, section 3)."""

    uses_draws = True

    def __init__(self, beam: int, lenpen: float, drop: float, fill: float, shuffle: int) -> None:
        super().__init__(beam, lenpen)
        self.noise = (drop, fill, shuffle)

    def finish(self, text: str, seed: int, lang: str) -> str:
        characters = unit(lang) == "characters"
        words = _CHARACTERS.findall(text) if characters else text.split()
        # a filler that the model wrote itself is no filler
        words = [word for word in words if word != FILLER]
        draws = uniforms([seed], 3 * len(words), self.stream).reshape(3, -1)
        noised = add_noise(words, draws, *self.noise)
        if not characters:
            return " ".join(noised)
        return "".join(f" {FILLER} " if w == FILLER else w for w in noised).strip()


def make_mode(name: str, options: Any = None) -> Mode:
    """The mode of a name and `"key=value,…"`; UnknownName, OptionError where there is none."""
    mode: Mode = MODES.build(name, options=options)
    chosen = MODES.options(name, options)
    mode.name, mode.options = name, {} if chosen is None else asdict(chosen)
    return mode


def add_noise(
    words: list[str], draws: np.ndarray, drop: float, fill: float, shuffle: int
) -> list[str]:
    """Words, some left out, some turned into FILLER, none moved by more than `shuffle` places.

    draws: (3, words) in [0, 1). At least one word is kept. A word moves where its place plus a number from
    [0, shuffle + 1) puts it (Lample et al. 2018, section 2.3), counted among the words that were kept.
    """
    kept = [n for n in range(len(words)) if draws[0, n] >= drop]
    if words and not kept:
        kept = [int(draws[0].argmax())]
    found = [FILLER if draws[1, n] < fill else words[n] for n in kept]
    places = np.arange(len(kept)) + draws[2, kept] * (shuffle + 1)
    return [found[n] for n in np.argsort(places, kind="stable")]
