"""Train the three small models of the other quickstarts, and open a page to use them.

bash scripts/quickstart.sh page

What a quickstart trained before, in its folder here, is taken as it is. Who is enrolled on the page is kept
beside the speaker model. Ctrl-C ends the page.
"""

import os
import subprocess
import sys
from pathlib import Path

from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.page import Settings

HERE = Path(__file__).resolve().parent
JOBS = ("speaker", "translation", "diffusion")


def main(argv):
    """The command."""
    parser = Parser(prog="bash scripts/quickstart.sh page", description=__doc__)
    add_dataclass(parser, Settings)
    args = parser.parse_args(argv)
    settings = from_args(Settings, args)
    for job in JOBS:
        if not list(Path(f"quickstart-{job}").glob("**/checkpoint_best.pt")):
            print(f"\nTraining for {job}:", flush=True)
            command = [sys.executable, str(HERE / f"{job}.py")]
            # the one of translation ends by asking for sentences
            done = subprocess.run(command, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise UserError(
                    f"the quickstart of {job} failed, see above: mend that and run again"
                )
    folders = [f"quickstart-{job}" for job in JOBS]
    command = [sys.executable, "-m", "ext_common.page", *folders, *argv]
    if settings.data is None:
        command += ["--data", "quickstart-diffusion/data"]  # beside what is drawn the nearest of it
    os.execv(sys.executable, command)


if __name__ == "__main__":
    run(main)
