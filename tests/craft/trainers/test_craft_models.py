"""The trainers on adapted, quantised, half-precision and image models, and with users' own bases and negatives."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from craft import CRAFTCollator, CRAFTConfigMixin, CRAFTTrainerMixin
from craft.losses import InfoNCEOutput, info_nce
from craft.trainers import CRAFTSFTTrainer
from inft.models.pairs import PairCollator
from inft.sample import Pair
from inft.training.adapters import add_adapters
from inft.training.quantise import after_quantised_load, quantization_config
from params import LoRAParams, QLoRAParams

STRATEGIES = ["self_align", "paired_dataset"]
EXACT = {"max_grad_norm": 0.0, "max_steps": 1}


@dataclass
class Args(CRAFTConfigMixin, TrainingArguments):
    """Arguments of a plain Trainer with CRAFT."""


class PlainTrainer(CRAFTTrainerMixin, Trainer):
    """A plain Trainer with CRAFT."""


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference between two steps' gradients, relative to each gradient's largest entry."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-12)) for n in wanted)


# Adapters and precision


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_has_the_same_gradient_with_gradient_checkpointing(
    make_trainer, make_model, rows, pairs, spy, strategy, tmp_path
):
    gradients = []
    for checkpointing in (False, True):
        watched = type(spy)()
        trainer = make_trainer(
            rows(16),
            pairs(12) if strategy == "paired_dataset" else None,
            model=adapted(make_model(dtype=torch.float64)),
            gradient_checkpointing=checkpointing,
            activation_checkpointing=checkpointing,
            **EXACT,
        )
        watched.watch(trainer)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        gradients += watched.gradients
    assert any("lora_" in name for name in gradients[0])
    assert not [name for name in gradients[0] if "lora_" not in name and not name.startswith("head.")]
    assert difference(*gradients) < 1e-5  # the head is float32


class Recording(SFTTrainer):
    """Keeps the losses that TRL finds."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        self.__dict__.setdefault("found", []).append(found.detach().clone())
        return found


class RecordingCRAFT(CRAFTTrainerMixin, Recording):
    """Keeps the losses that TRL finds, and the dtypes of what is contrasted."""

    def _compute_craft_contrastive_loss(self, anchors_BD: Tensor, positives_BD: Tensor, **known: Any) -> InfoNCEOutput:
        output = super()._compute_craft_contrastive_loss(anchors_BD, positives_BD, **known)
        self.dtypes = (anchors_BD.dtype, positives_BD.dtype, output.losses_B.dtype)
        return output


def test_autocast_leaves_trls_loss_as_it_is_and_similarities_in_float32(
    make_trainer, make_model, rows, tokenizer, tmp_path
):
    # failure 15: float32 and bfloat16 met, and autocast moved the logits by .137
    trainer = make_trainer(rows(16), cls=RecordingCRAFT, bf16=True, max_steps=1)
    trainer.train()
    assert trainer.dtypes == (torch.float32,) * 3
    assert {p.dtype for p in trainer.craft_loss.parameters()} == {torch.float32}
    plain = Recording(
        model=make_model(),
        args=SFTConfig(
            **{
                name: getattr(trainer.args, name)
                for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps")
            },
            output_dir=str(tmp_path / "plain"),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            bf16=True,
            gradient_checkpointing=False,
            activation_checkpointing=False,
        ),
        train_dataset=rows(16),
        processing_class=tokenizer,
    )
    plain.train()
    assert len(plain.found) == 4
    for ours, theirs in zip(trainer.found, plain.found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gradcache", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_forward_passes_are_in_mixed_precision(make_trainer, rows, pairs, strategy, gradcache):
    # failure 16: the contrastive one was not
    trainer = make_trainer(
        rows(16),
        pairs(16) if strategy == "paired_dataset" else None,
        cls=RecordingCRAFT,
        bf16=True,
        craft_use_gradcache=gradcache,
        craft_gradcache_chunk_size=2,
    )
    dtypes = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert trainer.dtypes == (torch.float32,) * 3
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("more", [{}, {"craft_use_gradcache": True}, {"craft_gradient_balancing": "pcgrad"}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bfloat16_model_trains_with_a_float32_head(make_trainer, make_model, rows, pairs, strategy, more):
    # failure 15: it raised
    trainer = make_trainer(
        rows(16),
        pairs(16) if strategy == "paired_dataset" else None,
        model=make_model(dtype=torch.bfloat16),
        cls=RecordingCRAFT,
        **more,
    )
    trainer.train()
    assert trainer.dtypes == (torch.float32,) * 3
    assert {p.dtype for p in trainer.craft_loss.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in (*trainer.model.parameters(), *trainer.craft_parameters()))


# Families of the application, through their own collators


def plain(model: nn.Module, train_dataset: Any, tmp_path: Any, *, pairs: Any = None, **changes: Any) -> PlainTrainer:
    settings = {
        "output_dir": str(tmp_path / "plain"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }
    own = {name: changes.pop(name) for name in ("data_collator", "craft_collator") if name in changes}
    args = Args(**{**settings, **changes})
    return PlainTrainer(model=model, args=args, train_dataset=train_dataset, contrastive_dataset=pairs, **own)


def samples(make_sample: Callable[..., Any], *, mixed: bool) -> list[Any]:
    answers = ["A red circle.", "A big blue circle on white.", "Green.", "Someone walks away."]
    colours = ["red", "blue", "green", "black"]
    made = zip(answers, colours, strict=True)
    return [
        make_sample(answer, news=f"It is {colour}.", colour=colour, image=not mixed or number % 2 == 0)
        for number, (answer, colour) in enumerate(made)
    ]


def sides(rows: list[Any], make_sample: Callable[..., Any]) -> list[Pair]:
    """Each row with what stands for its translation, which has no image."""
    others = [make_sample(row.answer.upper(), image=False) for row in rows]
    return [Pair(anchor=row, positive=other, id=i) for i, (row, other) in enumerate(zip(rows, others, strict=True), 1)]


def test_nf4_weights_train_through_adapters(text, make_sample, tmp_path):
    config = quantization_config(QLoRAParams(), text.spec)
    rows = samples(lambda *args, **more: make_sample(*args, **{**more, "image": False}), mixed=False)
    for pairs in (None, sides(rows, make_sample)):
        packed = after_quantised_load(text.model(quantization_config=config, dtype="bfloat16"))
        model = add_adapters(packed, text.spec, LoRAParams(r=4, alpha=8, dropout=0.0), ("q_proj", "up_proj"), seed=0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = plain(
            model,
            rows,
            tmp_path,
            pairs=pairs,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            bf16=True,
            data_collator=text.collator(),
            craft_collator=PairCollator(text.collator()),
        )
        trainer.train()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        assert all("lora_" in name for name in changed)
        assert trainer.craft_metrics["loss/craft_contrast"] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_image_models_have_one_loss_with_and_without_the_hook(vlm, make_sample, tmp_path, strategy):
    # Text rows and rows with an image stand in one batch.
    rows = samples(make_sample, mixed=True)
    pairs = sides(rows, make_sample) if strategy == "paired_dataset" else None
    logged, norms = [], []
    for hook in (True, False):
        trainer = plain(
            vlm.model(),
            rows,
            tmp_path,
            pairs=pairs,
            gradient_accumulation_steps=2,
            craft_use_hidden_state_hook=hook,
            data_collator=vlm.collator(),
            craft_collator=PairCollator(vlm.collator()),
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged.append([(entry["loss/craft_sft"], entry["loss/craft_contrast"]) for entry in logs])
        norms += [entry["grad_norm"] for entry in logs]
    for with_hook, without in zip(*logged, strict=True):
        assert with_hook == pytest.approx(without, rel=1e-3)
        assert min(with_hook) > 0
    assert all(norm > 0 for norm in norms)


def test_equal_texts_under_different_images_are_negatives(vlm, make_sample, tmp_path):
    # Prompt and answer are the same for all rows, so that the answers alone say that nothing is to be told apart.
    equal = [make_sample("A circle.", colour=colour) for colour in ("red", "blue")]
    different = [make_sample(f"A {colour} circle.", colour=colour) for colour in ("red", "blue")]
    losses = []
    for rows in (equal, different):
        trainer = plain(vlm.model(), rows, tmp_path, max_steps=1, data_collator=vlm.collator())
        trainer.train()
        losses.append(trainer.craft_metrics["loss/craft_contrast"])
    assert losses[0] == 0  # equal answers are no negatives
    assert losses[1] > 0  # equal prompts are, under different images


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_left_padding_gives_the_same_losses(make_trainer, rows, pairs, strategy):
    # failure 11: last_token was a padding token
    logged = []
    for side in ("right", "left"):
        collator = CRAFTCollator(pad_token_id=3, padding_side=side)
        trainer = make_trainer(
            rows(16),
            pairs(12) if strategy == "paired_dataset" else None,
            trainer={"data_collator": collator, "craft_collator": collator},
            max_steps=1,
        )
        trainer.train()
        logged.append([trainer.craft_metrics[key] for key in ("loss/craft_sft", "loss/craft_contrast")])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"craft_symmetric": True}, {"gradient_checkpointing": True}], ids=str)
def test_gradcache_in_the_trainer_changes_no_loss_and_no_gradient(make_trainer, make_model, rows, pairs, spy, more):
    found = []
    for gradcache in (False, True):
        watched = type(spy)()
        trainer = make_trainer(
            rows(16),
            pairs(24),
            model=make_model(dtype=torch.float64),
            craft_contrastive_batch_size=7,
            craft_use_gradcache=gradcache,
            craft_gradcache_chunk_size=3,
            **EXACT,
            **{**more, "activation_checkpointing": "gradient_checkpointing" in more},
        )
        watched.watch(trainer)
        trainer.train()
        found.append((trainer.craft_metrics["loss/craft_contrast"], watched.gradients[0]))
    (plain_loss, plain_gradients), (cached_loss, cached_gradients) = found
    assert cached_loss == pytest.approx(plain_loss, rel=1e-6)
    assert difference(cached_gradients, plain_gradients) < 1e-5


def test_gradcache_with_dropout_and_checkpointing_trains(make_trainer, make_model, rows, pairs):
    trainer = make_trainer(
        rows(32),
        pairs(16),
        model=make_model(dropout=0.2),
        craft_use_gradcache=True,
        craft_projection_dropout=0.1,
        craft_contrastive_batch_size=8,
        gradient_checkpointing=True,
        activation_checkpointing=True,
        learning_rate=3e-3,
        max_steps=25,
        logging_steps=5,
    )
    trainer.train()
    losses = [entry["loss/craft_contrast"] for entry in trainer.state.log_history if "loss/craft_contrast" in entry]
    assert losses[-1] < 0.7 * losses[0]


# Users' own


class Base:
    """A trainer that is not of transformers: it has a loader, a loss and a log of its own."""

    def __init__(self, model: Any, args: Any, train_dataset: Any) -> None:
        self.model, self.args, self.train_dataset = model, args, train_dataset
        self.logged: list[dict[str, float]] = []

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=CRAFTCollator(pad_token_id=3),
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.logged.append(logs)


class OwnTrainer(CRAFTTrainerMixin, Base):  # type: ignore[misc]
    """CRAFT on it."""


class Parameterless(nn.Module):
    """A model without parameters, `.device` and `get_decoder`: states are made of the tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **others: Any) -> Any:
        state = torch.stack([torch.sin(input_ids * k / 7.0) for k in range(1, 9)], dim=-1)
        return SimpleNamespace(loss=state.mean() + 1, logits=state, last_hidden_state=state)


class OfHiddenStates(Parameterless):
    """The same, whose output names the states of all layers."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        return SimpleNamespace(loss=output.loss, hidden_states=(output.logits * 0, output.logits))


@pytest.mark.parametrize(
    ("model", "hook"), [(Parameterless(), True), (OfHiddenStates(), True), (OfHiddenStates(), False)], ids=repr
)
def test_a_base_of_ones_own_with_a_model_without_parameters(rows, model, hook):
    args = CRAFTConfigMixin(craft_use_hidden_state_hook=hook, craft_report_metrics=["contrastive_accuracy"])
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 4, 2
    trainer = OwnTrainer(model, args, rows(8))
    assert trainer.craft_bundle.strategy == "self_align"
    batches = list(trainer.get_train_dataloader())
    losses = [trainer.compute_loss(trainer.model.train(), batch) for batch in batches]
    losses[0].backward()
    assert all(p.grad is not None for p in trainer.craft_parameters())
    for batch, loss in zip(batches, losses, strict=True):
        answers = trainer._craft_answers(batch)
        state = Parameterless()(**batch).last_hidden_state
        anchors, positives = (trainer._craft_embed(state, mask) for mask in answers.masks())
        contrastive = F.cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors)))
        wanted = 0.6 * (state.mean() + 1) + 0.4 * contrastive
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss, outputs = trainer.compute_loss(trainer.model, batches[0], return_outputs=True)
    assert outputs.loss is not None
    trainer.log({"loss": 1.0})
    assert {"loss/craft_sft", "loss/craft_contrast", "loss/craft_total"} <= trainer.logged[-1].keys()
    assert trainer.craft_metrics.items() <= trainer.logged[-1].items()
    trainer.model.eval()
    evaluated = trainer.compute_loss(trainer.model, batches[0])
    assert float(evaluated) == float(Parameterless()(**batches[0]).loss)


def as_output(anchors: Tensor, positives: Tensor, known: dict[str, Any]) -> InfoNCEOutput:
    return info_nce(anchors, positives, temperature=0.05)


def as_losses(anchors: Tensor, positives: Tensor, known: dict[str, Any]) -> Tensor:
    return F.cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors)), reduction="none")


def as_mean(anchors: Tensor, positives: Tensor, known: dict[str, Any]) -> Tensor:
    return as_losses(anchors, positives, known).mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", [as_output, as_losses, as_mean])
def test_negatives_of_ones_own_by_overriding_the_loss(make_trainer, rows, pairs, spy, how, strategy):
    class Own(CRAFTSFTTrainer):
        def _compute_craft_contrastive_loss(self, anchors_BD: Tensor, positives_BD: Tensor, **known: Any) -> Any:
            assert known["ids_B3"].shape == (len(anchors_BD), 3)
            return how(anchors_BD, positives_BD, known)

    found = []
    for cls in (CRAFTSFTTrainer, Own):
        watched = type(spy)()
        trainer = make_trainer(rows(16), pairs(12) if strategy == "paired_dataset" else None, cls=cls, **EXACT)
        watched.watch(trainer)
        trainer.train()
        found.append((trainer.craft_metrics["loss/craft_contrast"], watched.gradients[0]))
        reports = "metrics/craft_contrastive_accuracy" in trainer.craft_metrics
        assert reports == (cls is CRAFTSFTTrainer or how is as_output)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert difference(found[1][1], found[0][1]) < 1e-3


def renamed(batch: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in batch.items()}


def test_columns_by_other_names_are_the_same_pairs(make_trainer, rows, pairs):
    keys = {
        "anchor_input_ids": "query",
        "anchor_attention_mask": "query_mask",
        "positive_input_ids": "document",
        "positive_attention_mask": "document_mask",
    }
    own = pairs(12).map(
        lambda row: {"query_mask": [1] * len(row["input_ids"]), "document_mask": [1] * len(row["input_ids_tgt"])}
    )
    own = own.rename_columns({"input_ids": "query", "input_ids_tgt": "document"})
    losses = []
    for contrastive, more in ((pairs(12), {}), (own, {"craft_contrastive_keys": keys})):
        trainer = make_trainer(rows(16), contrastive, max_steps=1, **more)
        trainer.train()
        losses.append(trainer.craft_metrics["loss/craft_contrast"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("more", [{}, {"craft_use_gradcache": True}, {"craft_symmetric": True}], ids=str)
def test_hard_negatives_enter_the_sum_and_equal_texts_do_not(make_trainer, make_model, rows, pairs, spy, more):
    bare = pairs(4)
    hard = Dataset.from_list(
        [
            {
                **row,
                "input_ids_neg": [150 + i, 151, 152],
                # The second one of the first row is the second row's own positive: no negative of that row.
                "input_ids_neg_1": bare[1]["input_ids_tgt"] if i == 0 else [170 + i] * (i + 1),
            }
            for i, row in enumerate(bare)
        ]
    )
    trainer = make_trainer(
        rows(16), hard, model=make_model(dtype=torch.float64), gradient_accumulation_steps=2, max_steps=1, **more
    )
    spy.watch(trainer)
    wanted = []

    def reference(batch: dict[str, Any]) -> float:
        embedded = {}
        for end in ("", "_tgt", "_neg", "_neg_1"):
            ids, mask = batch[f"input_ids{end}"], batch[f"attention_mask{end}"]
            state = trainer.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            embedded[end] = trainer._craft_embed(state, mask)
        forth = embedded[""] @ torch.cat([embedded["_tgt"], embedded["_neg"], embedded["_neg_1"]]).T / 0.05
        texts = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["input_ids_tgt"], batch["attention_mask_tgt"], strict=True)
        ]
        copies = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["input_ids_neg_1"], batch["attention_mask_neg_1"], strict=True)
        ]
        for i, text in enumerate(texts):
            for j, copy in enumerate(copies):
                if text == copy:
                    forth[i, 8 + j] = -torch.inf
        loss = F.cross_entropy(forth, torch.arange(4))
        if "craft_symmetric" in more:
            loss = (loss + F.cross_entropy(embedded["_tgt"] @ embedded[""].T / 0.05, torch.arange(4))) / 2
        return float(loss)

    before = spy.on_pre_optimizer_step

    def noted(*args: Any, **kwargs: Any) -> None:
        before(*args, **kwargs)
        with torch.no_grad():
            wanted.extend(reference(batch) for batch in spy.batches[-1] if batch["craft_batch_type"] == "craft")

    spy.on_pre_optimizer_step = noted
    trainer.train()
    assert len(wanted) == 1
    assert trainer.craft_metrics["loss/craft_contrast"] == pytest.approx(wanted[0], rel=1e-4)
