"""Old name of `fairseq_ext.draw_rates`."""

from ext_common.aliases import names_of

__getattr__ = names_of("fairseq_ext.draw_rates")

if __name__ == "__main__":
    from ext_common.cli import run
    from fairseq_ext.draw_rates import main

    run(main)
