"""Work that any number of processes share without a master: a piece belongs to whom its file is named after.

FOLDER/todo/NAME                                               nobody does it yet
FOLDER/claimed/NAME@HOST@BOOT@NAMESPACE@PID@STARTED@NONCE      this process does it
FOLDER/scratch/…                                               clocks, and files that are half written

A claim is a rename, which only one process wins, from todo or from an owner that is dead. Owners touch their
claims; on other machines that is the only sign of life. A process that is taken for dead by mistake loses its
claim and nothing else: who does a piece again gets the same result.
"""

import contextlib
import errno
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a claim may be taken over."""
POLL = (0.05, 2.0)
"""Seconds between two looks at what others do: first, longest."""
# A file that another machine removed from a shared directory answers with ESTALE.
GONE = (errno.ENOENT, errno.ESTALE)


@dataclass(frozen=True)
class Owner:
    """A process, told from every other one there is or was.

    boot: id of the start of its machine; namespace: in which its pid counts (containers); started: clock
    ticks from that start to its own, because pids are used again.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "Owner":
        """The calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _boot(), _namespace(), pid, start_time(pid) or "0")

    @classmethod
    def parse(cls, text: str) -> "Owner":
        """From the form of `str`; ValueError for another."""
        host, boot, namespace, pid, started = map(unquote, text.split("@"))
        return cls(host, boot, namespace, int(pid), started)

    def __str__(self) -> str:
        parts = (self.host, self.boot, self.namespace, str(self.pid), self.started)
        return "@".join(quote(part, safe="") for part in parts)

    def knows_dead(self, other: "Owner") -> bool:
        """Whether `other` is dead beyond doubt, as seen by this process on its own machine."""
        if other.host != self.host:
            return False
        if other.boot != self.boot:
            return True
        if other.namespace != self.namespace:
            return False
        return start_time(other.pid) != other.started


def start_time(pid: int) -> str | None:
    """Clock ticks from the machine's start to that of a process; None where it does not live."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name of the program, in brackets, may hold anything
    fields = stat.rpartition(b")")[2].split()
    # a zombie has an entry until its parent asks for it, and does nothing more
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some sandboxes
        return "0"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return "0"


def pauses() -> Iterator[float]:
    """Seconds to wait, more each time."""
    pause, longest = POLL
    while True:
        yield pause
        pause = min(1.5 * pause, longest)


@contextlib.contextmanager
def if_there() -> Iterator[None]:
    """Leaves the block where a file is no longer there: another process was faster."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise


class Heart:
    """A thread that touches what this process holds; a context."""

    def __init__(self, interval: float = HEARTBEAT) -> None:
        self.interval = interval
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def hold(self, path: Path) -> None:
        with self._lock:
            self._held.add(path)

    def let_go(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval):
            with self._lock:
                held = list(self._held)
            for path in held:
                # a claim that is lost or a network that is away for a moment: the next beat will tell
                with contextlib.suppress(OSError):
                    os.utime(path)


class Watch:
    """Tells whether others live, by the clock of the file system that `folder` is on."""

    def __init__(self, folder: Path, owner: Owner, patience: float = PATIENCE) -> None:
        self.folder, self.owner, self.patience = folder, owner, patience
        self._clock = folder / f"{owner}@{secrets.token_hex(4)}"

    def dead(self, other: Owner, path: Path) -> bool:
        """Whether `other` is dead, or left `path` without a sign of life for too long."""
        if other == self.owner:
            return False
        if self.owner.knows_dead(other):
            return True
        with if_there():
            # machines disagree on the time, the file system does not with itself
            self._clock.touch()
            return _touched(self._clock) - _touched(path) > self.patience
        return False


def _touched(path: Path) -> float:
    """mtime of a path, which on NFS only opening it reads anew."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


class Claim(NamedTuple):
    """A piece of work that this process does."""

    name: str
    path: Path


class Claims:
    """The pieces of work in a folder; `taken` are those that this object holds."""

    def __init__(self, folder: Path, owner: Owner, heart: Heart, patience: float = PATIENCE):
        self.todo, self.claimed = folder / "todo", folder / "claimed"
        self.owner, self.heart = owner, heart
        self.watch = Watch(folder / "scratch", owner, patience)
        self.taken: dict[str, Claim] = {}

    @staticmethod
    def set_up(folder: Path, names: Iterator[str] | list[str]) -> None:
        """The folders, with a piece of each name to do."""
        for sub in ("todo", "claimed", "scratch"):
            (folder / sub).mkdir(parents=True)
        for name in names:
            (folder / "todo" / name).touch()

    def take(self) -> Claim | None:
        """A piece whose owner is dead, or else the first that nobody does; None where there is none."""
        for entry in sorted(os.listdir(self.claimed)):
            name, _, rest = entry.partition("@")
            with contextlib.suppress(ValueError):
                owner = Owner.parse(rest.rpartition("@")[0])
                path = self.claimed / entry
                if self.watch.dead(owner, path) and (claim := self._rename(path, name)):
                    return claim
        for name in sorted(os.listdir(self.todo), key=lambda name: (len(name), name)):
            if claim := self._rename(self.todo / name, name):
                return claim
        return None

    def drop(self, claim: Claim) -> None:
        """The piece is done, or is no longer this process's."""
        self._end(claim, claim.path.unlink)

    def put_back(self, claim: Claim) -> None:
        """Leave the piece to others."""
        self._end(claim, lambda: claim.path.rename(self.todo / claim.name))

    def put_back_all(self) -> None:
        for claim in list(self.taken.values()):
            self.put_back(claim)

    def _end(self, claim: Claim, how: Callable[[], object]) -> None:
        self.heart.let_go(claim.path)
        with if_there():
            how()
        self.taken.pop(claim.path.name, None)

    def _rename(self, path: Path, name: str) -> Claim | None:
        claim = Claim(name, self.claimed / f"{name}@{self.owner}@{secrets.token_hex(4)}")
        # known before it exists, so that an interruption in between loses nothing
        self.taken[claim.path.name] = claim
        with if_there():
            # a rename keeps the time, and without a new one the claim could look abandoned
            os.utime(path)
            os.rename(path, claim.path)
        # asked, not concluded: over a network a rename that was made can answer that it was not
        if claim.path.exists():
            self.heart.hold(claim.path)
            return claim
        del self.taken[claim.path.name]
        return None


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process speaks for all that torchrun or SLURM started."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def device_of_rank(device: str, environ: Mapping[str, str]) -> str:
    """`device`, where it is auto the GPU of this process under torchrun or SLURM."""
    rank = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID"))
    if device != "auto" or rank is None or not rank.isdigit():
        return device
    import torch

    # SLURM can also show each process its own GPU only
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(rank) % count}" if count else device
