"""The Free Spoken Digit Dataset (FSDD): six people say the digits, 3,000 recordings (16 MB).

python scripts/download_fsdd.py DEST

Writes DEST/7_jackson_32.wav and so on, from its archive on GitHub (CC BY-SA 4.0). Numbers 0 to 4 of
each digit and speaker are the official test split.
"""

import io
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from ext_common.cli import Parser, UserError, progress, run

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
NAME = re.compile(r"[^/]+/recordings/(\d_[a-z]+_\d+\.wav)")


def main(argv):
    """The command."""
    parser = Parser(prog="python scripts/download_fsdd.py", description=__doc__)
    parser.add_argument("dest", metavar="DEST", help="folder to write")
    parser.add_argument(
        "--url", default=URL, help="another place of the archive (default: %(default)s)"
    )
    parser.add_argument("--archive", metavar="FILE", help="the archive, where it is here already")
    args = parser.parse_args(argv)
    dest = Path(args.dest)
    if dest.is_dir() and any(dest.glob("*_*_*.wav")):
        print(f"{dest} is there already: nothing to do")
        return
    if dest.exists():
        raise UserError(f"{dest} exists and is not FSDD: give a new folder")
    content = read_archive(args.archive) if args.archive else download(args.url)
    count = unpack(content, dest, args.archive or args.url)
    print(f"{dest}: {count} recordings")


def read_archive(path):
    """The bytes of a local archive."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def download(url):
    """The bytes behind `url`."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            total = int(answer.headers.get("Content-Length") or 0) // 1024
            content = io.BytesIO()
            with progress(total, "downloading", "KiB") as bar:
                while piece := answer.read(1 << 18):
                    content.write(piece)
                    bar.update(len(piece) // 1024)
            return content.getvalue()
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} cannot be reached ({reason}): where there is no network, fetch the file "
            "elsewhere and give it with --archive"
        ) from None


def unpack(content, dest, source):
    """Write the recordings of the archive to `dest`, whole or not at all; their number."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
    part.chmod(0o755)
    count = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
            for member in archive:
                match = NAME.fullmatch(member.name)
                if match and member.isfile():
                    (part / match[1]).write_bytes(archive.extractfile(member).read())
                    count += 1
        if not count:
            raise UserError(f"{source} holds no recordings/DIGIT_NAME_NUMBER.wav: not FSDD")
        os.replace(part, dest)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{source} is not a whole tar.gz archive ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return count


if __name__ == "__main__":
    run(main)
