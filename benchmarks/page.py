"""How long the page takes from its start to its first answer, beside the import of Gradio alone.

python -m benchmarks.page CKPT VOICE      a speaker model and a recording

Each round starts both in processes of their own, in turn; the answer is asked for by HTTP, as a browser does.
The second answer of the same page is timed as well, and, where Chromium is there, the name of who speaks into
its microphone, which plays the recording: from the click on Stop to the name on the page.
"""

import argparse
import datetime
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import chromium, machine
from benchmarks.pages import markdown, origin
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.manifest import versions


def seconds_of_import() -> float:
    """`import gradio` in a process of its own."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True, cwd=ROOT)
    return time.perf_counter() - began


def seconds_of_answers(checkpoint: str, voice: str) -> tuple[float, float, float | None]:
    """From the start of the command to its first answer; for another one; from Stop to a name."""
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
        second = time.perf_counter() - began
        return first, second, seconds_to_name(address, voice)
    finally:
        page.terminate()
        page.wait()


def seconds_to_name(address: str, voice: str) -> float | None:
    """Of a voice that is recorded for three seconds; None where there is no Chromium."""
    if (program := chromium()) is None:
        return None
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags.append(f"--use-file-for-fake-audio-capture={Path(voice).resolve()}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Speaker").wait_for(timeout=60_000)
        page.get_by_role("button", name="Record", exact=True).first.click()
        time.sleep(3)
        began = time.perf_counter()
        page.get_by_role("button", name="Stop", exact=True).first.click()
        page.locator("#speaker-name h2", has_not_text="–").wait_for(timeout=60_000)
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


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
        if named := record.get("named"):
            rows.append(["Chromium: from Stop to the name (goal: 2 s)", f"{named:.2f} s"])
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
    first, second, named = zip(*answers, strict=True)
    record = {
        "run": "page",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "command": "python -m benchmarks.page CKPT VOICE",
        "versions": versions(),
        "import": statistics.median(imports),
        "first": statistics.median(first),
        "second": statistics.median(second),
        "named": None if None in named else statistics.median(named),
    }
    Results(RESULTS / "page.jsonl").put(record)
    print(section([record]))


if __name__ == "__main__":
    main()
