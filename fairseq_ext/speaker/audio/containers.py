"""Whether an audio file gives all of its audio: what libsndfile passes over in silence, said or mended.

libsndfile believes headers. An MP3 without a length is estimated from its first frame, a WAV whose size was
never filled in (written to a pipe) has no samples, and of a file that was cut short or of several files one
after the other it gives what it finds. Here each of these gives all of its audio, or is refused.
"""

import io
import mmap
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ext_common.cli import UserError

if TYPE_CHECKING:
    from soundfile import SoundFile

# Sizes from here on are what programs write that do not know the length (0xFFFFFFFF, sox: 0x7FFFF000).
UNKNOWN_SIZE = 0x7FFF0000
# libsndfile says 2^63 - 1 where a FLAC that was written to a pipe does not say its length.
UNKNOWN_FRAMES = 1 << 48
# Samples by which an MP3 may differ from its frames: the delay of encoder and decoder, and the padding.
MP3_SLACK = 4 * 1152
# MP3 frame headers: ISO 11172-3 and 13818-3 (kbit/s by index, Hz of MPEG-1 by index)
BITRATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
BITRATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
RATES = (44100, 48000, 32000)
LARGEST_BITRATE = 14

REMEDY = "get the whole file, or keep what there is (ffmpeg -i FILE NEW.wav)"
TRUNCATED = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff)\s*:\s*(\d+) \(should be (\d+)\)"
    r"|does not match value from 'ds64' chunk of (\d+)|Seems to be a (truncated file)",
    re.MULTILINE,
)
SAMPLE_COUNT = re.compile(rb"sample_count -i (\d+)")


class AudioError(UserError):
    """A recording that cannot be used; `reason` is a word or two to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # pickled on its way out of a worker process, by its arguments
        return type(self), (self.reason, str(self))


class Frame(NamedTuple):
    """A frame of MPEG layer III: its place and size in bytes, and what it holds."""

    start: int
    size: int
    samples: int
    rate: int
    channels: int


def open_whole(source: str | BinaryIO, name: str) -> "SoundFile":
    """The file, open for reading all of its audio. AudioError "corrupt" where less could be read.

    source: a path, or a binary file that can seek; name: of it, for messages.
    """
    file = _soundfile(source, name)
    try:
        whole = _whole(file, source, name)
    except BaseException:
        file.close()
        raise
    if whole is not file:
        file.close()
    if whole.frames > UNKNOWN_FRAMES:
        # soundfile seeks to where it has just read to, which libFLAC refuses where no length is known
        vars(whole)["seekable"] = lambda: False
    return whole


def _soundfile(source: Any, name: str) -> "SoundFile":
    import soundfile

    try:
        return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError("corrupt", f"{name}: not readable as audio ({reason_of(error)})") from None


def _whole(file: "SoundFile", source: str | BinaryIO, name: str) -> "SoundFile":
    if file.format == "MP3":
        with _content(source) as data:
            rebuilt = whole_mp3(bytes(data), file.frames, name)
        return file if rebuilt is None else _soundfile(io.BytesIO(rebuilt), name)
    if file.format in ("WAV", "WAVEX") and not file.frames:
        with _content(source) as data:
            place = unfilled_size(data)
            mended = None if place is None else bytes(data[:place]) + b"\xff" * 4
        if mended:
            return _soundfile(io.BufferedReader(Patched(source, mended)), name)
    with _content(source) as data:
        problem = ogg_problem(data) if file.format == "OGG" else pcm_problem(data, file)
    if problem:
        raise AudioError("corrupt", f"{name}: {problem}: {REMEDY}")
    return file


class _content:
    """The bytes of a path (mapped) or of an open file, as a context."""

    def __init__(self, source: str | BinaryIO) -> None:
        self.source = source

    def __enter__(self) -> Any:
        if isinstance(self.source, str):
            with open(self.source, "rb") as file:
                self.data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self.data
        place = self.source.tell()
        self.source.seek(0)
        self.data = self.source.read()
        self.source.seek(place)
        return self.data

    def __exit__(self, *_: object) -> None:
        if isinstance(self.data, mmap.mmap):
            self.data.close()


class Patched(io.RawIOBase):
    """A file whose first bytes are others: `head` stands in their place."""

    def __init__(self, source: str | BinaryIO, head: bytes) -> None:
        self.file = open(source, "rb") if isinstance(source, str) else source
        self.file.seek(0)
        self.head = head

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        place = self.file.tell()
        found = self.file.read(len(buffer))
        head = self.head[place : place + len(found)]
        buffer[: len(found)] = head + found[len(head) :]
        return len(found)


def unfilled_size(data: Any) -> int | None:
    """Where a WAV file of no samples has the size of its data, if audio follows all the same; else None."""
    place = 12
    while place + 8 <= len(data) and data[place : place + 4] != b"data":
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        place += place % 2
    rest = place + 8
    if rest >= len(data):
        return None
    # an empty recording may still be followed by chunks: names of four letters, up to the very end
    follow = rest
    while follow + 8 <= len(data) and bytes(data[follow : follow + 4]).isascii():
        follow += 8 + int.from_bytes(data[follow + 4 : follow + 8], "little")
        follow += follow % 2
    return None if follow >= len(data) and follow - len(data) <= 1 else place + 4


def pcm_problem(data: Any, file: "SoundFile") -> str | None:
    """Why a file of samples (WAV, AIFF, AU, CAF, W64, VOC, NIST, FLAC) holds less or more than is read."""
    for size, there, frames, truncated in TRUNCATED.findall(file.extra_info):
        if size and int(there) < int(size) < UNKNOWN_SIZE:
            return f"cut short, {there} of {size} bytes are there"
        if frames or truncated:
            return "cut short" + (
                f", {file.frames} of {frames} samples are there" if frames else ""
            )
    promised = SAMPLE_COUNT.search(data[:1024]) if file.format == "NIST" else None
    if promised and int(promised[1]) > file.frames:
        return f"cut short, {file.frames} of {int(promised[1])} samples are there"
    if file.format not in ("WAV", "WAVEX") and data.find(data[:8], 8) >= 0:
        return "several files one after the other, of which only the first would be read"
    return None


def ogg_problem(data: Any) -> str | None:
    """Why an Ogg file (RFC 3533) is not one whole stream; None where it is."""
    place, begun, ended = 0, False, False
    while data[place : place + 4] == b"OggS" and place + 27 <= len(data):
        flags, segments = data[place + 5], data[place + 26]
        first = bool(flags & 2)
        if first and begun:
            return "several files one after the other, of which only the first would be read"
        begun, ended = begun or not first, bool(flags & 4)
        place += 27 + segments + sum(data[place + 27 : place + 27 + segments])
    if place > len(data) or not ended:
        return "cut short, its last page is not the end of the stream"
    if data.find(b"OggS", place) >= 0:
        return "damaged, there is something between its pages"
    return None


def whole_mp3(data: bytes, promised: int, name: str) -> bytes | None:
    """An MP3 with a header that says its true length; None where the file as it is gives all of it.

    promised: samples that the decoder would give. AudioError where the file holds less than its header
    says, ends within a frame, or changes its rate or its channels.
    """
    frames = list(mp3_frames(data))
    audio = [frame for frame in frames if not is_information(data, frame)]
    if not audio:
        return None
    samples = sum(frame.samples for frame in audio)
    last = audio[-1]
    # without a header it is no promise but a guess from the first frame, and as often too much
    known = len(audio) < len(frames)
    if known and promised > samples + MP3_SLACK:
        problem = f"cut short, {samples} of {promised} samples are there"
    elif last.start + last.size > len(data):
        problem = "cut short, its last frame is not whole"
    elif len({(frame.rate, frame.channels) for frame in audio}) > 1:
        problem = "the rate or the number of channels changes within"
    elif promised == samples or (known and promised >= samples - MP3_SLACK):
        return None
    else:
        parts = [data[frame.start : frame.start + frame.size] for frame in audio]
        return length_frame(parts[0][:4], len(audio)) + b"".join(parts)
    raise AudioError("corrupt", f"{name}: {problem}: {REMEDY}")


def mp3_frames(data: bytes) -> Iterator[Frame]:
    """The frames of layer III, in order; what lies between them (tags) is passed over.

    The first one, and one behind something else, counts only if another follows it.
    """
    place, in_step = 0, False
    while place + 4 <= len(data):
        frame = mp3_header(data, place)
        if frame and (in_step or mp3_header(data, place + frame.size)):
            yield frame
            place, in_step = place + frame.size, True
            continue
        in_step = False
        if data[place : place + 3] == b"ID3":
            size = data[place + 6 : place + 10]
            place += 10 + sum(
                (byte & 127) << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=False)
            )
            continue
        found = [p for p in (data.find(b"\xff", place + 1), data.find(b"ID3", place + 1)) if p >= 0]
        place = min(found, default=len(data))


def mp3_header(data: bytes, place: int) -> Frame | None:
    """The frame of layer III that begins at `place`, None where none does."""
    if place + 4 > len(data) or data[place] != 0xFF or data[place + 1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate = (
        data[place + 1] >> 3 & 3,
        data[place + 2] >> 4,
        data[place + 2] >> 2 & 3,
    )
    if version == 1 or not 0 < bitrate < 15 or rate == 3:
        return None
    hertz = RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples = 1152 if version == 3 else 576
    kilobits = (BITRATES_1 if version == 3 else BITRATES_2)[bitrate]
    size = samples // 8 * kilobits * 1000 // hertz + (data[place + 2] >> 1 & 1)
    return Frame(place, size, samples, hertz, 1 if data[place + 3] >> 6 == 3 else 2)


def is_information(data: bytes, frame: Frame) -> bool:
    """Whether a frame holds the length of the file (Xing, Info, VBRI) and no audio."""
    head = data[frame.start + 4 : frame.start + 44]
    return any(head.find(word) >= 0 for word in (b"Xing", b"Info", b"VBRI"))


def length_frame(header: bytes, frames: int) -> bytes:
    """A Xing frame for `frames` frames of audio, its version, rate and channels from `header` (4 bytes)."""
    # no checksum, the bitrate that leaves most room, no padding
    head = bytes([header[0], header[1] | 1, LARGEST_BITRATE << 4 | header[2] & 0x0C, header[3]])
    found = mp3_header(head, 0)
    assert found is not None
    side = {(1152, 2): 32, (1152, 1): 17, (576, 2): 17, (576, 1): 9}[found.samples, found.channels]
    tag = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return (head + bytes(side) + tag).ljust(found.size, b"\0")


def reason_of(error: BaseException) -> str:
    """The last line of an exception's message, without the path that soundfile puts before it."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return text.split(": ", 1)[-1].rstrip(".")
