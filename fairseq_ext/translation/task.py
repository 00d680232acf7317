"""`--task translation_spm`: fairseq's translation on a folder made by `translation.prepare`."""

import itertools
import logging
import math
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary, data_utils
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, FairseqEncoderDecoderModel
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationTask

from ext_common.checkpoints import refuse_foreign
from ext_common.cli import UserError
from ext_common.epochs import OwnBatches, Wanted
from fairseq_ext.translation.batching import batches, fitting, too_long
from fairseq_ext.translation.config import TranslationSpmConfig, check_options
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.decode.checkpoint import codecs_of
from fairseq_ext.translation.presets import PRESETS
from fairseq_ext.translation.sampling import SampledPairs, SubwordSampler
from fairseq_ext.translation.score import metrics
from fairseq_ext.translation.text.normalise import read_lines
from fairseq_ext.translation.text.sentences import share_of_several
from fairseq_ext.translation.text.spm import Codec
from fairseq_ext.translation.text.vocabulary import (
    SpmBpe,
    SpmDictionary,
    direction,
    refuse_other_direction,
    to_state,
)
from fairseq_ext.translation.validation import TextValidation, log_scores

logger = logging.getLogger(__name__)

# Of a training text, to see whether lines hold several sentences.
SEEN_LINES = 20_000
OWN = ("fairseq.", "fairseq_ext.translation")


@register_task("translation_spm", dataclass=TranslationSpmConfig)
class TranslationSpmTask(OwnBatches, TranslationTask):
    """Nothing is dropped, and text is what the SentencePiece model says it is.

    The models, and with them the dictionaries, travel in the checkpoint (`task_state`); DATA is opened only
    for its sentences, and refused where its models are others.
    """

    presets = PRESETS
    progress_unit = "tokens"

    def __init__(self, cfg: TranslationSpmConfig, from_checkpoint: bool = False):
        super().__init__(cfg, None, None)
        check_options(cfg)
        self._codecs: Optional[Dict[str, Codec]] = None
        self._convention = "standard"
        self._direction_given = bool(cfg.source_lang or cfg.target_lang)
        self._no_data: Optional[UserError] = None
        self._positions: List[Any] = []
        self._validation = TextValidation(self, cfg.valid_beam, cfg.valid_sentences)
        self._said: set = set()
        self._lines: Optional[Dict[str, float]] = None
        if not from_checkpoint:
            try:
                self._use_corpus(open_corpora(cfg.data)[0])
            except UserError as error:
                # a folder that is gone is no mistake where a checkpoint brings all that is needed
                self._no_data = error

    @classmethod
    def setup_task(cls, cfg: TranslationSpmConfig, **kwargs):
        return cls(cfg, kwargs.get("from_checkpoint", False))

    # --- vocabulary ---------------------------------------------------------------------------

    @property
    def source_dictionary(self) -> SpmDictionary:
        return self._need_vocabulary().src_dict

    @property
    def target_dictionary(self) -> SpmDictionary:
        return self._need_vocabulary().tgt_dict

    def _need_vocabulary(self):
        if self.src_dict is None:
            raise self._no_data or UserError(
                "the checkpoint was not made by --task translation_spm"
            )
        return self

    def _use_corpus(self, corpus: Corpus) -> None:
        self._convention = corpus.convention
        source, target = self._direction(tuple(corpus.languages))
        codecs = {lang: corpus.codec(lang) for lang in corpus.languages}
        self._use_codecs(codecs, source, target)

    def _direction(self, languages: Tuple[str, str]) -> Tuple[str, str]:
        return direction(self.cfg.source_lang, self.cfg.target_lang, languages)

    def _use_codecs(self, codecs: Dict[str, Codec], source: str, target: str) -> None:
        self._codecs = codecs
        self.cfg.source_lang, self.cfg.target_lang = source, target
        self.src_dict = SpmDictionary(codecs[source], source, always_text=True)
        self.tgt_dict = SpmDictionary(codecs[target], target)
        logger.info(
            f"{source} → {target}, {len(self.src_dict):,} and {len(self.tgt_dict):,} pieces, "
            f"normalisation {self._convention}, BLEU with the tokenizer {metrics.tokenizer_for(target)}"
        )

    def state_dict(self) -> Dict[str, Any]:
        return {
            "translation": to_state(
                self._need_vocabulary()._codecs,
                source_lang=self.cfg.source_lang,
                target_lang=self.cfg.target_lang,
                normalise=self._convention,
                extra_symbols=list(self.src_dict.codec.extra_symbols),
                **({"lines": self._lines} if self._lines else {}),
            )
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take models and direction from a checkpoint; UserError where DATA or flags contradict it."""
        state = state_dict.get("translation")
        if state is None:
            if self.src_dict is None:
                raise self._no_data or UserError(
                    "the checkpoint was not trained with --task translation_spm: its vocabulary is not in it"
                )
            logger.warning("the checkpoint names no SentencePiece models: those of DATA are taken")
            return
        self._lines = state.get("lines")
        saved = state["source_lang"], state["target_lang"]
        wanted = self._direction(saved)
        if self.src_dict is None:
            self._convention = state["normalise"]
            refuse_other_direction(wanted, saved)
            self._use_codecs(codecs_of(state), *saved)
            return
        self.check_models(state)
        if wanted != saved and not self._direction_given:
            # DATA's own direction was only a guess; others hold these two dictionaries by now
            source, target = self._codecs[saved[0]], self._codecs[saved[1]]
            self.src_dict.become(SpmDictionary(source, saved[0], always_text=True))
            self.tgt_dict.become(SpmDictionary(target, saved[1]))
            self.cfg.source_lang, self.cfg.target_lang = wanted = saved
        refuse_other_direction(wanted, saved)
        self._convention = state["normalise"]

    def check_models(self, state: Dict[str, Any]) -> None:
        """UserError where a checkpoint was trained with other SentencePiece models than this task has."""
        theirs = {lang: codec.sha256 for lang, codec in codecs_of(state).items()}
        ours = {lang: codec.sha256 for lang, codec in self._codecs.items()}
        if theirs != ours:
            raise UserError(
                f"{self.cfg.data} has other SentencePiece models than the checkpoint, so that every"
                " piece would mean another one: use the folder it was trained on, or prepare the data with"
                " its models"
            )

    def check_resume(self, state: Dict[str, Any], same_run: bool) -> None:
        """UserError before a training continues from the checkpoint of another vocabulary.

        same_run: also refuse the other direction (a fine-tuning may change it).
        """
        saved = (state.get("task_state") or {}).get("translation")
        if saved is None:
            return
        self.check_models(saved)
        if same_run:
            given = self.cfg.source_lang, self.cfg.target_lang
            refuse_other_direction(given, (saved["source_lang"], saved["target_lang"]))

    # --- data -----------------------------------------------------------------------------------

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        self._need_vocabulary()
        corpora = open_corpora(self.cfg.data)
        for corpus in corpora:
            self.check_corpus(corpus)
        try:
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.cfg.data} has no split {split!r}: it has {', '.join(corpora[0].splits)}"
            ) from error
        if split == self.cfg.train_subset:
            refuse_synthetic_targets(corpora, self.cfg.source_lang)
        # fairseq-generate and -validate hand over the checkpoint's options: they want the text as it is
        training = split == self.cfg.train_subset and "task_cfg" not in kwargs
        if training:
            self._lines = self._what_lines_are(corpora[0], self.datasets[split])
        if training and self.cfg.subword_sampling:
            self.datasets[split] = self._sampled(self.datasets[split])

    def _what_lines_are(self, corpus: Corpus, dataset) -> Optional[Dict[str, float]]:
        """What `decode` needs to know to split paragraphs; None where the text is not there."""
        text = corpus.text(self.cfg.train_subset, self.cfg.source_lang)
        if not text.is_file():
            return self._lines
        several = share_of_several(itertools.islice(read_lines(text), SEEN_LINES))
        return {"longest": int(np.percentile(dataset.src_sizes, 99)), "several": round(several, 4)}

    def _sampled(self, dataset) -> SampledPairs:
        sides = str(self.cfg.subword_sampling_sides)
        dictionaries = {"source": self.src_dict, "target": self.tgt_dict}
        limits = dict(zip(dictionaries, self._limits(), strict=True))
        samplers = {
            side: SubwordSampler(dictionary.codec, self.cfg.subword_sampling)
            for side, dictionary in dictionaries.items()
            if sides in (side, "both")
        }
        sampled = SampledPairs(dataset, samplers, limits, self.cfg.seed)
        logger.info(
            f"subword sampling of {sides}: sentences are batched as if {sampled.growth:.2f} times as long"
        )
        return sampled

    def _limits(self) -> Tuple[int, int]:
        """The longest source and target, in pieces, that task and models have positions for."""
        return utils.resolve_max_positions(self.max_positions(), *self._positions)

    def check_corpus(self, corpus: Corpus) -> None:
        """UserError where a folder was prepared with other models than this task's."""
        for lang, codec in self._codecs.items():
            if lang not in corpus.languages or corpus.codec(lang).sha256 != codec.sha256:
                raise UserError(
                    f"{corpus.path} has not the SentencePiece model for {lang} that this model was trained"
                    " with: prepare it with the models of the first folder"
                )
            # the ids were made with the file, and `--task translation` may have been told to make another
            pieces = Dictionary.load(str(corpus.dictionary_path(lang))).symbols[: codec.size]
            if pieces != codec.pieces(range(codec.size)):
                raise UserError(
                    f"{corpus.dictionary_path(lang)} does not list the pieces of the SentencePiece model:"
                    " prepare the data again"
                )

    passed_on = ("skip_remainder_batch", "grouped_shuffling")

    def batches_of(self, dataset, wanted: Wanted):
        """Sentences in the order of their lengths, none left out for being longer than --max-tokens."""
        dataset.set_epoch(wanted.epoch)
        with data_utils.numpy_seed(wanted.seed + wanted.epoch):
            indices = dataset.ordered_indices()
        if isinstance(dataset, SampledPairs):
            dataset.budget = wanted.max_tokens
        # the trainer's limit is the smaller of positions and --max-tokens
        limits = self._limits() if self._positions else wanted.max_positions
        indices, about = fitting(dataset, indices, limits)
        if about and not wanted.ignore_invalid_inputs:
            raise too_long(about)
        if about and about not in self._said:
            self._said.add(about)
            logger.warning(f"{about}: left out, the model cannot hold them")
        # a network is compiled for a shape
        multiple = self.cfg.required_seq_len_multiple if self.cfg.compile else 1
        return batches(dataset, indices, wanted.max_tokens, wanted.max_sentences, multiple)

    # --- text -----------------------------------------------------------------------------------

    @property
    def bpe(self) -> SpmBpe:
        return SpmBpe(self.source_dictionary, self.target_dictionary, self._convention)

    def build_bpe(self, args) -> SpmBpe:
        return self.bpe

    def build_tokenizer(self, args) -> None:
        return None

    def get_interactive_tokens_and_lengths(self, lines, encode_fn):
        eos = self.source_dictionary.eos()
        tokens = [torch.LongTensor([*self.bpe.encode_ids(line), eos]) for line in lines]
        return tokens, [len(line) for line in tokens]

    def build_generator(self, models, args, *more, **kwargs):
        generator = super().build_generator(models, args, *more, **kwargs)
        if getattr(generator, "unk_penalty", None) == 0:
            # bytes spell what is no piece, so <unk> is never right
            generator.unk_penalty = math.inf
        return generator

    # --- model and validation -------------------------------------------------------------------

    def build_criterion(self, cfg, from_checkpoint=False):
        refuse_foreign(cfg, CRITERION_REGISTRY, "--criterion", OWN, "label_smoothed_cross_entropy")
        return super().build_criterion(cfg, from_checkpoint)

    def build_model(self, cfg, from_checkpoint=False):
        known = ARCH_MODEL_REGISTRY | MODEL_REGISTRY
        refuse_foreign(cfg, known, "--arch", OWN, "transformer", FairseqEncoderDecoderModel)
        self._need_vocabulary()
        try:
            model = super().build_model(cfg, from_checkpoint)
        except ValueError as error:
            if "joined dictionary" not in str(error):
                raise
            raise UserError(
                f"{error}: {self.cfg.data} has one SentencePiece model for each language; leave the flag"
                " out, or prepare the data with a joint one"
            ) from error
        self._positions.append(model.max_positions())
        return model

    @property
    def best_metric(self) -> Optional[Tuple[str, bool]]:
        """(name, larger is better) of what selects checkpoints; None for fairseq's loss."""
        name = str(self.cfg.select_by)
        return None if name == "loss" or self.cfg.no_valid_text else (name, True)

    def early_check(self, updates: float) -> float:
        """How often a validation after so many updates fits into one of now.

        What is not trained goes on to the longest output, about 2.5 times that of a trained model.
        """
        return 1.0 if self.cfg.no_valid_text else 1 + 1.5 * min(1.0, updates / 1500)

    def next_command(self, save_dir: str, checkpoint: str) -> str:
        """What a user does with a trained model."""
        source, target = self.cfg.source_lang, self.cfg.target_lang
        return translate_command(self.cfg.data, source, target, checkpoint)

    def valid_step(self, sample, model, criterion):
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        if not self.cfg.no_valid_text and sample.get("target") is not None:
            logging_output.update(self._validation.statistics(sample, model))
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs, criterion) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        log_scores(logging_outputs, self.cfg.target_lang)


def translate_command(data: Optional[str], source: str, target: str, checkpoint: str) -> str:
    """The command line that translates the test of the (first) prepared folder."""
    folder = Path(utils.split_paths(data)[0])
    words = ["python", "-m", "fairseq_ext.translation.translate"]
    places = [str(folder / "text" / f"test.{source}"), f"test.{target}"]
    return shlex.join([*words, *places, "--path", checkpoint])


def open_corpora(data: Optional[str]) -> List[Corpus]:
    """The prepared folders that --data names, separated by colons; UserError where one is none."""
    if not data:
        raise UserError(
            "give the folder that fairseq_ext.translation.prepare wrote as the first argument"
        )
    return [Corpus.open(path) for path in utils.split_paths(data)]


def refuse_synthetic_targets(corpora: List[Corpus], source: str) -> None:
    """UserError where a mixture of back-translation would be trained towards its synthetic side."""
    for corpus in corpora:
        if corpus.one_way and source != corpus.languages[0]:
            raise UserError(
                f"{corpus.path} has synthetic {corpus.languages[0]}, which is to be translated from, not"
                f" to: give -s {corpus.languages[0]} -t {corpus.languages[1]}"
            )
