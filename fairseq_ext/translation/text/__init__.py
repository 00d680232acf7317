"""What a line of text is: normalisation, files, SentencePiece models and the dictionaries made from them."""

from ext_common.aliases import names_of

__getattr__ = names_of(f"{__name__}.normalise")
