"""What --encoder, --pooling, --criterion and --augment know: python -m fairseq_ext.speaker.parts"""

from ext_common.cli import Parser, run


def main(argv: list[str]) -> None:
    """The command."""
    Parser(prog="python -m fairseq_ext.speaker.parts", description=__doc__).parse_args(argv)
    from fairseq_ext.speaker.augment import AUGMENTATIONS
    from fairseq_ext.speaker.conformer import ENCODERS
    from fairseq_ext.speaker.margins import MARGINS
    from fairseq_ext.speaker.pooling import POOLINGS

    for flag, registry in (
        ("--encoder", ENCODERS),
        ("--pooling, --pooling-options", POOLINGS),
        ("--criterion (its options are flags)", MARGINS),
        ("--augment", AUGMENTATIONS),
    ):
        print(f"{registry.kind}: {flag}\n{registry.describe()}\n")


if __name__ == "__main__":
    run(main)
