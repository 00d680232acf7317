"""What translation_spm needs where fairseq asks no task: scoring by language, checks before resuming."""

from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils, scoring, trainer

from ext_common.compat.patching import replace
from fairseq_ext.translation import metrics
from fairseq_ext.translation.vocabulary import SpmDictionary


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


def check_before_resuming() -> None:
    """A training resumes without asking the task whether the checkpoint fits it.

    Another vocabulary of the same size would go on with permuted embeddings and say nothing. Tasks with
    `check_resume(state, same_run)` are asked; same_run is False where only the weights are taken over.
    """
    asked: list[tuple[Any, bool]] = []

    def make_load_and_ask(original: Callable) -> Callable:
        def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
            asked.append((self.task, not reset_optimizer))
            try:
                return original(self, filename, reset_optimizer, *args, **kwargs)
            finally:
                asked.pop()

        return load_checkpoint

    def make_read_and_answer(original: Callable) -> Callable:
        def load_checkpoint_to_cpu(*args, **kwargs):
            state = original(*args, **kwargs)
            task, same_run = asked[-1] if asked else (None, False)
            if hasattr(task, "check_resume"):
                task.check_resume(state, same_run)
            return state

        return load_checkpoint_to_cpu

    replace(trainer.Trainer, "load_checkpoint", make_load_and_ask, ("reset_optimizer=False",))
    replace(checkpoint_utils, "load_checkpoint_to_cpu", make_read_and_answer, ("torch.load(f,",))
