"""How long the page takes from its start to its first answer, beside the import of Gradio alone.

python -m benchmarks.page CKPT VOICE      a speaker model and a recording

Each round starts both in processes of their own, in turn; the answer is asked for by HTTP, as a browser does.
The second answer of the same page is timed as well.
"""

import argparse
import datetime
import re
import statistics
import subprocess
import sys
import time

from benchmarks.common import machine
from benchmarks.pages import markdown, origin
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.manifest import versions


def seconds_of_import() -> float:
    """`import gradio` in a process of its own."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True, cwd=ROOT)
    return time.perf_counter() - began


def seconds_of_answers(checkpoint: str, voice: str) -> tuple[float, float]:
    """From the start of the command to its first answer, and for another one."""
    from gradio_client import Client, handle_file

    began = time.perf_counter()
    command = [sys.executable, "-m", "ext_common.page", checkpoint, "--port", "0"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert page.stdout is not None
        found = (re.search(r"http://\S+", line) for line in page.stdout)
        address = next(match[0] for match in found if match)
        client = Client(address, verbose=False, download_files=False)
        client.predict(checkpoint, handle_file(voice), api_name="/identify")
        first = time.perf_counter() - began
        began = time.perf_counter()
        client.predict(checkpoint, handle_file(voice), api_name="/identify")
        return first, time.perf_counter() - began
    finally:
        page.terminate()
        page.wait()


def section(records: list[dict]) -> str:
    """What was measured, with its heading; empty where it was not run yet."""
    parts = []
    for record in records:
        imports, first, second = record["import"], record["first"], record["second"]
        rows = [
            ["`import gradio` alone", f"{imports:.2f} s"],
            ["start of the page to its first answer", f"{first:.2f} s"],
            ["the same beyond that import (goal: 6 s)", f"{first - imports:.2f} s"],
            ["another answer", f"{second:.2f} s"],
        ]
        parts += [markdown(["median", ""], rows), origin(record["command"], [record])]
    return "\n\n".join(["## The page", *parts]) if parts else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("voice")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    imports, answers = [], []
    for _ in range(args.rounds):
        imports.append(seconds_of_import())
        answers.append(seconds_of_answers(args.checkpoint, args.voice))
    first, second = (statistics.median(each) for each in zip(*answers, strict=True))
    record = {
        "run": "page",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "command": "python -m benchmarks.page CKPT VOICE",
        "versions": versions(),
        "import": statistics.median(imports),
        "first": first,
        "second": second,
    }
    Results(RESULTS / "page.jsonl").put(record)
    print(section([record]))


if __name__ == "__main__":
    main()
