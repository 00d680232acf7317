"""fairseq-train that is killed by SIGKILL half-way through writing or copying a checkpoint.

    python die.py write|copy NUMBER ARGUMENTS-OF-FAIRSEQ-TRAIN…

dies in the NUMBER-th write (or copy), after half of its bytes have reached the file system.
"""

import io
import os
import shutil
import signal
import sys

import torch

where, number = sys.argv[1], int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
count = 0


def half_then_die(data, file):
    global count
    count += 1
    if count < number:
        return file.write(data)
    file.write(data[: len(data) // 2])
    file.flush()
    os.fsync(file.fileno())
    os.kill(os.getpid(), signal.SIGKILL)


def save(obj, file, *args, _save=torch.save, **kwargs):
    buffer = io.BytesIO()
    _save(obj, buffer, *args, **kwargs)
    half_then_die(buffer.getvalue(), file)


def copyfile(source, target, **kwargs):
    # What fairseq itself copies with: the driver must bite there too.
    with open(source, "rb") as reader, open(target, "wb") as writer:
        half_then_die(reader.read(), writer)
    return target


if where == "write":
    torch.save = save
else:
    shutil.copyfileobj = lambda source, target, *args: half_then_die(source.read(), target)
    shutil.copyfile = copyfile

from fairseq_cli.train import cli_main  # noqa: E402

if __name__ == "__main__":
    cli_main()
