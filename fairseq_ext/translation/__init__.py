"""Machine translation: from raw bitext to a scored Transformer."""

__all__ = ["Translator"]


def __getattr__(name: str) -> type:
    # fairseq is imported only when a model is wanted
    if name == "Translator":
        from fairseq_ext.translation.decode.translator import Translator

        return Translator
    raise AttributeError(name)
