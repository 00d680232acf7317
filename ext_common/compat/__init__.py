"""What fairseq 0.12.3 needs on today's Python and PyTorch, done at run time.

Nothing in site-packages is edited.

``apply()`` is called by the plugins when fairseq imports them. Each gap is one function, whose
docstring states the symptom, the place in fairseq and the upstream issue where there is one:

    messages      known harmless warnings, one-sentence errors
    files         (no fairseq) what a checkpoint file is and how one is written
    checkpoints   reading under weights_only, whole files whenever the process dies, resume
    processes     several processes: torchrun and spawning on CPU, gloo, buffers, gathers
    training      EMA, bf16, log file, best metric, data folder
    schedules     what a learning-rate schedule knows of its model

A gap whose place in fairseq no longer looks as it did is left open with a warning.
"""

_applied = False


def apply() -> None:
    """Close the gaps; calling it again, from this or another plugin, changes nothing."""
    global _applied
    if _applied:
        return
    # Set first: the imports below can come back here through another plugin.
    _applied = True
    from ext_common.compat import checkpoints, messages, processes, schedules, training

    for room in (messages, checkpoints, processes, training, schedules):
        for close_gap in room.GAPS:
            close_gap()
