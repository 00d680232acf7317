"""The folder of this plugin: fairseq-train DATA --user-dir "$(python -m fairseq_ext)" ..."""

from pathlib import Path

from ext_common.cli import Parser, run


def main(argv: list[str]) -> None:
    """Print the folder that --user-dir wants."""
    Parser(prog="python -m fairseq_ext", description=__doc__).parse_args(argv)
    print(Path(__file__).parent)


if __name__ == "__main__":
    run(main)
