"""Optimizer steps of trainers with and without CRAFT: the joint loss of self_align, the queue, PCGrad.

The model is a Llama of 4 layers, hidden size 256 and a vocabulary of 4,096 (5.3 M weights); rows and pairs have 24 to
64 tokens a side. A step is what the training loop does for it: counting the window, and training_step for each of its
micro-batches.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compared import Compared, Fact, Ratio
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from craft.collate import CRAFTCollator
from craft.config import CRAFTConfigMixin, CRAFTSFTConfig
from craft.infonce import info_nce
from craft.trainers import CRAFTSFTTrainer, CRAFTTrainerMixin
from craft.trainers.encode import BATCH_TYPE

VOCABULARY, PAD = 4096, 0
SHORTEST, LONGEST = 24, 64  # tokens of a row, or of a side of a pair
ALPHA = 0.6
QUEUE = 65_536
CONFLICT_SEED = 4  # of rows and pairs whose gradients point away from each other

Batch = dict[str, Any]
Gradients = dict[str, Tensor]


@dataclass
class CRAFTArguments(CRAFTConfigMixin, TrainingArguments):
    """TrainingArguments with the fields of CRAFT."""


class CRAFTTrainer(CRAFTTrainerMixin, Trainer):
    """CRAFT over a plain Trainer."""


class WithoutPairs(CRAFTTrainer):
    """The same with the contrastive loss taken out."""

    def _compute_craft_contrastive_loss(self, anchors_BD: Tensor, positives_BD: Tensor, **known: Any) -> Tensor:
        return 0.0 * anchors_BD.sum(1)


def llama() -> LlamaForCausalLM:
    """The same random weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def texts(count: int, draw: random.Random) -> list[list[int]]:
    """Random tokens of random length."""
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [draw.choices(range(3, VOCABULARY), k=length) for length in lengths]


def answered_rows(count: int, draw: random.Random) -> Batch:
    """Rows whose last third is supervised."""
    rows = texts(count, draw)
    labels = [[-100] * (len(row) - len(row) // 3) + row[-(len(row) // 3) :] for row in rows]
    pairs = zip(rows, labels, strict=True)
    return CRAFTCollator(pad_token_id=PAD)([{"input_ids": row, "labels": own} for row, own in pairs])


def paired_rows(count: int, draw: random.Random) -> Batch:
    """Pairs, tagged as contrastive."""
    pairs = zip(texts(count, draw), texts(count, draw), strict=True)
    batch = CRAFTCollator(pad_token_id=PAD)([{"input_ids": a, "input_ids_tgt": p} for a, p in pairs])
    return {**batch, BATCH_TYPE: "craft"}


class Step:
    """A trainer and the window of micro-batches that it steps on."""

    def __init__(self, trainer: Any, window: Sequence[Batch]) -> None:
        self.trainer = trainer
        self.window = window
        self.own = trainer.craft_parameters() if isinstance(trainer, CRAFTTrainerMixin) else []

    def __call__(self) -> float:
        """Count, forward and backward of the window; gradients are replaced. Returns the loss."""
        trainer = self.trainer
        for parameter in (*trainer.model.parameters(), *self.own):
            parameter.grad = None
        _, items = trainer.get_batch_samples(iter(self.window), len(self.window), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(self.window)
        loss = 0.0
        for number, batch in enumerate(self.window, start=1):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(self.window))
            given = dict(batch) if isinstance(batch, dict) else batch  # rows to generate from are a list
            loss += float(trainer.training_step(trainer.model, given, items))
        return loss

    def gradients(self) -> Gradients:
        """The model's gradients after a step."""
        named = self.trainer.model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def settings(directory: Path) -> dict[str, Any]:
    """Arguments that every trainer here is given."""
    return {"output_dir": str(directory), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0}


def craft_trainer(directory: Path, *, cls: type = CRAFTTrainer, pairs: int = 0, **craft: Any) -> Any:
    """CRAFT over Trainer; with ``pairs``, rows of a second data set."""
    rows = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[-100, 4]]})
    second = {"input_ids": [[3]] * pairs, "input_ids_tgt": [[4]] * pairs, "attention_mask": [[1]] * pairs}
    trainer = cls(
        model=llama(),
        args=CRAFTArguments(**settings(directory), craft_alpha=ALPHA, **craft),
        train_dataset=rows,
        contrastive_dataset=Dataset.from_dict({**second, "attention_mask_tgt": [[1]] * pairs}) if pairs else None,
    )
    trainer.create_optimizer()  # PCGrad learns here which parameters are shared
    return trainer


def self_align(directory: Path) -> Compared:
    """CRAFT over Trainer against Trainer, and CRAFTSFTTrainer against TRL's, on 16 rows with answers."""
    window = [answered_rows(16, random.Random(0))]
    plain = Step(Trainer(model=llama(), args=TrainingArguments(**settings(directory))), window)
    ours = Step(craft_trainer(directory), window)
    check_sft_part(plain, Step(craft_trainer(directory, cls=WithoutPairs), window))
    common: dict[str, Any] = {
        "train_dataset": Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[-100, 4]]}),
        "processing_class": tokenizer(),
    }
    options = {**settings(directory), "bf16": False, "gradient_checkpointing": False, "activation_checkpointing": False}
    trl = Step(SFTTrainer(model=llama(), args=SFTConfig(**options), **common), window)
    ours_trl = Step(CRAFTSFTTrainer(model=llama(), args=CRAFTSFTConfig(**options, craft_alpha=ALPHA), **common), window)
    torch.testing.assert_close(trl(), plain(), rtol=1e-5, atol=0)
    return Compared(
        variants={"Trainer": plain, "CRAFT over Trainer": ours, "SFTTrainer": trl, "CRAFTSFTTrainer": ours_trl},
        ratios=[
            Ratio(
                what="self_align step over a plain `transformers.Trainer` step, 16 rows",
                ours="CRAFT over Trainer",
                peer="Trainer",
                limit=1.03,
            ),
            Ratio(what="the same over TRL's SFTTrainer", ours="CRAFTSFTTrainer", peer="SFTTrainer"),
        ],
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that TRL asks for and never uses: the rows are tokens."""
    from tokenizers import Tokenizer, models

    words = {f"word{number}": number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="word1"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="word0", eos_token="word2")


def check_sft_part(plain: Step, without_pairs: Step) -> None:
    """Without the contrastive loss, loss and gradients are alpha times those of the plain trainer."""
    torch.testing.assert_close(without_pairs() / ALPHA, plain(), rtol=1e-6, atol=0)
    wanted = plain.gradients()
    for name, gradient in without_pairs.gradients().items():
        torch.testing.assert_close(gradient / ALPHA, wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def queue(directory: Path) -> Compared:
    """A contrastive micro-batch of 32 pairs alone, the step in which a queue weighs most."""
    window = [paired_rows(32, random.Random(1))]
    common = {"craft_use_gradcache": False}
    without = Step(craft_trainer(directory, pairs=2, **common), window)
    trainer = craft_trainer(
        directory, pairs=QUEUE, craft_negative_strategy="queue", craft_negative_queue_size=QUEUE, **common
    )
    ours = Step(trainer, window)
    assert ours() == without(), "an empty queue changes the loss"
    bank = trainer._craft_objective.queue
    noise = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(QUEUE, bank.embedding_dim, generator=noise), dim=1)
    bank.enqueue(rows, torch.randint(1, 2**62, (QUEUE, 3), generator=noise))
    check_queue(rows)
    return Compared(
        variants={"no queue": without, "queue": ours},
        ratios=[
            Ratio(
                what=f"queue of {QUEUE:,} over the same step without it, 32 pairs",
                ours="queue",
                peer="no queue",
                limit=1.05,
            )
        ],
    )


def check_queue(queue_KD: Tensor) -> None:
    """The loss with a queue is the cross-entropy over batch and queue, in value and gradient."""
    noise = torch.Generator().manual_seed(1)
    shape = (2, 32, queue_KD.shape[1])
    a_BD, p_BD = torch.nn.functional.normalize(torch.randn(shape, generator=noise), dim=2)
    found, wanted = a_BD.clone().requires_grad_(), a_BD.clone().requires_grad_()
    ours = info_nce(found, p_BD, temperature=0.05, queue_KD=queue_KD).losses_B.mean()
    logits = wanted @ torch.cat([p_BD, queue_KD]).T / 0.05
    plain = torch.nn.functional.cross_entropy(logits, torch.arange(len(a_BD)))
    ours.backward()
    plain.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-6)


def pcgrad(directory: Path) -> Compared:
    """A window of two SFT and two contrastive micro-batches of 8 whose gradients conflict, with PCGrad and without."""
    draw = random.Random(CONFLICT_SEED)
    window = [*(answered_rows(8, draw) for _ in range(2)), *(paired_rows(8, draw) for _ in range(2))]
    common = {"pairs": 2, "craft_use_gradcache": False, "gradient_accumulation_steps": 4}
    steps = {
        name: Step(craft_trainer(directory, craft_gradient_balancing=balancing, **common), window)
        for name, balancing in (("no balancing", "none"), ("PCGrad", "pcgrad"))
    }
    torch.testing.assert_close(steps["PCGrad"](), steps["no balancing"](), rtol=1e-6, atol=0)
    cosine = check_pcgrad(directory, steps, window)
    return Compared(
        variants=steps,
        ratios=[
            Ratio(
                what="PCGrad on separate micro-batches over no balancing, accumulation 4",
                ours="PCGrad",
                peer="no balancing",
                limit=1.05,
            )
        ],
        facts=[Fact(what="cosine of the tasks' gradients, before PCGrad projects them", value=f"{cosine:.3f}")],
    )


def check_pcgrad(directory: Path, steps: dict[str, Step], window: Sequence[Batch]) -> float:
    """The combined gradient is that of the algorithm on the two tasks' own gradients; returns their cosine."""
    flat = {name: torch.cat([g.double().flatten() for g in step.gradients().values()]) for name, step in steps.items()}
    trainer = steps["no balancing"].trainer
    sft = Step(trainer, window[:2])
    sft()
    grads = sft.gradients()
    first = torch.cat([grads[name].double().flatten() for name in steps["PCGrad"].gradients()])
    second = flat["no balancing"] - first
    dot = first @ second
    wanted = flat["no balancing"]
    assert dot < 0, "the tasks do not conflict, so that nothing would be projected: choose another CONFLICT_SEED"
    wanted = wanted - dot / (second @ second) * second - dot / (first @ first) * first
    error = (flat["PCGrad"] - wanted).norm() / wanted.norm()
    assert error < 1e-5, f"PCGrad's gradient is off by {error:.1e}"
    return float(dot / first.norm() / second.norm())
