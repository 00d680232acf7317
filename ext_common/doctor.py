"""What is installed, what is broken, and the remedy in one line.

    python -m ext_common.doctor

Standard library only: it has to work where importing torch or fairseq fails. Those are tried in
another process, which may crash. Exit code 0 healthy, 1 something is broken.
"""

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from ext_common import threads
from ext_common.cli import Parser, run
from ext_common.pins import DISTRIBUTION, Pin, requirements, satisfies

_PROBED = ("torch", "torchaudio", "soundfile", "fairseq")
_TIMEOUT = 300  # seconds; a first import from a cold network disk takes minutes

# What a version outside its pin does, where that is known and hard to guess from the symptom.
_WHY = {
    "torch": "newer wheels are built for another CUDA than any torchaudio, which then refuses to"
    " import",
    "hydra-core": "fairseq reads its configuration through 1.3 only",
    "omegaconf": "checkpoints and fairseq's dataclasses need 2.3",
    "ve-fairseq": "ext_common.compat closes the gaps of exactly this version",
}
# (text in the import error, what it means and what to do)
_SYMPTOMS = (
    (
        "different CUDA versions",
        "torch and torchaudio were built for different CUDA versions: pip install {torch}",
    ),
    (
        "mutable default",
        "this fairseq does not run on Python 3.11: pip uninstall -y fairseq;"
        " pip install --force-reinstall --no-deps {ve-fairseq}",
    ),
    (
        "undefined symbol",
        "built against another torch: pip install --force-reinstall {torch} {torchaudio}",
    ),
    (
        "No module named",
        "a dependency is missing: pip install -e . (or bash scripts/setup.sh)",
    ),
)

_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps({"start": name}), flush=True)
    answer = {"name": name}
    try:
        module = importlib.import_module(name)
        answer["path"] = getattr(module, "__file__", None)
        if name == "torch":
            answer["threads"] = module.get_num_threads()
            answer["cuda"] = module.version.cuda
            cuda = module.cuda
            usable = cuda.is_available()
            count = cuda.device_count() if usable else 0
            answer["gpus"] = [cuda.get_device_name(i) for i in range(count)]
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Finding(NamedTuple):
    """One line of the report; `level` is "ok", "note" or "broken"."""

    level: str
    text: str


def main(argv: list[str]) -> int:
    """Say what is installed, what is broken, and the remedy."""
    parser = Parser(prog="python -m ext_common.doctor", description=main.__doc__)
    parser.add_argument("--quiet", action="store_true", help="print only what is broken")
    args = parser.parse_args(argv)
    broken = 0
    for finding in examine():
        broken += finding.level == "broken"
        if finding.level == "broken" or not args.quiet:
            print(f"{finding.level:<7} {finding.text}", flush=True)
    if not args.quiet:
        print(f"{broken} broken" if broken else "healthy")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """All findings; the quick ones first."""
    python, pins, source = requirements()
    yield from check_python(python)
    yield from machine()
    yield from openmp()
    if source is None:
        yield Finding("broken", f"{DISTRIBUTION} is not installed: pip install -e . in its folder")
    yield from itertools.chain.from_iterable(map(check_pin, pins.values()))
    yield from which_fairseq(pins)
    yield from environment()
    yield from check_imports(pins)


def check_python(specifier: str) -> Iterator[Finding]:
    """The running Python against the range in setup.cfg."""
    version = platform.python_version()
    if satisfies(version, specifier):
        yield Finding("ok", f"Python {version} ({sys.executable})")
    else:
        yield Finding(
            "broken",
            f"Python {version} is outside {specifier}: remove .venv and run bash scripts/setup.sh,"
            " which finds or fetches one that fits",
        )


def machine() -> Iterator[Finding]:
    """System, processors and memory, as this process may use them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(
        "ok",
        f"{platform.system()} {platform.machine()}, {usable} of {os.cpu_count()} CPUs usable,"
        f" {memory:.1f} GiB memory",
    )


def openmp() -> Iterator[Finding]:
    """Threads and how they wait, as the user set them, and what our commands set where the user did not."""
    count, policy = threads.given(threads.COUNT), threads.policy()
    said = f"{threads.COUNT} {count or 'not set'}, {policy or 'how they wait is not set'}"
    wanted = [] if count else [f"{threads.COUNT}={threads.cores()}"]
    wanted += [] if policy else [threads.assignments(threads.WAITING)]
    if wanted:
        said += f"; our commands take {' '.join(wanted)}"
    if policy or count == "1":
        yield Finding("ok", said)
        return
    yield Finding(
        "note",
        f"{said}; before fairseq-train: export {threads.assignments(threads.WAITING)} (threads that spin"
        " while they wait make small models up to ten times slower on a busy machine)",
    )


def check_pin(pin: Pin) -> Iterator[Finding]:
    """One installed version against its requirement."""
    try:
        version = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        yield Finding("broken", f"{pin.name} is not installed: pip install {pin}")
        return
    if satisfies(version, pin.specifier):
        yield Finding("ok", f"{pin.name} {version} ({pin.specifier})")
        return
    why = f" ({_WHY[pin.name]})" if pin.name in _WHY else ""
    yield Finding(
        "broken", f"{pin.name} {version} is outside {pin.specifier}{why}: pip install {pin}"
    )


def which_fairseq(pins: dict[str, Pin]) -> Iterator[Finding]:
    """Which distribution the importable `fairseq` comes from; finding it does not import it."""
    spec = util.find_spec("fairseq")
    place = Path(spec.origin).parent if spec and spec.origin else None
    wanted = pins.get("ve-fairseq", Pin("ve-fairseq", ""))
    try:
        official = metadata.version("fairseq")
    except metadata.PackageNotFoundError:
        official = None
    if official is not None:
        # Both unpack into one folder, and whichever came last has overwritten the other.
        yield Finding(
            "broken",
            f"the official fairseq {official} is installed ({place}), which does not run on Python"
            " 3.11 and current PyTorch: pip uninstall -y fairseq;"
            f" pip install --force-reinstall --no-deps {wanted}",
        )
    elif place is None:
        yield Finding("broken", f"fairseq cannot be found: pip install {wanted}")
    else:
        yield Finding("ok", f"fairseq is the one of ve-fairseq, at {place}")
        owner = _distribution_folder("ve-fairseq")
        if owner is not None and owner != place.parent:
            yield Finding(
                "note",
                f"ve-fairseq is installed in {owner}, but {place} comes first on the path: take"
                " that off PYTHONPATH unless you mean it",
            )


def environment() -> Iterator[Finding]:
    """Environment variables that change what this project does."""
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y"):
            effect = (
                "lets a checkpoint run any code" if "_NO_" in name else "is what happens without it"
            )
            yield Finding("note", f"{name} is set, which {effect}: unset it, it is not needed")


def check_imports(pins: dict[str, Pin]) -> Iterator[Finding]:
    """Import what matters in another process; what kills that one is named and the rest goes on."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("note", "CUDA_VISIBLE_DEVICES is empty: no GPU is used")
    for answer in probe(_PROBED):
        name = answer["name"]
        if "error" in answer:
            error = " ".join(answer["error"].split())
            yield Finding("broken", f"import {name} fails: {remedy(name, error, pins)} [{error}]")
            continue
        text = f"import {name} works"
        if name == "torch":
            text += f" ({answer['threads']} threads, built for {cuda_name(answer['cuda'])})"
        yield Finding("ok", text)
        if name == "torch":
            yield from _gpus(answer)


def _gpus(answer: dict[str, Any]) -> Iterator[Finding]:
    for gpu in answer["gpus"]:
        yield Finding("ok", f"GPU {gpu}")
    if answer["gpus"]:
        return
    if shutil.which("nvidia-smi"):
        yield Finding(
            "note",
            f"nvidia-smi is here, but PyTorch (built for {cuda_name(answer['cuda'])}) sees no GPU:"
            " update the driver, or install a torch for the CUDA version nvidia-smi shows",
        )
    else:
        yield Finding("ok", "no GPU: everything runs on the CPU")


def probe(names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One answer for each module: `{"name", "path", ...}`, or `"error"` where it failed."""
    left = list(names)
    while left:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE, *left],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
            output, ended = done.stdout, _how_ended(done.returncode)
        except subprocess.TimeoutExpired as error:
            said = error.stdout or ""
            output = said.decode() if isinstance(said, bytes) else said
            ended = f"no end within {_TIMEOUT} s"
        answered = []
        for line in output.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # modules print things while they are imported
            if isinstance(record, dict) and record.get("name") in left:
                answered.append(record["name"])
                yield record
        left = [name for name in left if name not in answered]
        if left:
            # The process died in the first one without an answer; the others get a new process.
            yield {"name": left.pop(0), "error": f"the process ended with {ended}"}


# --- pure ---------------------------------------------------------------------------------------


def remedy(name: str, error: str, pins: dict[str, Pin]) -> str:
    """What to do about a module that fails to import with `error`."""
    quoted = {pin.name: str(pin) for pin in pins.values()}
    for symptom, advice in _SYMPTOMS:
        if symptom in error:
            return re.sub(r"\{([\w-]+)\}", lambda found: quoted.get(found[1], found[1]), advice)
    dist = "ve-fairseq" if name == "fairseq" else name
    return f"pip install --force-reinstall {quoted.get(dist, dist)}"


def cuda_name(cuda: str | None) -> str:
    """How torch was built, in words."""
    return f"CUDA {cuda}" if cuda else "CPU only"


def _how_ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _distribution_folder(name: str) -> Path | None:
    try:
        return Path(str(metadata.distribution(name).locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run(main)
