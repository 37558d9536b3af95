"""Captions of held-out rows while a model trains: which rows, what the model says of them, and how good that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import PeftModel

from inft.data.heldout import spread
from inft.data.references import grouped
from inft.evaluation.generate import generate_captions
from inft.evaluation.metrics import METRICS
from inft.models.collate import CaptionCollator
from inft.sample import Sample
from inft.training.processes import gather, on_main, process_count, rank
from params import TrainParams, UserError

CAPTIONS = "eval_captions"  # key of a Captioned in the metrics that an evaluation gives its callbacks
EXAMPLES = 3  # rows that are shown with every evaluation
SPOKEN = ("chrf", "bleu4", "cider", "exact")  # the figures of a line on the console


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row that was captioned."""

    language: str
    reference: str
    generated: str


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """What the captions of one evaluation came to."""

    figures: Mapping[str, float]  # name in METRICS -> value over all captioned rows
    rows: int
    examples: Sequence[Example]  # of as many languages as there are

    @property
    def line(self) -> str:
        """The figures in a line: "chrF 63.2 · BLEU-4 41.0 · CIDEr 120.5 · exact 35.0%"."""
        return " · ".join(f"{METRICS[name].title} {METRICS[name].shown(self.figures[name])}" for name in SPOKEN)


class HeldoutCaptions:
    """Generates captions of the same held-out rows at each evaluation, greedily, and scores them.

    Of several processes each captions its share of the rows, and all get the same figures. Weights, gradients, modes
    and random states of the model are afterwards as they were.
    """

    def __init__(
        self,
        samples: Sequence[Sample],  # those of one picture and prompt are references of one row
        collator: CaptionCollator,
        *,
        max_new_tokens: int,
        batch_size: int,  # rows that a process captions at the same time
        cjk_tokens: Sequence[str],  # languages whose words are segmented before they are scored
    ) -> None:
        rows = grouped(samples)
        self.samples = [row[0] for row in rows]
        self.references = [[sample.answer for sample in row] for row in rows]
        self.collator = collator
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.cjk_tokens = cjk_tokens

    def score(self, model: PeftModel) -> Captioned:
        """Caption the rows with ``model`` as it is now."""
        from inft.evaluation.metrics.scores import caption_figures

        captions = self._generated(model)
        languages = [sample.language for sample in self.samples]
        # Scored once: what chooses the best adapter must be the same in all processes to the bit.
        wanted, segmented = self.references, self.cjk_tokens
        figures = on_main(lambda: caption_figures(captions, wanted, languages, cjk_tokens=segmented))
        shown = [
            Example(language=languages[row], reference=self.references[row][0], generated=captions[row])
            for row in spread(languages, range(len(languages)), EXAMPLES)
        ]
        return Captioned(figures=figures, rows=len(captions), examples=shown)

    def _generated(self, model: PeftModel) -> list[str]:
        """A caption of each row, in order; the processes take the rows in turn."""
        mine = generate_captions(
            model,
            self.collator,
            self.samples[rank() :: process_count()],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        captions = [""] * len(self.samples)
        for number, share in enumerate(gather(mine)):
            captions[number :: process_count()] = share
        return captions


def rows_to_caption(params: TrainParams, heldout: Sequence[Sample]) -> list[Sample]:
    """The first ``sft.eval_captions`` held-out rows, as even over the languages as they allow; all when fewer.

    The captions of one picture are one row: all of them come with it.
    """
    rows = grouped([sample for sample in heldout if sample.answer.strip()])  # a prompt may have no caption (grpo, ppo)
    chosen = spread([row[0].language for row in rows], range(len(rows)), params.sft.eval_captions)
    return [sample for number in chosen for sample in rows[number]]


def heldout_captions(
    params: TrainParams, heldout: Sequence[Sample], collator: CaptionCollator
) -> HeldoutCaptions | None:
    """The captions that ``sft.eval_captions`` asks for; None when it asks for none."""
    if not params.sft.eval_captions:
        return None
    return HeldoutCaptions(
        rows_to_caption(params, heldout),
        collator,
        max_new_tokens=params.basic.gen_max_new_tokens,
        batch_size=params.sft.per_device_eval_batch_size,
        cjk_tokens=params.data.cjk_tokens,
    )


def check_captions(params: TrainParams, heldout: Sequence[Sample]) -> None:
    """UserError, before a model is loaded, when captions are asked for and could not be generated or scored."""
    if not params.sft.eval_captions:
        return
    rows = rows_to_caption(params, heldout)
    if not rows:
        raise UserError(
            f"sft.eval_captions={params.sft.eval_captions}: no row is held out to be captioned. Use data with a "
            "validation split, raise data.eval_fraction (--eval-fraction 0.05), or leave --eval-captions out."
        )
    if params.sft.best_metric == "cider" and len(grouped(rows)) == 1:
        raise UserError(
            "sft.best_metric=cider weighs words by how few of the captioned rows have them: of one row it is always "
            "0. Raise --eval-captions (and hold out more rows), or choose another --best-metric."
        )
    from inft.evaluation.metrics.scores import check_scoring

    references = [[sample.answer] for sample in rows]
    check_scoring(references, [sample.language for sample in rows], cjk_tokens=params.data.cjk_tokens)
