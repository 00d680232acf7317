"""Speaker identification. Importing `fairseq_ext` where fairseq is loaded makes it know the parts.

from fairseq_ext.speaker import SpeakerModel

SpeakerModel.from_checkpoint("CKPT/checkpoint_best.pt").identify("x.wav").speaker
"""


def __getattr__(name: str) -> type:
    # Not imported at once: the commands that need no model must start without it.
    if name == "SpeakerModel":
        from fairseq_ext.speaker.inference import SpeakerModel

        return SpeakerModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
