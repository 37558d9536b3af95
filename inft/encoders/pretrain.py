"""Pretraining of a text encoder by masked tokens: what a run of this task is made of, and its figures."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inft.encoders.build import architecture_notice, as_loaded, build_model, compile_in_place, load_tokenizer
from inft.encoders.data.batches import EvaluationBatches, FlatBatch, LoaderState, PretrainingBatches
from inft.encoders.data.documents import TextData, open_data
from inft.encoders.data.flat import rounded_up
from inft.encoders.data.preprocess import use_tokenised
from inft.encoders.data.tokenised import tokenizer_fingerprint
from inft.encoders.guards import masked_token_guards
from inft.encoders.loop import Loss
from inft.encoders.lowprecision.convert import check_low_precision, convert_linears, token_multiple
from inft.encoders.objective import masked_lm_loss, masked_token_losses
from inft.encoders.run import EncoderResult, Parts, run_encoder
from inft.training.guards import GuardResult
from inft.training.processes import gather, process_count, rank
from params.encoder import EncoderParams
from params.errors import UserError


def pretrain(
    params: EncoderParams, *, overwrite: bool = False, demo: bool = False, console: Console | None = None
) -> EncoderResult:
    """Train what the parameters say; with `demo` the demo's text is made first and its table printed at the end.

    Errors: UserError for everything that the user can mend.
    """
    console = console or Console()
    if demo:
        from inft.encoders.demo import demo_run

        return demo_run(params, run_encoder, build, overwrite=overwrite, console=console)
    return run_encoder(params, build, overwrite=overwrite, console=console)


def build(params: EncoderParams, console: Console) -> Parts:
    """Tokenizer, data and model of a pretraining run."""
    check_low_precision(params)
    tokenizer = load_tokenizer(params)
    model = build_model(params, tokenizer)
    if params.dataset.pre_tokenized_dir and not params.dataset.pre_tokenize:
        say = "dataset.pre_tokenized_dir is not read without dataset.pre_tokenize: true; dataset.path reads it."
        console.print(say, highlight=False, markup=False, soft_wrap=True)
    if notice := architecture_notice(params, model):
        console.print(notice, highlight=False, markup=False, soft_wrap=True)
    params = use_tokenised(as_loaded(params, model), tokenizer, console)
    data = open_data(params, tokenizer)
    console.print(data.describe(), highlight=False, markup=False, soft_wrap=True)
    converted = convert_linears(model, params)
    for line in (converted.describe(), *converted.notes) if converted.converted else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    compile_in_place(model.model.transformer_encoder, params, dynamic=False)  # one graph serves all blocks
    task = MaskedTokens(params, tokenizer, data)
    for notice in task.batches.notices:
        console.print(notice, highlight=False, markup=False, soft_wrap=True)
    return Parts(tokenizer=tokenizer, model=model, task=task)


class MaskedTokens:
    """The task: predict the masked tokens of packed documents."""

    def __init__(self, params: EncoderParams, tokenizer: PreTrainedTokenizerBase, data: TextData) -> None:
        self.params = params
        self.tokenizer = tokenizer
        self.data = data
        self.multiple = token_multiple(params)
        self.batches = self._batches(None)
        self.heldout = None if data.heldout is None else EvaluationBatches(data, tokenizer, params, **_process())

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.batches.epoch

    @property
    def counts(self) -> Mapping[str, int]:
        """Documents that were read, split, dropped, empty and unreadable."""
        return self.batches.counts.asdict()

    @property
    def bad_rows(self) -> Sequence[str]:
        """The first rows that could not be read."""
        return self.batches.bad_rows

    @property
    def description(self) -> Mapping[str, Any]:
        """The data and the vocabulary in plain values."""
        return {**self.data.description(), "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def next_batch(self) -> FlatBatch:
        """The next micro-batch of this process."""
        return self._fitting(next(self.batches))

    def position(self) -> LoaderState:
        """Where the run stands in its data."""
        return self.batches.state()

    def go_on(self, directory: Path) -> None:
        """Go on from a position that was saved."""
        self.batches = self._batches(LoaderState.load(directory))

    def loss(self, model: nn.Module, batch: FlatBatch) -> Loss:
        """The summed cross-entropy of the masked tokens, and how many of them are predicted."""
        trainer = self.params.trainer
        found = masked_lm_loss(
            model,
            batch,
            masked_only=trainer.masked_logits_only_loss,
            fused=trainer.fused_linear_cross_entropy,
        )
        return Loss(sum=found.loss_sum, counts={"accuracy": found.correct})

    def guards(self, model: nn.Module, batch: FlatBatch) -> Iterator[GuardResult]:
        """Tokens are masked, documents are apart, weights get gradients."""
        return masked_token_guards(model, batch, self.loss, self.params, self.tokenizer.unk_token_id)

    def add_files(self, model: PreTrainedModel, directory: Path) -> None:
        """Nothing."""

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Loss, masked accuracy and perplexity of the held-out documents, and both by language; masks never change."""
        if self.heldout is None:
            return None
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # loss, correct, masked tokens
        device = next(model.parameters()).device
        for batch in map(self._fitting, self.heldout):
            losses_M, correct_M = masked_token_losses(model, batch.to(device))
            for language, (loss, correct, count) in _by_language(batch, losses_M, correct_M).items():
                sums[language] = [a + b for a, b in zip(sums[language], (loss, correct, count), strict=True)]
        figures = _figures(gather(dict(sums)))
        if not figures["tokens"]:
            raise UserError(f"{self.data.location}: the evaluation has no token to predict. Give it longer documents.")
        return figures

    def _batches(self, state: LoaderState | None) -> PretrainingBatches:
        return PretrainingBatches(self.data, self.tokenizer, self.params, state=state, **_process())

    def _fitting(self, batch: FlatBatch) -> FlatBatch:
        """The batch with as many tokens as the kernels of low precision take."""
        return rounded_up(batch, self.multiple, self.tokenizer.pad_token_id or 0)


def _process() -> dict[str, Any]:
    """What the batches of this process depend on."""
    return {
        "rank": rank(),
        "world_size": process_count(),
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _by_language(batch: FlatBatch, losses_M: Tensor, correct_M: Tensor) -> dict[str, tuple[float, float, int]]:
    """(summed loss, correct, masked tokens) of each language; "" where documents name none."""
    masked_M = (batch.labels_T.cpu() != -100).nonzero().squeeze(1)
    document_M = torch.searchsorted(batch.cu_seqlens.cpu()[1:], masked_M, right=True)
    names = sorted({language or "" for language in batch.languages})
    codes_N = torch.tensor([names.index(language or "") for language in batch.languages])
    code_M = codes_N[document_M]
    losses_M, correct_M = losses_M.double().cpu(), correct_M.cpu()
    return {
        name: (float(losses_M[code_M == code].sum()), int(correct_M[code_M == code].sum()), int((code_M == code).sum()))
        for code, name in enumerate(names)
    }


def _figures(gathered: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The means over all processes' documents."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for sums in gathered:
        for language, values in sums.items():
            total[language] = [a + b for a, b in zip(total[language], values, strict=True)]
    loss, correct, count = (sum(values[i] for values in total.values()) for i in range(3))
    named = {language: values for language, values in sorted(total.items()) if language and values[2]}
    mean = loss / max(count, 1)
    return {
        "loss": mean,
        "accuracy": correct / max(count, 1),
        "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()),
        "tokens": int(count),
        "languages": {language: values[0] / values[2] for language, values in named.items()},
        "accuracies": {language: values[1] / values[2] for language, values in named.items()},
    }
