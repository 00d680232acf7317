"""Texts as 8-byte numbers: what filters, splits and leak guards remember of a million sentences."""

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from fairseq_ext.translation.text.normalise import match_key

_START = 1024
_FILL = 0.6


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the text as UTF-8; never 0.

    Among n texts two different ones share a hash with probability n² / 2⁶⁵: 3e-8 for a million.
    """
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1


def key_hash(text: str) -> int:
    """:func:`text_hash` of the text's match key: equal for texts that count as the same."""
    return text_hash(match_key(text))


class HashSet:
    """A set of 64-bit hashes other than 0 in 13 to 27 bytes each; picklable.

    A million hashes take 17 MB, and 25 MB while the table grows; a Python set takes over 60 MB.
    """

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._count = 0
        self._slots = array("Q", bytes(8 * _START))
        for value in hashes:
            self.add(value)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._find(value)] == value

    def add(self, value: int) -> bool:
        """Whether `value` is new."""
        place = self._find(value)
        if self._slots[place] == value:
            return False
        self._slots[place] = value
        self._count += 1
        if self._count > _FILL * len(self._slots):
            self._grow()
        return True

    def _find(self, value: int) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        place = value & mask
        while slots[place] not in (0, value):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._slots[self._find(value)] = value
