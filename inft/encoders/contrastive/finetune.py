"""Contrastive fine-tuning of a text encoder: what a run of this task is made of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from craft.distributed import sum_over_ranks
from craft.hooks import unwrap
from inft.encoders.build import load_tokenizer
from inft.encoders.contrastive.batches import ContrastiveBatch, ContrastiveBatches
from inft.encoders.contrastive.encode import Dropout, TextEncoder
from inft.encoders.contrastive.export import EmbeddingSettings, add_sentence_transformers_files
from inft.encoders.contrastive.heldout import HeldOut
from inft.encoders.contrastive.load import build_encoder
from inft.encoders.contrastive.objective import contrasted_rows, contrastive_loss
from inft.encoders.contrastive.sources import PairSources, check_places, locate_sources, open_sources
from inft.encoders.guards import rows_are_contrasted, tokens_are_known, weights_get_gradients
from inft.encoders.loop import Loss
from inft.encoders.run import EncoderResult, Parts, run_encoder
from inft.training.guards import GuardResult
from inft.training.processes import on_main, process_count, rank
from params.encoder import EncoderParams
from params.errors import UserError

PLACE = "pairs.json"  # of a checkpoint: the number of the next batch


def finetune(params: EncoderParams, *, overwrite: bool = False, console: Console | None = None) -> EncoderResult:
    """Train what the parameters say, and store a model that loads in sentence-transformers, too.

    Under torchrun each process calls it. Errors: UserError for everything that the user can mend.
    """
    return run_encoder(params, build, overwrite=overwrite, console=console)


def build(params: EncoderParams, console: Console) -> Parts:
    """Tokenizer, data and model of a contrastive run."""
    tokenizer = load_tokenizer(params)
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer.name {params.tokenizer.name} has no padding token: choose another.")
    check_places(params)
    model = build_encoder(params, tokenizer)  # before the rows are tokenised, which can take hours
    located = on_main(lambda: locate_sources(params, tokenizer, console))
    data = open_sources(params, tokenizer, located)
    task = PairsTask(params, data, model, tokenizer)
    for line in (data.describe(), *task.batches.notices):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return Parts(tokenizer=tokenizer, model=model, task=task)


@dataclass(frozen=True, kw_only=True)
class PairPosition:
    """Where a run stands in its pairs: batches are a function of their number."""

    batch: int

    def save(self, directory: Path) -> None:
        """Write it into an existing directory."""
        (directory / PLACE).write_text(json.dumps({"batch": self.batch}), encoding="utf-8")


class PairsTask:
    """The task: a query is more similar to its positive than to every other text of the batch."""

    def __init__(
        self, params: EncoderParams, data: PairSources, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.params = params
        self.data = data
        self.tokenizer = tokenizer
        smallest = min(data.train, key=lambda source: source.rows)
        if smallest.rows < process_count():
            raise UserError(
                f"source {smallest.name} has {smallest.rows} rows for {process_count()} processes: add rows, or leave "
                "it out."
            )
        self.dropout = Dropout(model)
        if params.contrastive.simcse_share and not self.dropout.layers:
            raise UserError(
                "contrastive.simcse_share needs dropout, and the model has no dropout layer: set it to 0, or choose "
                "another model."
            )
        self.batches = ContrastiveBatches(data.train, params, rank=rank(), world_size=process_count())
        self.heldout = HeldOut(data.heldout, params, rank=rank(), world_size=process_count()) if data.heldout else None

    @property
    def epoch(self) -> float:
        """Passes over all rows so far, on average."""
        return self.batches.epoch

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: rows are counted when they are tokenised."""
        return {}

    @property
    def bad_rows(self) -> Sequence[str]:
        """None: a bad row ends preprocessing."""
        return ()

    @property
    def description(self) -> Mapping[str, Any]:
        """The sources in plain values."""
        return self.data.description

    def next_batch(self) -> ContrastiveBatch:
        """The next micro-batch of this process."""
        return next(iter(self.batches))

    def position(self) -> PairPosition:
        """Where the run stands."""
        return PairPosition(batch=self.batches.at)

    def go_on(self, directory: Path) -> None:
        """Go on from a position that was saved."""
        self.batches.at = json.loads((directory / PLACE).read_text(encoding="utf-8"))["batch"]

    def loss(self, model: nn.Module, batch: ContrastiveBatch) -> Loss:
        """The summed loss of the rows, and how many positives are more similar than every negative."""
        self.dropout.use(self.params.contrastive.simcse_dropout if batch.simcse else None)
        found = contrastive_loss(self._encoder(model), batch, self.params.contrastive)
        return Loss(sum=found.losses_B.sum(), counts={"in_batch_accuracy": found.correct_B.sum()})

    def guards(self, model: nn.Module, batch: ContrastiveBatch) -> Iterator[GuardResult]:
        """The tokenizer knows the texts, rows are contrasted, weights get gradients; a failure ends the checks.

        The first two are about all processes together: what one of them ends on, all end on.
        """
        device = next(model.parameters()).device
        unknown = self.tokenizer.unk_token_id
        contrasted = int(contrasted_rows(batch, self.params.contrastive, device).sum())
        counts = [*self._words(batch), contrasted, len(batch)]
        unknowns, words, everywhere, rows = sum_over_ranks(torch.tensor(counts, device=device)).tolist()
        known = tokens_are_known(None if unknown is None else unknowns, words)
        yield known
        if not known.ok:
            return
        yield rows_are_contrasted(everywhere, rows)
        if not everywhere:
            return
        found = weights_get_gradients(model, batch, self.loss)
        if contrasted:  # a process whose rows have no negative has no gradient of its own
            yield found

    def _words(self, batch: ContrastiveBatch) -> tuple[int, int]:
        """How many tokens of the texts are unknown, and how many there are beside those that every text has."""
        tokens_T = np.concatenate([*batch.queries, *batch.positives, *batch.negatives])
        unknown_T = tokens_T == self.tokenizer.unk_token_id  # nowhere without such a token
        added_T = np.isin(tokens_T, self.tokenizer.all_special_ids)
        return int(unknown_T.sum()), int((unknown_T | ~added_T).sum())

    def add_files(self, model: PreTrainedModel, directory: Path) -> None:
        """Put beside a stored model what sentence-transformers needs."""
        add_sentence_transformers_files(directory, model, self.tokenizer, EmbeddingSettings.of(self.params))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Loss and retrieval of the held-out rows; None without any."""
        if self.heldout is None:
            return None
        # Plain: processes make different numbers of passes, in which DistributedDataParallel would wait for the others.
        return self.heldout.figures(self._encoder(unwrap(model)))

    def _encoder(self, model: nn.Module) -> TextEncoder:
        return TextEncoder(
            model=model, pooling=self.params.contrastive.pooling, pad_token_id=self.tokenizer.pad_token_id
        )
