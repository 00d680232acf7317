"""fairseq's models and its SequenceGenerator, without the work whose result nobody reads."""

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import Search
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator

from ext_common.cli import UserError
from ext_common.random import uniforms
from ext_common.threads import limited
from fairseq_ext.translation.decode.draws import draw
from fairseq_ext.translation.decode.options import Candidate, DecodeOptions, SampleOptions
from fairseq_ext.translation.text.spm import EOS, PAD

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class FairseqBackend:
    """Decodes ids with one fairseq model, or with several that vote (an ensemble).

    models: encoder-decoder models of one vocabulary. compute_type: float32, float16 or bfloat16.
    threads: of torch on the CPU, while this decodes and no longer; None: as many as there are.
    """

    name = "fairseq"
    workers = 1

    def __init__(
        self,
        models: Sequence[Any],
        device: str = "cpu",
        compute_type: str | None = None,
        threads=None,
    ):
        compute_type = compute_type or "float32"
        if compute_type not in _TYPES:
            raise UserError(
                f"the backend fairseq has no compute type {compute_type!r}: it has"
                f" {', '.join(_TYPES)} (int8 is one of the backend ctranslate2)"
            )
        self.threads = threads
        self.device = torch.device(device)
        self.models = [m.to(self.device, _TYPES[compute_type]).eval() for m in models]
        for model in self.models:
            model.make_generation_fast_(beamable_mm_beam_size=None, need_attn=False)
        self.size = len(self.models[0].decoder.dictionary)
        self.max_tokens = 1024 if self.device.type == "cpu" else 4096
        self.max_source = min(_positions(m.encoder) for m in self.models)
        self.max_target = min(_positions(m.decoder) for m in self.models)
        self._generators: dict[Any, SequenceGenerator] = {}

    def decode(
        self, batch: Sequence[Sequence[int]], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """For each source (ids, `</s>` at its end) the `nbest` best targets, best first.

        limit: the largest number of ids in a target, `</s>` not counted.
        """
        generator = self._generator(options, limit)
        found = self._generate(generator, batch)
        return [[_candidate(hypo, limit) for hypo in hypos[: options.nbest]] for hypos in found]

    def sample(
        self,
        batch: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: SampleOptions,
        limit: int,
    ) -> list[Candidate]:
        """For each source (ids, `</s>` at its end) a target, drawn with its own seed."""
        generator = self._generator(options, limit)
        # one more for </s>
        generator.search.u = torch.from_numpy(uniforms(seeds, limit + 1, options.stream)).to(
            self.device
        )
        return [_candidate(hypos[0], limit) for hypos in self._generate(generator, batch)]

    def _generate(self, generator: SequenceGenerator, batch) -> list[list[dict[str, Any]]]:
        lengths = torch.tensor([len(ids) for ids in batch])
        tokens = torch.full((len(batch), int(lengths.max())), PAD)
        # padded left, as in training
        for row, ids in enumerate(batch):
            tokens[row, tokens.size(1) - len(ids) :] = torch.tensor(ids)
        net_input = {"src_tokens": tokens.to(self.device), "src_lengths": lengths.to(self.device)}
        for model in self.models:
            set_beam(model, generator.beam_size)
        with limited(self.threads), torch.inference_mode():
            return generator.generate(self.models, {"net_input": net_input})

    def _generator(self, options: DecodeOptions, limit: int) -> SequenceGenerator:
        drawn = (
            (options.topk, options.topp, options.temperature)
            if isinstance(options, SampleOptions)
            else None
        )
        beam, lenpen = (1, 1.0) if drawn else (options.beam, options.lenpen)
        key = (beam, lenpen, options.min_len, options.unkpen, options.no_repeat_ngram, drawn)
        if key not in self._generators:
            dictionary = self.models[0].decoder.dictionary
            self._generators[key] = SequenceGenerator(
                LeanEnsemble(self.models),
                dictionary,
                beam_size=beam,
                max_len_a=0,
                min_len=options.min_len,
                len_penalty=lenpen,
                unk_penalty=options.unkpen,
                search_strategy=Drawn(dictionary, *drawn) if drawn else None,
            )
            if options.no_repeat_ngram:
                self._generators[key].repeat_ngram_blocker = NoRepeat(options.no_repeat_ngram)
        generator = self._generators[key]
        generator.max_len_b = limit
        return generator


class Drawn(Search):
    """In place of fairseq's Sampling, which draws for all rows of a batch from one generator.

    `u` (B, steps): numbers in [0, 1) for each source of the batch, set before it is decoded.
    """

    def __init__(self, dictionary, topk: int, topp: float, temperature: float):
        super().__init__(dictionary)
        self.how = (topk, topp, temperature)
        self.u = torch.zeros(0, 0)

    @torch.jit.unused
    def step(self, step: int, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """lprobs (B, 1, V) of the sources `original_batch_idxs`, those that have not ended."""
        ids, found = draw(lprobs[:, 0], self.u[original_batch_idxs, step], *self.how)
        total = found if step == 0 else found + scores[:, 0, step - 1]
        return total.unsqueeze(1), ids.unsqueeze(1), torch.zeros_like(ids).unsqueeze(1)


class NoRepeat(NGramRepeatBlock):
    """fairseq's, which without CUDA compares with the padding behind a hypothesis and blocks nothing."""

    def __init__(self, size: int):
        super().__init__(size, use_extension=False)

    def forward(self, tokens, lprobs, bsz: int, beam_size: int, step: int):
        return super().forward(tokens[:, : step + 1], lprobs, bsz, beam_size, step)


class LeanEnsemble(EnsembleModel):
    """fairseq's ensemble without attention weights, and for Transformers without copies of the source.

    A Transformer's decoder keeps keys and values of the source from its first step on; that the
    generator permutes the encoder's output before every further step changes nothing.
    """

    def __init__(self, models: Sequence[Any]):
        super().__init__(list(models))
        # nothing is known of what subclasses do with the source, unless they say it
        self._keeps_source = all(
            type(m.decoder) in (TransformerDecoder, TransformerDecoderBase)
            or getattr(m.decoder, "keeps_source", False)
            for m in models
        )

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature: float = 1.0):
        probs, _ = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
        return probs, None

    def reorder_encoder_out(self, encoder_outs, new_order):
        if self._keeps_source and encoder_outs and encoder_outs[0].get("expanded"):
            return encoder_outs
        reordered = super().reorder_encoder_out(encoder_outs, new_order)
        if self._keeps_source:
            for out in reordered:
                out["expanded"] = True
        return reordered


def set_beam(model: Any, beam: int) -> None:
    """Let the hypotheses of one sentence share its keys and values, where a model can.

    fairseq does this for BART only, and never takes a beam back.
    """
    for module in model.decoder.modules():
        if getattr(module, "encoder_decoder_attention", False) and hasattr(module, "set_beam_size"):
            module.set_beam_size(beam)


def _positions(part: Any) -> int:
    return int(min(part.max_positions(), 10**6))


def _candidate(hypo: dict[str, Any], limit: int) -> Candidate:
    ids = hypo["tokens"].tolist()
    if ids and ids[-1] == EOS:
        ids.pop()
    return Candidate(ids, float(hypo["score"]), len(ids) >= limit)
