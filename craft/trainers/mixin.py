"""CRAFTTrainerMixin: InfoNCE beside the loss of any Trainer, in exact proportion.

Over the micro-batches of one optimizer step and all ranks, S those with the trainer's own loss and C the contrastive
ones: L = alpha · Σ_S Σ_t l_t / N_S + (1 − alpha) · Σ_C Σ_i l_i / N_C, with N_S label tokens in S and N_C anchors in C.

The mixin averages gradients over ranks itself, once per optimizer step: what the tasks' gradients are combined by
(projection, clipping, norms) must see them averaged, and no rank may wait for a parameter that it did not use.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer

from craft.config import craft_settings
from craft.data import CRAFTDatasetBundle
from craft.distributed import sum_over_ranks, world_size
from craft.losses import InfoNCEOutput
from craft.pooling import pool_hidden_states
from craft.trainers.answers import Answers, marked_answers
from craft.trainers.balance import Balance
from craft.trainers.callback import BesideTheLoop
from craft.trainers.encode import (
    OWN_KEYS,
    TEXT_KEYS,
    Encoder,
    HiddenStateRecorder,
    anchor_rows,
    negative_ids,
    pair_ids,
    split_sides,
)
from craft.trainers.journal import Journal
from craft.trainers.loaders import Loaders
from craft.trainers.objective import ContrastiveObjective
from craft.trainers.optimizer import add_parameters
from craft.trainers.plan import CRAFTPlan
from craft.trainers.setup import (
    accumulation_of,
    bundle_of,
    new_head,
    output_device,
    refuse_offloading,
    refuse_other_parallelism,
    warn_of_first_tokens,
)
from craft.trainers.state import load_checkpoint, refuse_other_kind, save_checkpoint
from craft.trainers.window import CONTRASTIVE, SFT, Window, task_of

logger = logging.getLogger(__name__)


class CRAFTTrainerMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]  # mixed into a Trainer
    """Adds the contrastive objective to a Trainer class that stands after it: ``class T(CRAFTTrainerMixin, Trainer)``.

    ``args`` carries the fields of CRAFTConfigMixin. Keywords: ``craft_bundle``, or ``contrastive_dataset`` with
    ``craft_strategy``; ``craft_collator`` for the pairs; ``craft_sft_loader`` and ``craft_contrastive_loader``, or a
    ``craft_loader_factory(trainer) -> (sft_loader, contrastive_loader or None)``. With ``craft_alpha=1`` nothing
    differs from the class it is mixed into, but that a given SFT loader is used. Override
    ``_compute_craft_contrastive_loss`` for negatives of your own.
    """

    _signature_columns: list[str] | None  # of Trainer
    _craft_loaders_class: type[Loaders] = Loaders
    _craft_scales_own_loss = False  # whether the trainer's own mean comes divided by the accumulation steps
    craft_pairs_taken = 0  # batches of a stream beside the trainer's own, where there is one (CRAFTJointMixin)

    def __init__(
        self,
        *args: Any,
        craft_bundle: CRAFTDatasetBundle | None = None,
        contrastive_dataset: Any = None,
        craft_strategy: str | None = None,
        craft_collator: Callable[[Any], Any] | None = None,
        craft_sft_loader: DataLoader | None = None,
        craft_contrastive_loader: DataLoader | None = None,
        craft_loader_factory: Callable[[Any], tuple[DataLoader, DataLoader | None]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.craft_args = craft_settings(self.args)
        self.craft_enabled = self.craft_args.craft_alpha < 1
        self.craft_bundle = bundle_of(self, craft_bundle, contrastive_dataset, craft_strategy)
        if not self.craft_enabled:
            self._craft_plain_loader = craft_sft_loader, craft_loader_factory
            return
        self._craft_loaders = self._craft_loaders_class(
            self,
            collator=craft_collator,
            sft_loader=craft_sft_loader,
            contrastive_loader=craft_contrastive_loader,
            factory=craft_loader_factory,
        )
        self._craft_build()
        if isinstance(self, Trainer):
            refuse_other_parallelism(self)
            refuse_offloading(self)
            warn_of_first_tokens(self)
            self._craft_scales_own_loss = bool(self.loss_is_scaled_for_ga)
            self.loss_is_scaled_for_ga = True  # the weights are those of the whole window
            self.add_callback(BesideTheLoop(self))

    def _craft_build(self) -> None:
        """The head, the objective, the balance of the losses and the sums for the log."""
        args, device = self.craft_args, output_device(self.model)
        self.craft_loss = new_head(args, self.model, device, seed=getattr(self.args, "seed", 0))
        self._craft_objective = ContrastiveObjective(
            strategy=args.craft_negative_strategy,
            symmetric=args.craft_symmetric,
            queue_size=self._craft_loaders.queue_rows,
            dim=args.craft_projection_dim,
            device=device,
        )
        self._craft_encoder = Encoder(
            embed=self._craft_embed,
            autocast=self._craft_autocast,
            chunk_size=args.craft_gradcache_chunk_size if args.craft_use_gradcache else None,
            through_hook=args.craft_use_hidden_state_hook,
        )
        self._craft_journal = Journal(device, wanted=args.craft_report_metrics, alpha=args.craft_alpha)
        self._craft_balance = Balance(args, device, note_norm=self._craft_journal.note_norm)

    @property
    def craft_metrics(self) -> dict[str, float]:
        """The figures that were logged last; empty with alpha 1."""
        return dict(self._craft_journal.latest) if self.craft_enabled else {}

    @property
    def craft_plan(self) -> CRAFTPlan | None:
        """What an optimizer step holds; None with alpha 1."""
        return self._craft_loaders.plan() if self.craft_enabled else None

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """The loader of both kinds of batches; with alpha 1 or self_align the trainer's own."""
        if not self.craft_enabled:
            sft_loader, factory = self._craft_plain_loader
            if factory is not None:
                sft_loader = factory(self)[0]
            return super().get_train_dataloader() if sft_loader is None else self.accelerator.prepare(sft_loader)
        loader = self._craft_loaders.build(super().get_train_dataloader)
        logger.log(logging.WARNING if self.craft_args.craft_debug else logging.INFO, "CRAFT: %s", self.craft_plan)
        return loader

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.craft_enabled:
            known = self._signature_columns or []
            self._signature_columns = [*known, *(n for n in self._craft_loaders.own_columns() if n not in known)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count what an optimizer step holds: label tokens of its SFT part (returned), anchors of the other."""
        if not self.craft_enabled:
            return super()._get_num_items_in_batch(batch_samples, device)
        sft = [batch for batch in batch_samples if task_of(batch) == SFT]
        pairs = sft if self._craft_self_aligned else [b for b in batch_samples if task_of(b) == CONTRASTIVE]
        items = super()._get_num_items_in_batch(sft, device)
        anchors = sum(self._craft_anchors(batch) for batch in pairs)
        self._craft_balance.window = Window(
            sft_items=items,
            sft_batches=len(sft),
            anchors=int(sum_over_ranks(torch.tensor(anchors, device=device))),
            contrastive_batches=len(pairs),
        )
        if self.craft_args.craft_debug:
            logger.warning("CRAFT step: %s, weights %s", self._craft_balance.window, self._craft_balance.weights)
        # Without a single label token the trainer's loss is a sum of nothing: 0, and not 0 / 0.
        return items.clamp(min=1) if isinstance(items, Tensor) else items and max(items, 1)

    @property
    def _craft_self_aligned(self) -> bool:
        return self.craft_bundle.strategy == "self_align"

    def _craft_anchors(self, batch: Mapping[str, Any]) -> int:
        if self._craft_self_aligned:
            return int(self._craft_answers(batch).valid_B.sum())
        return anchor_rows(batch, self.craft_args.craft_contrastive_keys)

    def _craft_answers(self, inputs: Mapping[str, Any]) -> Answers:
        """The prompts and answers of a batch of the trainer's own, for self_align."""
        of_model = {name for name, value in self._craft_for_model(inputs).items() if isinstance(value, Tensor)}
        return marked_answers(inputs, self.craft_args, prompts_tell=of_model <= {*TEXT_KEYS, "labels"})

    # The loss of a micro-batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss of a micro-batch in training; the trainer's own, unscaled, in evaluation."""
        if not self.craft_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return super().compute_loss(model, self._craft_for_model(inputs), return_outputs, num_items_in_batch)
        if task_of(inputs) == CONTRASTIVE:
            loss, outputs = self._craft_pair_loss(inputs), None
            loss = loss.to(getattr(self.args, "device", loss.device))  # a model over several GPUs ends on the last
        elif self._craft_self_aligned:
            loss, outputs = self._craft_joint_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss, outputs = self._craft_base_loss(model, inputs, return_outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _craft_for_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without what is about its rows."""
        own = {
            *OWN_KEYS,
            self.craft_args.craft_assistant_mask_key,
            self.craft_args.craft_contrastive_keys["anchor_labels"],
        }
        return {name: value for name, value in inputs.items() if name == "labels" or name not in own}

    def _craft_base_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool, items: Any
    ) -> tuple[Tensor, Any]:
        """The trainer's own loss with its weight in the objective."""
        batches = self._craft_balance.window.sft_batches
        with accumulation_of(self, batches):
            found = super().compute_loss(model, self._craft_for_model(inputs), return_outputs, items)
        loss, outputs = found if return_outputs else (found, None)
        if items is None:  # a mean over the micro-batch
            share = loss if self._craft_scales_own_loss else loss / batches
            self._craft_journal.note_sft(share.detach() * batches, 1.0)
            return self._craft_weighted(SFT, share), outputs
        # The base has divided by the label tokens of the whole step, and multiplied by the ranks that it averages over.
        ranks = world_size() if self.args.average_tokens_across_devices else 1
        self._craft_journal.note_sft(loss.detach() * (items / ranks), items / (batches * ranks))
        return self._craft_weighted(SFT, loss), outputs

    def _craft_joint_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool, items: Any
    ) -> tuple[Tensor, Any]:
        """Both losses of self_align from one forward pass."""
        recorder = HiddenStateRecorder(self.model, through_hook=self.craft_args.craft_use_hidden_state_hook)
        with recorder.recording():
            sft, outputs = self._craft_base_loss(model, {**inputs, **recorder.extra_inputs}, return_outputs, items)
        contrastive = self._craft_self_align_loss(recorder.take(), inputs)
        if self._craft_balance.tasks is None:
            return sft + contrastive.to(sft.device), outputs
        with self._craft_balance.running(CONTRASTIVE):  # the graph is shared: each task's gradient takes its own pass
            self.accelerator.backward(contrastive, retain_graph=True)
        return sft + contrastive.detach().to(sft.device), outputs

    def _craft_self_align_loss(self, hidden_BTH: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        answers = self._craft_answers(inputs)
        hidden_VTH = answers.hidden(hidden_BTH)
        prompts_VD, answers_VD = (self._craft_embed(hidden_VTH, mask_VT) for mask_VT in answers.masks())
        return self._craft_contrast(prompts_VD, answers_VD, ids_B3=answers.ids())

    def _craft_pair_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The contrastive loss of a batch of pairs: one forward pass of the backbone a side, or GradCache's chunks."""
        anchor, positive, negatives = split_sides(inputs, self.craft_args.craft_contrastive_keys)
        embedded = [self._craft_encoder(self.model, side) for side in (anchor, positive, *negatives)]
        ids_B3 = pair_ids(inputs, anchor.ids_B, positive.ids_B)
        if not negatives:
            return self._craft_contrast(*embedded, ids_B3=ids_B3)
        given = {"negatives_ND": torch.cat(embedded[2:]), "negative_ids_N3": negative_ids(negatives)}
        return self._craft_contrast(*embedded[:2], ids_B3=ids_B3, **given)

    def _craft_contrast(self, anchors_BD: Tensor, positives_BD: Tensor, **known: Tensor) -> Tensor:
        """The contrastive loss of embedded pairs with its weight in the objective."""
        known = {name: ids.to(anchors_BD.device) for name, ids in known.items()}
        found = self._compute_craft_contrastive_loss(anchors_BD, positives_BD, **known)
        losses_B = found.losses_B if isinstance(found, InfoNCEOutput) else found
        if losses_B.dim() == 0:  # a mean, as an overriding method may return
            losses_B = losses_B.expand(len(anchors_BD))
        window = self._craft_balance.window
        if window.anchors is None:  # not known before the step: each micro-batch of each rank counts alike
            share = losses_B.sum() / max(len(anchors_BD) * window.contrastive_batches, 1)
        else:
            share = losses_B.sum() * (world_size() / max(window.anchors, 1))
        if self._craft_objective.connection is not None:
            share = share + self._craft_objective.connection
        temperature = None
        if "temperature" in self.craft_args.craft_report_metrics or self.craft_loss.learnable_temperature:
            temperature = self.craft_loss.temperature
        self._craft_journal.note_contrast(found, losses_B, anchors_BD, temperature)
        return self._craft_weighted(CONTRASTIVE, share)

    def _compute_craft_contrastive_loss(
        self,
        anchors_BD: Tensor,
        positives_BD: Tensor,
        *,
        ids_B3: Tensor,
        negatives_ND: Tensor | None = None,
        negative_ids_N3: Tensor | None = None,
    ) -> InfoNCEOutput | Tensor:
        """The loss of each anchor; override it for negatives of your own.

        anchors and positives are this rank's unit vectors [B, D]; ids [B, 3] tell equal samples and texts (see
        craft.negatives); negatives [N, D] come from columns such as input_ids_neg. Return an InfoNCEOutput, losses
        [B], or their mean.
        """
        own = self.craft_loss
        output: InfoNCEOutput = self._craft_objective(
            anchors_BD,
            positives_BD,
            temperature=own.temperature if own.learnable_temperature else own.fixed_temperature,
            ids_B3=ids_B3,
            negatives_ND=negatives_ND,
            negative_ids_N3=negative_ids_N3,
        )
        return output

    def _craft_embed(self, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        pooled_BH = pool_hidden_states(hidden_BTH, mask_BT.to(hidden_BTH.device), self.craft_args.craft_pooling)
        if self.craft_loss.projector is None:  # a model whose config does not tell its hidden size
            self.craft_loss._add_projector(pooled_BH.shape[-1])
        unit_BD: Tensor = self.craft_loss._project(pooled_BH)
        return unit_BD

    def _craft_autocast(self) -> AbstractContextManager[Any]:
        accelerator = getattr(self, "accelerator", None)
        return accelerator.autocast() if accelerator is not None else nullcontext()

    def _craft_weighted(self, task: str, share: Tensor) -> Tensor:
        return self._craft_balance.weighted(task, share, self._craft_alphas[task])

    @property
    def _craft_alphas(self) -> dict[str, float]:
        """alpha and 1 - alpha, more for a task that is in few of the optimizer steps: the long run keeps the ratio."""
        alpha, shares = self.craft_args.craft_alpha, self._craft_loaders.shares
        return {SFT: alpha / shares[SFT], CONTRASTIVE: (1 - alpha) / shares[CONTRASTIVE]}

    # The optimizer step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; at the last of a step the gradients are averaged over ranks and combined."""
        if not self.craft_enabled:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss
        own_sync = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        with own_sync, self._craft_balance.running(task_of(inputs)):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._craft_objective.enqueue()
        if self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            parameters = [p for p in (*self.model.parameters(), *self.craft_parameters()) if p.requires_grad]
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._craft_balance.finish(parameters, self._craft_alphas, scale=scale)
        return loss

    def _craft_forget(self) -> None:
        """Drop what a step that was interrupted left behind."""
        for parameter in self.craft_parameters():
            parameter.grad = None
        self._craft_balance.forget()
        self._craft_objective.forget()

    def craft_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the model: the head, a learnable temperature, uncertainty weights."""
        return [*self.craft_loss.parameters(), *self._craft_balance.parameters()]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer with CRAFT's parameters in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self.craft_enabled:
            return optimizer
        self._craft_journal.meter.clear()  # of a step that was interrupted; a checkpoint's sums are loaded after this
        add_parameters(self, optimizer)
        shared = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._craft_balance.separate(shared=shared, own=self.craft_parameters())
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.craft_enabled:  # on its own: a large gradient of the new head must not shrink the model's step
            nn.utils.clip_grad_norm_(self.craft_parameters(), self.args.max_grad_norm)
        return norm

    # Log and checkpoints

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to a log of training."""
        if self.craft_enabled and "loss" in logs:
            logs.update(self._craft_journal.flush())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint also what CRAFT needs to go on, which no exported model carries."""
        super().save_model(output_dir, _internal_call)
        if self.craft_enabled and _internal_call and output_dir is not None:  # without one it is pushed: an export
            sums = self._craft_journal.sums()  # of all ranks
            if self.args.should_save:
                save_checkpoint(Path(output_dir), self, sums)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            refuse_other_kind(Path(checkpoint), enabled=self.craft_enabled)
            if self.craft_enabled:
                load_checkpoint(Path(checkpoint), self)
        super()._load_optimizer_and_scheduler(checkpoint)
