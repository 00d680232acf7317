"""Write, and submit, a SLURM job for a command of this house, which goes on where preemption has stopped it.

    python -m ext_common.launch --nodes 2 --gpus 4 --submit -- fairseq-train DATA --user-dir fairseq_ext …
    python -m ext_common.launch --array 64 -- python -m fairseq_ext.backtranslation.generate MONO DEST …

A training gets one task a node, with torchrun inside. Before its time is up, or when it is preempted, SLURM
tells the batch shell alone: that touches SAVE_DIR/stop, all processes save at the same update, and the job is
queued again, to go on at it. Any other command is one task, or with --array as many that share the work, as
`backtranslation.generate` does; it is ended, and queued again to go on.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import atomic_write

TRAININGS = ("fairseq-train", "fairseq-hydra-train")
# What makes of one training several, each with one GPU and all with one folder.
TRAPS = ("--ntasks", "-n", "--ntasks-per-node", "--ntasks-per-gpu", "--gpus-per-task")


@dataclass
class LaunchOptions:
    """What SLURM is asked for."""

    nodes: int = field(default=1, metadata={"help": "machines of a training"})
    gpus: int = field(default=0, metadata={"help": "GPUs of each machine; 0: it runs on CPUs"})
    processes: Optional[int] = field(
        default=None, metadata={"help": "processes on each machine (none: one a GPU, or one)"}
    )
    cpus: int = field(default=4, metadata={"help": "CPU cores of each process"})
    time: str = field(default="1-00:00:00", metadata={"help": "time limit, DAYS-HH:MM:SS"})
    warning: int = field(
        default=120, metadata={"help": "seconds before that, in which a training saves and stops"}
    )
    array: int = field(
        default=0, metadata={"help": "tasks that share the work of a command; 0: no job array"}
    )
    restarts: int = field(
        default=3,
        metadata={
            "help": "times that torchrun starts all again after a process of a training died"
        },
    )
    stage: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder on each node's own disk, into which the DATA of a training is copied"
        },
    )
    job_name: Optional[str] = field(
        default=None, metadata={"help": "name of the job (none: that of the folder it writes)"}
    )
    sbatch: List[str] = field(
        default_factory=list,
        metadata={"help": "further options of sbatch, as --partition=gpu,--account=me"},
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "script to write (none: NAME.sbatch here)"}
    )
    submit: bool = field(default=False, metadata={"help": "also give it to sbatch"})

    def __post_init__(self) -> None:
        least_of = dict(nodes=1, gpus=0, cpus=1, warning=1, array=0, restarts=0)
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}")
        trap = next((one for one in self.sbatch if one.split("=")[0].split()[0] in TRAPS), None)
        if trap:
            raise ValueError(
                f"--sbatch {trap} would start several trainings that each see one GPU and write into one"
                " folder: leave it out; --nodes and --processes say how many processes one training has"
            )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(
        prog="python -m ext_common.launch",
        usage="%(prog)s [FLAGS] -- COMMAND",
        description=__doc__,
    )
    add_dataclass(parser, LaunchOptions)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = from_args(LaunchOptions, parser.parse_args(argv[:cut]))
    command = argv[cut + 1 :]
    if not command:
        raise UsageError("the command is missing: give it behind --, as -- fairseq-train DATA …")
    name, text = script(command, options)
    path = Path(options.output or f"{name}.sbatch")
    with atomic_write(path) as file:
        file.write(text)
    print(f"wrote {path}")
    if not options.submit:
        print(f"submit it: sbatch {shlex.quote(str(path))}")
        return
    try:
        subprocess.run(["sbatch", str(path)], check=True)
    except FileNotFoundError:
        raise UserError("sbatch is not here: run this on a machine of the cluster") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused {path} (its exit code is {error.returncode})") from None


def script(command: Sequence[str], options: LaunchOptions) -> tuple[str, str]:
    """(name of the job, text of the script for sbatch) of a command."""
    if is_training(command):
        if options.array:
            raise UsageError(
                "--array is for commands that share their work: a training has --nodes"
            )
        command, folder = with_save_dir(command)
        name = options.job_name or Path(folder).name
        body = training(command, folder, options)
        resources = ["--ntasks-per-node=1", f"--nodes={options.nodes}"]
        processes = options.processes or options.gpus or 1
    else:
        if options.nodes > 1 or options.stage:
            raise UsageError("--nodes and --stage are for trainings: give --array, or neither")
        name = options.job_name or command_name(command)
        body = JOB.format(command=shlex.join(command))
        resources, processes = ["--ntasks=1"], 1
        resources += [f"--array=0-{options.array - 1}"] if options.array else []
    resources += [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    lines = [
        f"--job-name={re.sub(r'[^-.A-Za-z0-9_]', '_', name)}",
        *resources,
        f"--cpus-per-task={options.cpus * processes}",
        f"--time={options.time}",
        f"--signal=B:USR1@{options.warning}",
        "--requeue",
        "--open-mode=append",
        *options.sbatch,
    ]
    head = "".join(f"#SBATCH {line}\n" for line in lines)
    return name, f"#!/bin/bash\n{head}{body}"


def is_training(command: Sequence[str]) -> bool:
    return Path(command[0]).name in TRAININGS or module_of(command) == "diffusion_ext.train"


def module_of(command: Sequence[str]) -> str | None:
    """What `python -m` of a command runs."""
    python = Path(command[0]).name.startswith("python")
    return command[2] if python and list(command[1:2]) == ["-m"] and len(command) > 2 else None


def command_name(command: Sequence[str]) -> str:
    return (module_of(command) or Path(command[0]).name).removesuffix(".generate")


def with_save_dir(command: Sequence[str]) -> tuple[list[str], str]:
    """A training with its --save-dir, the one that presets choose where none is given, and that folder."""
    from ext_common.presets.save_dirs import default_save_dir

    words = list(command)
    given = value_of(words, "--save-dir") or value_of(words, "checkpoint.save_dir")
    if given:
        return words, given
    if Path(words[0]).name == "fairseq-hydra-train":
        raise UsageError("checkpoint.save_dir is missing: the job is stopped by a file in it")
    data = data_of(words)
    task = "diffusion" if module_of(words) else value_of(words, "--task")
    if not task:
        raise UsageError("--task is missing in the command")
    folder = str(default_save_dir(data, task)[0])
    return [*words, "--save-dir", folder], folder


def data_of(words: Sequence[str]) -> str:
    """DATA of a training, the word behind its name."""
    place = 3 if module_of(words) else 1
    if len(words) <= place or words[place].startswith("-"):
        raise UsageError(f"DATA comes right behind {' '.join(words[:place])} in the command")
    return words[place]


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, as `FLAG VALUE` or `FLAG=VALUE`."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def training(command: list[str], folder: str, options: LaunchOptions) -> str:
    """The body of the script of a training."""
    staging = ""
    if options.stage:
        place = 3 if module_of(command) else 1
        parts = data_of(command).split(":")
        staged = [str(Path(options.stage) / Path(part).resolve().name) for part in parts]
        if len(set(staged)) < len(staged):
            raise UsageError("--stage: two folders of DATA have one name, and would be one copy")
        for part, copy in zip(parts, staged, strict=True):
            staging += STAGE.format(
                data=shlex.quote(str(Path(part).resolve())), copy=shlex.quote(copy)
            )
        command = [*command[:place], ":".join(staged), *command[place + 1 :]]
    torchrun = ["torchrun", "--nnodes", '"$SLURM_JOB_NUM_NODES"', "--nproc_per_node"]
    torchrun += [
        str(options.processes or options.gpus or 1),
        "--max-restarts",
        str(options.restarts),
    ]
    torchrun += [
        "--node_rank",
        '"$SLURM_NODEID"',
        "--master_addr",
        '"$head"',
        "--master_port",
        '"$port"',
    ]
    program = shlex.join(command)
    if module_of(command):
        program = shlex.join(command[1:])
    else:
        torchrun.append("--no-python")
    return TRAINING.format(
        folder=shlex.quote(folder), staging=staging, torchrun=" ".join(torchrun), command=program
    )


STAGE = """
# a copy is there when it is whole; each node makes its own
srun --ntasks-per-node=1 bash -c '
    [ -e "$2" ] && exit
    mkdir -p "$(dirname "$2")" && rm -rf "$2.partial" && cp -r "$1" "$2.partial" && mv -T "$2.partial" "$2"
' stage {data} {copy} || exit
"""

TRAINING = r"""
folder={folder}
mkdir -p "$folder" && rm -f "$folder/stop" "$folder/stopped"
# SLURM tells this shell alone; the training looks for the file
trap 'touch "$folder/stop"' USR1 TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export head port
{staging}
srun --kill-on-bad-exit=1 bash -c 'exec {torchrun} "$@"' torchrun {command} &
job=$!
# a signal ends the waiting, not the training
while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done
if [ -e "$folder/stopped" ]; then
    rm "$folder/stopped"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
rm -f "$folder/stop"
exit "$code"
"""

JOB = r"""
again=
trap 'again=yes; kill -TERM "$job"' USR1 TERM
{command} &
job=$!
while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done
if [ -n "$again" ] && [ "$code" != 0 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    exit 0
fi
exit "$code"
"""


if __name__ == "__main__":
    run(main)
