"""BLEU and chrF of what a model translates in validation, whatever the batches and processes."""

import math
from argparse import Namespace
from typing import Any

import torch
from fairseq.logging import metrics as logged

from fairseq_ext.translation.score import metrics

# Hypotheses end here at the latest, in pieces: 2 · source + 10. Models repeat themselves early in
# training, and fairseq's 200 would make the first validations the dearest.
LENGTH = (2.0, 10)
_KEYS = metrics.BLEU_KEYS + metrics.CHRF_KEYS


class TextValidation:
    """Translates the first `sentences` of a validation subset (0: all) with a beam of `beam`."""

    def __init__(self, task, beam: int, sentences: int):
        self.task, self.beam = task, beam
        self.limit = sentences or math.inf
        self._model = self._generator = None

    def statistics(self, sample: dict[str, Any], model) -> dict[str, float]:
        """Of one batch, to be summed; zeros where nothing of it is translated."""
        hypotheses: list[str] = []
        references: list[str] = []
        # chosen by id, so that neither batching nor the number of processes changes the score
        rows = [row for row, number in enumerate(sample["id"].tolist()) if number < self.limit]
        if rows:
            dictionary = self.task.target_dictionary
            chosen = torch.tensor(rows, device=sample["target"].device)
            net_input = {k: sample["net_input"][k][chosen] for k in ("src_tokens", "src_lengths")}
            # no column of padding alone: fairseq's LSTM refuses it
            filled = net_input["src_tokens"].ne(self.task.source_dictionary.pad()).any(0)
            net_input["src_tokens"] = net_input["src_tokens"][:, filled]
            generator = self._generator_of(model)
            found = self.task.inference_step(generator, [model], {"net_input": net_input})
            hypotheses = [dictionary.text(best[0]["tokens"].tolist()) for best in found]
            targets = sample["target"][chosen].tolist()
            references = [dictionary.codec.decode(ids) for ids in targets]
        return metrics.statistics(hypotheses, references, self.task.target_dictionary.lang)

    def _generator_of(self, model):
        while hasattr(model, "module"):
            model = model.module
        if self._model is not model:
            a, b = LENGTH
            options = Namespace(beam=self.beam, max_len_a=a, max_len_b=b)
            self._model, self._generator = model, self.task.build_generator([model], options)
        return self._generator


def log_scores(logging_outputs: list[dict[str, Any]], lang: str) -> None:
    """Log `bleu` and `chrf` of summed statistics; nothing where there are none, as in training."""
    if not any(_KEYS[0] in output for output in logging_outputs):
        return
    for key in _KEYS:
        logged.log_scalar_sum(key, sum(float(output.get(key, 0)) for output in logging_outputs))
    logged.log_derived("bleu", lambda meters: round(metrics.bleu(_sums(meters), lang), 2))
    logged.log_derived("chrf", lambda meters: round(metrics.chrf(_sums(meters)), 2))


def _sums(meters) -> dict[str, float]:
    return {key: float(meters[key].sum) for key in _KEYS}
