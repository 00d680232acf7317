"""What translation_spm needs where fairseq asks no task: scoring by language."""

from collections.abc import Callable

from fairseq import scoring

from ext_common.compat.patching import replace
from fairseq_ext.translation.score import metrics
from fairseq_ext.translation.text.vocabulary import SpmDictionary


def score_by_language() -> None:
    """`fairseq-generate` ends with BLEU of words between spaces (`--scoring bleu`), which Chinese lacks.

    For our dictionaries the default is sacreBLEU with the tokenizer of the language, and chrF.
    """

    def make_scorer(original: Callable) -> Callable:
        def build_scorer(choice, tgt_dict):
            name = getattr(choice, "_name", choice)
            if name == "bleu" and isinstance(tgt_dict, SpmDictionary):
                return metrics.CorpusScorer(tgt_dict.lang)
            return original(choice, tgt_dict)

        return build_scorer

    replace(scoring, "build_scorer", make_scorer, ('_choice == "bleu"',))
