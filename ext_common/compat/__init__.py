"""What is broken in fairseq 0.12.3 on today's Python and PyTorch, mended at run time.

Nothing in site-packages is edited. Each gap is one function, which can be taken out when fairseq
mends it; its docstring states the symptom and the upstream thread, the strings it `expects` are what
must stand in fairseq's source: where they do not, the gap is left open with a warning.

    messages      known harmless warnings, one-sentence errors
    files         (no fairseq) what a checkpoint file is and how one is written
    imports       (no fairseq) what fairseq imports for other tasks comes when it is used
    checkpoints   reading under weights_only, whole files whenever the process dies
    resume        going on at the same place of the data, not beyond the end
    launchers     SLURM's tasks, torchrun's restarts
    processes     several processes: torchrun and spawning on CPU, gloo, buffers, gathers
    training      EMA, bf16, log file, data folder, the end
    patching      how a function is replaced;  command: where fairseq_cli.train is

`apply()` closes them all. What we *add* to fairseq's training is in `ext_common.engine`, whose own
`apply()` the plugins call when fairseq imports them.
"""

_applied = False


def apply() -> None:
    """Close the gaps; calling it again, from this or another plugin, changes nothing."""
    global _applied
    if _applied:
        return
    # Set first: the imports below can come back here through another plugin.
    _applied = True
    from ext_common.compat import checkpoints, launchers, messages, processes, resume, training

    processes.at_start[:] = [apply]
    for room in (messages, checkpoints, launchers, processes, training, resume):
        for close_gap in room.GAPS:
            close_gap()
