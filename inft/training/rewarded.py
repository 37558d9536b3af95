"""RewardedTrainer: what GRPO and PPO share: prompts of the rows, rewards of answers, and the held-out reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inft.data.references import grouped
from inft.evaluation.generate import decode_captions, generate_tokens
from inft.models.collate import CaptionCollator
from inft.rewards.load import Reward
from inft.rewards.score import refuse_unrewarded, score, score_all, weighted_sum
from inft.sample import Sample
from inft.training.callbacks import BestCallback
from inft.training.prepare import STAND_IN
from inft.training.processes import gather, on_main, process_count, rank
from inft.training.rows import RowCollator
from inft.training.runtrainer import RunTrainer
from params import UserError

Figures = Mapping[str, float]


class HeldoutRewards:
    """Answers held-out prompts greedily and rewards the answers; a prompt with several references is answered once.

    Of several processes each answers its share of the prompts, and all get the same figures. Weights, modes and random
    states of the model are afterwards as they were.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        collator: CaptionCollator,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        *,
        max_new_tokens: int,
        batch_size: int,  # prompts that a process answers at the same time
    ) -> None:
        self.groups = grouped(samples)
        self.collator = collator
        self.rewards = rewards
        self.weights = weights
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def score(self, model: Any) -> Figures:
        """The mean reward, of each function besides (``rewards/chrf``), and of each language (``reward_si``)."""
        answers = self._answers(model)
        samples = [sample for group in self.groups for sample in group]
        tokens = [ids for group, ids in zip(self.groups, answers, strict=True) for _ in group]
        return on_main(lambda: self._figures(samples, tokens))  # a user's function need not say the same twice

    def _figures(self, samples: Sequence[Sample], tokens: Sequence[list[int]]) -> Figures:
        texts = decode_captions(self.collator, tokens)
        found = score_all(self.rewards, samples=samples, completions=texts, completion_ids=tokens)
        by_language: dict[str, list[float]] = {}
        for sample, total in zip(samples, weighted_sum(found, self.weights), strict=True):
            by_language.setdefault(sample.language, []).append(total)
        given = {name: [value for value in values if value is not None] for name, values in found.items()}
        return {
            "reward": sum(map(sum, by_language.values())) / len(samples),
            **{f"rewards/{name}": sum(values) / len(values) for name, values in given.items() if values},
            **{f"reward_{code}": sum(part) / len(part) for code, part in sorted(by_language.items())},
        }

    def _answers(self, model: Any) -> list[list[int]]:
        """The tokens of an answer to each prompt, in order; the processes take the prompts in turn."""
        mine = [group[0] for group in self.groups[rank() :: process_count()]]
        found = generate_tokens(
            model, self.collator, mine, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        answers: list[list[int]] = [[]] * len(self.groups)
        for number, share in enumerate(gather(found)):
            answers[number :: process_count()] = share
        return answers


class RewardedTrainer(RunTrainer):
    """Stands before a trainer of rewards, whose data set has the rows' numbers and prompts."""

    judged = "reward"

    def __init__(
        self, *, model: PeftModel, rows: RowCollator, heldout_rewards: HeldoutRewards | None, **run: Any
    ) -> None:
        end_answers_as_taught(model, rows.collator)
        self.heldout_rewards = heldout_rewards
        numbers = range(len(rows.rows))
        train, heldout = numbers[: rows.first_heldout], numbers[rows.first_heldout :]
        super().__init__(
            model=model,
            rows=rows,
            train_dataset=prompts_of(rows, train),
            eval_dataset=prompts_of(rows, heldout) if heldout else None,
            **run,
        )
        passes = getattr(self.args, "num_ppo_epochs", None) or self.args.num_iterations
        self.add_callback(SavesBetweenBatches(passes, self.best))  # after those that ask for a checkpoint

    def samples(self, numbers: Tensor | Sequence[int]) -> list[Sample]:
        """The rows of some numbers."""
        return [self.rows.rows[int(number)] for number in numbers]

    def _craft_sample_ids(self, rows: Sequence[Mapping[str, Any]], *, with_images: bool = False) -> list[int]:
        """The id of each training row: rows of one picture have the same."""
        assert self.rows.ids is not None
        return [self.rows.ids[row["row"]] for row in rows]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; what is wrong with a user's reward function is told as it was found."""
        try:
            return super().training_step(*args, **kwargs)
        except ValueError as error:
            if isinstance(error.__cause__, UserError):  # craft wraps what a function raises
                raise error.__cause__ from error.__cause__.__cause__
            raise

    def score_heldout(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """The rewards of greedy answers to the held-out prompts."""
        assert self.heldout_rewards is not None
        with self.accelerator.autocast():
            figures = self.heldout_rewards.score(self.model)
        self.model.eval()  # whose figures the log takes these for
        return {f"{prefix}_{name}": value for name, value in figures.items()}


class SavesBetweenBatches(TrainerCallback):
    """Puts a checkpoint off, and a stop that waits for it, to the last pass over a batch of answers.

    The answers are not in a checkpoint: a run that went on between two passes would sample others.
    """

    def __init__(self, passes: int, best: BestCallback) -> None:
        self.passes = passes  # optimizer steps on one batch of answers
        self.best = best
        self._due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what asks for a checkpoint until the answers have had their passes, or the run its steps."""
        if self.best.stopped_early:  # nothing goes on from there
            return
        if state.global_step % self.passes and state.global_step < state.max_steps:
            self._due = self._due or control.should_save
            control.should_save = control.should_training_stop = False  # GracefulStop asks again at the next step
        elif self._due:
            self._due, control.should_save = False, True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same for a signal during an evaluation."""
        self.on_step_end(args, state, control)


def prompt_alone(sample: Sample) -> Sequence[Sample]:
    """A row as the guards look at it: the model reads its prompt alone, to which a stand-in is the answer."""
    return (replace(sample, answer=STAND_IN),)


def prompts_of(rows: RowCollator, numbers: range) -> Dataset:
    """The numbers of some rows, with their prompts as text."""
    return Dataset.from_dict({"row": numbers, "prompt": [rows.rows[number].prompt.text for number in numbers]})


def trainer_rewards(rewards: Sequence[Reward], rows: RowCollator) -> list[Callable[..., Any]]:
    """The rewards as a trainer calls them, one after the other, with the rows' numbers in the column ``row``.

    Errors: UserError of the last one for an answer that none of them rewards.
    """
    found: dict[str, list[float | None]] = {}
    return [_TrainerReward(reward, rows, found, last=reward is rewards[-1]) for reward in rewards]


class _TrainerReward:
    """A reward function that is given the rows themselves, and answers without template tokens."""

    def __init__(self, reward: Reward, rows: RowCollator, found: dict[str, list[float | None]], *, last: bool) -> None:
        self.__name__ = reward.name  # in the log
        self.reward = reward
        self.rows = rows
        self.found = found  # by all functions, of the answers that are being rewarded
        self.last = last

    def __call__(
        self, *, completion_ids: Sequence[Sequence[int]], row: Sequence[int], **columns: Any
    ) -> list[float | None]:
        samples = [self.rows.rows[number] for number in row]
        texts = decode_captions(self.rows.collator, completion_ids)
        values = score(self.reward, samples=samples, completions=texts, completion_ids=completion_ids)
        self.found[self.reward.name] = values
        if self.last:
            found = dict(self.found)
            self.found.clear()
            refuse_unrewarded(found, samples)
        return values


def end_answers_as_taught(model: PeftModel, collator: CaptionCollator) -> None:
    """Let an answer end at the token that ends a supervised one too, which a base model's own config need not name."""
    config = model.generation_config
    own = config.eos_token_id
    own = own if isinstance(own, list) else [collator.tokenizer.eos_token_id if own is None else own]
    config.eos_token_id = sorted({collator.end_token_id, *own})
