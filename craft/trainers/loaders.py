"""The batches of a CRAFT run: one loader over both data sets, or the user's own loaders mixed."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from craft.accumulator import compute_batch_distribution
from craft.collate import CRAFTCollator
from craft.data import CRAFTMixedDataLoader, MixedCollator, MixedRows, may_pack
from craft.distributed import rank, world_size
from craft.pairs import has_pairs, tokenize_pairs
from craft.sampler import TaskBatchSampler, mixed_seed
from craft.spans import NEEDS_SPANS, assistant_mask_of
from craft.trainers.columns import KeepingCollator, own_columns
from craft.trainers.placing import placed
from craft.trainers.plan import CRAFTPlan
from craft.trainers.window import CONTRASTIVE, SFT

LOOKED_AT = 2  # batches in which self_align must find an answer before training


class Loaders:
    """Builds the train loader of a CRAFT trainer and knows what its optimizer steps hold."""

    def __init__(
        self,
        trainer: Any,
        *,
        collator: Callable[[Any], Any] | None,
        sft_loader: Any,
        contrastive_loader: Any,
        factory: Callable[[Any], Any] | None,
    ) -> None:
        if factory is not None and (sft_loader is not None or contrastive_loader is not None):
            raise ValueError(
                "pass either craft_loader_factory or craft_sft_loader and craft_contrastive_loader, not both."
            )
        self.trainer = trainer
        self.args = trainer.craft_args
        self.bundle = trainer.craft_bundle
        self.shares: Mapping[str, float] = {SFT: 1.0, CONTRASTIVE: 1.0}  # of the optimizer steps that hold the kind
        self._mixed: CRAFTMixedDataLoader | None = None
        self._given = (sft_loader, contrastive_loader)
        self._refuse_unread(contrastive_loader, "craft_contrastive_loader")
        self._tell_unread()
        self._factory = factory
        self._collator = collator
        self._own_pad_token()
        self._pairs = self._prepared_pairs()
        self.queue_rows = self._queue_rows()
        self._refuse_packing()
        self._keep_columns()

    # Data

    def _refuse_unread(self, given: Any, name: str) -> None:
        """ValueError for what is given for pairs although there are none."""
        if given is not None and self.bundle.strategy == "self_align":
            raise ValueError(
                f"strategy='self_align' takes its pairs from the SFT rows and would not read {name}. Leave it out, or "
                "pass the pairs: craft_bundle=make_craft_datasets(rows, contrastive_dataset=pairs)."
            )

    def _tell_unread(self) -> None:
        """Warn of what a user set for pairs although there are none; presets set neither of these."""
        unread = [
            f"{name}={value!r}"
            for name, value, default in (
                ("craft_contrastive_batch_size", self.args.craft_contrastive_batch_size, (None,)),
                ("craft_length_strategy", self.args.craft_length_strategy, ("oversample", "auto_beta")),
            )
            if value not in default
        ]
        if unread and self.bundle.strategy == "self_align":
            warnings.warn(
                f"{', '.join(unread)} is about pairs, and strategy='self_align' has none: each row is its own pair. "
                "Leave it out, or pass contrastive_dataset.",
                stacklevel=4,
            )

    def _own_pad_token(self) -> None:
        """Tell a plain CRAFTCollator() what the model is padded with."""
        for collator in (getattr(self.trainer, "data_collator", None), self._collator):
            if isinstance(collator, CRAFTCollator) and collator.pad_token_id is None:
                collator.pad_token_id = self._pad_token_id

    @property
    def _tokenizer(self) -> Any:
        processing_class = getattr(self.trainer, "processing_class", None)
        return getattr(processing_class, "tokenizer", processing_class)

    @property
    def _pad_token_id(self) -> int | None:
        return getattr(self._tokenizer, "pad_token_id", None)

    def _prepared_pairs(self) -> Any:
        """The contrastive rows as tokens; what has a collator or loader of its own is left to it as it is."""
        pairs = self.bundle.contrastive_dataset
        own_collator = self._collator is not None and not isinstance(self._collator, CRAFTCollator)
        own_stream = isinstance(pairs, torch.utils.data.IterableDataset) and not isinstance(pairs, IterableDataset)
        if pairs is None or own_collator or own_stream or self._given[1] is not None:
            return pairs
        names = {
            "text_field": getattr(self.trainer.args, "dataset_text_field", "text"),
            "contrastive_keys": self.args.craft_contrastive_keys,
        }
        if self._factory is not None and not has_pairs(pairs, **names):
            return pairs
        max_length = getattr(self.trainer.args, "max_length", None)
        return tokenize_pairs(pairs, self._tokenizer, max_length=max_length, **names)

    def _refuse_packing(self) -> None:
        """ValueError where several texts may stand in one row: their vectors would be mixed."""
        if self.args.craft_allow_packed_contrastive:
            return
        own, args = getattr(self.trainer, "data_collator", None), self.trainer.args
        collator = own if self.bundle.strategy == "self_align" else self._collator
        packs = getattr(args, "packing", False) or getattr(args, "padding_free", False)
        if may_pack(collator) or (packs and self.bundle.strategy == "self_align"):
            raise ValueError(
                f"{type(collator).__name__} joins several texts in one row, so that there are no pairs to contrast. "
                "Set packing=False and padding_free=False, pass a craft_collator that does not pack, or say that it is "
                "safe with craft_allow_packed_contrastive=True."
            )

    def own_columns(self) -> list[str]:
        """Columns of the SFT rows that are read here and that the trainer would drop as unknown to the model."""
        names = getattr(getattr(self.trainer, "train_dataset", None), "column_names", None) or ()
        wanted = self.bundle.strategy == "self_align" and getattr(self.trainer.args, "remove_unused_columns", False)
        return [name for name in own_columns(self.args) if wanted and name in names]

    def _keep_columns(self) -> None:
        """Bring such columns into the batches, whatever the trainer's collator makes of the others."""
        if columns := self.own_columns():
            self.trainer.data_collator = KeepingCollator(
                self.trainer.data_collator,
                columns,
                label_key=self.args.craft_contrastive_keys["anchor_labels"],
                keep_end=getattr(self.trainer.args, "truncation_mode", "keep_start") == "keep_end",
            )

    def contrastive_rows(self) -> int | None:
        """Rows that pairs are made of; None when the data set does not say."""
        rows = self._pairs if self._pairs is not None else getattr(self.trainer, "train_dataset", None)
        return len(rows) if isinstance(rows, Sized) else None

    def _queue_rows(self) -> int:
        """The queue's capacity: a queue larger than the data set would hold stale copies of every row."""
        wanted, rows = self.args.craft_negative_queue_size, self.contrastive_rows()
        if self.args.craft_negative_strategy != "queue" or rows is None or wanted <= rows:
            return int(wanted)
        warnings.warn(
            f"craft_negative_queue_size={wanted:,} is more than the {rows:,} contrastive rows: the queue holds "
            f"{rows:,}, each row once. Set it to at most that, or use craft_negative_strategy='in_batch'.",
            stacklevel=2,
        )
        return rows

    # Loaders

    def build(self, own: Callable[[], DataLoader]) -> Any:
        """The train loader; ``own`` makes the one that the trainer would have without CRAFT."""
        self._refuse_no_rows()
        sft_loader, contrastive_loader = self._given_loaders()
        if self.bundle.strategy == "self_align":
            loader = own() if sft_loader is None else self._placed(sft_loader)
            self._check_answers(loader)
            return loader
        if sft_loader is None and contrastive_loader is None and self._sized:
            return self._one_loader()
        sft = own() if sft_loader is None else self._placed(sft_loader)
        mixed = CRAFTMixedDataLoader(
            sft,
            self._placed(contrastive_loader if contrastive_loader is not None else self._contrastive_loader()),
            seed=self._seed,
            **self._proportions,
        )
        self.shares = {SFT: mixed.sft_share, CONTRASTIVE: mixed.contrastive_share}
        self._mixed = mixed
        self.__dict__.pop("_figures", None)  # what was known of the loaders before they were there
        return mixed

    def _refuse_no_rows(self) -> None:
        rows = getattr(self.trainer, "train_dataset", None)
        if isinstance(rows, Sized) and not len(rows):
            raise ValueError(
                "no SFT row is left to train on: every one was empty, or lost its labels when it was cut. Raise "
                "max_length, or look at the labels."
            )

    def begin_epoch(self, global_step: int) -> None:
        """Tell a mixed loader which epoch comes; one without a known length counts for itself."""
        if self._mixed is not None and self._mixed.plan is not None:
            self._mixed.set_epoch(global_step // self._mixed.plan.steps)

    def _given_loaders(self) -> tuple[Any, Any]:
        if self._factory is None:
            return self._given
        made = self._factory(self.trainer)
        if not isinstance(made, tuple) or len(made) != 2 or made[0] is None:
            raise ValueError(
                "craft_loader_factory must return (sft_loader, contrastive_loader), the second None for the default."
            )
        self._refuse_unread(made[1], "the second loader of craft_loader_factory")
        return made

    def _one_loader(self) -> DataLoader:
        """One DataLoader over both data sets, whose sampler knows ranks, seeds and kinds."""
        trainer, args = self.trainer, self.trainer.args
        rows, collator = trainer.train_dataset, trainer.data_collator
        if isinstance(rows, Dataset):
            rows = trainer._remove_unused_columns(rows, description="Training")
        else:
            collator = trainer._get_collator_with_removed_columns(collator, description="Training")
        sampler = self._sampler
        self.shares = {SFT: sampler.plan.sft_share, CONTRASTIVE: sampler.plan.contrastive_share}
        loader = DataLoader(
            MixedRows(rows, self._pairs),
            batch_sampler=sampler,
            collate_fn=MixedCollator(collator, self._pair_collator),
            **self._workers(),
        )
        return prepare_data_loader(  # the sampler has divided the batches among the ranks already
            loader, device=args.device, num_processes=1, process_index=0, put_on_device=True
        )

    @cached_property
    def _sampler(self) -> TaskBatchSampler:
        args, rows = self.trainer.args, self.trainer.train_dataset

        def order(epoch: int) -> Sequence[int]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed_seed(self._seed, epoch))
                sampler: Iterable[int] | None = self.trainer._get_train_sampler(rows)
                return list(range(len(rows)) if sampler is None else sampler)

        return TaskBatchSampler(
            order,
            len(self._pairs),
            sft_rows=len(rows),
            sft_batch_size=self.trainer._train_batch_size,
            contrastive_batch_size=self._contrastive_batch_size,
            seed=self._seed,
            rank=rank(),
            world_size=world_size(),
            drop_last=args.dataloader_drop_last,
            **self._proportions,
        )

    def _contrastive_loader(self) -> DataLoader:
        shuffle = not isinstance(self._pairs, IterableDataset | torch.utils.data.IterableDataset)
        return DataLoader(
            self._pairs,
            batch_size=self._contrastive_batch_size,
            shuffle=shuffle,
            drop_last=self.trainer.args.dataloader_drop_last,
            collate_fn=self._pair_collator,
            **self._workers(),
        )

    def _placed(self, loader: Any) -> Any:
        return placed(loader, getattr(self.trainer, "accelerator", None))

    def _workers(self) -> dict[str, Any]:
        args = self.trainer.args
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        }

    @property
    def _pair_collator(self) -> Callable[[Any], Any]:
        if self._collator is not None:
            return self._collator
        return CRAFTCollator(pad_token_id=self._pad_token_id, contrastive_keys=self.args.craft_contrastive_keys)

    @property
    def _contrastive_batch_size(self) -> int:
        return int(self.args.craft_contrastive_batch_size or self.trainer.args.per_device_train_batch_size)

    @property
    def _proportions(self) -> dict[str, Any]:
        return {
            "beta": self.args.craft_beta,
            "gradient_accumulation_steps": self.trainer.args.gradient_accumulation_steps,
            "beta_mode": self.args.craft_beta_mode,
            "length_strategy": self.args.craft_length_strategy,
        }

    @property
    def _seed(self) -> int:
        args = self.trainer.args
        return int(args.seed if args.data_seed is None else args.data_seed)

    @property
    def _sized(self) -> bool:
        return all(
            hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
            for rows in (self.trainer.train_dataset, self._pairs)
        )

    # Checks and figures

    def _check_answers(self, loader: Any) -> None:
        """ValueError when no answer is marked in the first batches of self_align."""
        if self.args.craft_assistant_mask_strategy == "none":
            return
        keys = self.args.craft_contrastive_keys
        seen: list[Mapping[str, Any]] = []
        batches = getattr(loader, "base_dataloader", loader)
        with torch.random.fork_rng(devices=[]):  # looking must not change what is drawn
            for batch in islice(batches if isinstance(batches, Iterable) else (), LOOKED_AT):
                if not isinstance(batch, Mapping):
                    continue
                seen.append(batch)
                mask_BT = assistant_mask_of(batch, self.args.craft_assistant_mask_key)
                labels_BT = batch.get(keys["anchor_labels"])
                if (mask_BT is not None and mask_BT.any()) or (labels_BT is not None and (labels_BT != -100).any()):
                    return
        if not seen:
            raise ValueError(
                "CRAFT strategy='self_align' requires a readable SFT dataloader to validate assistant spans: it gave "
                "no batch that is a mapping. Check that the data set is not empty and what its collator returns."
            )
        raise ValueError(
            f"{NEEDS_SPANS} (key={self.args.craft_assistant_mask_key!r}) in the SFT batches. The first {len(seen)} "
            f"have {', '.join(map(str, seen[0]))}, and no token in them is marked: check truncation (max_length) and "
            "the mask."
        )

    @cached_property
    def _figures(self) -> tuple[int, int, int | None]:
        """SFT and contrastive micro-batches of a full step, and steps an epoch where they are known."""
        accumulation = self.trainer.args.gradient_accumulation_steps
        if self.bundle.strategy == "self_align":
            return accumulation, accumulation, None
        if self._mixed is not None:
            known = self._mixed.plan
        else:
            own = self._given == (None, None) and self._factory is None and self._sized
            known = self._sampler.plan if own else None
        if known is None:
            return *compute_batch_distribution(self.args.craft_beta, accumulation), None
        self.shares = {SFT: known.sft_share, CONTRASTIVE: known.contrastive_share}
        return *known.windows[0], known.steps

    def plan(self) -> CRAFTPlan:
        """The figures of a full optimizer step; what a user's own loader yields is taken to be as configured."""
        n_sft, n_contrastive, steps = self._figures
        return CRAFTPlan(
            strategy=self.bundle.strategy,
            n_sft=n_sft,
            n_contrastive=n_contrastive,
            shares=(self.shares[SFT], self.shares[CONTRASTIVE]),
            effective_alpha=self.args.craft_alpha,
            balancing=self.args.craft_gradient_balancing,
            negatives_per_anchor=self._in_batch() + self._hard() + self._queued,
            queue_size=self._queued,
            steps_per_epoch=steps,
        )

    @property
    def _queued(self) -> int:
        return self.queue_rows if self.args.craft_negative_strategy == "queue" else 0

    def _in_batch(self) -> int:
        """Other rows that an anchor meets in a full micro-batch of all ranks."""
        return 0 if self.args.craft_negative_strategy == "none" else max(self._together() - 1, 0)

    def _hard(self) -> int:
        """Hard negatives that come with a full micro-batch of pairs of all ranks."""
        names = getattr(self._pairs, "column_names", None) or ()
        return sum(name.startswith("input_ids_neg") for name in names) * self._together()

    def _together(self) -> int:
        """Rows of a full contrastive micro-batch of all ranks."""
        own = self.trainer.args.per_device_train_batch_size
        size = own if self.bundle.strategy == "self_align" else self._contrastive_batch_size
        given = self._given[0 if self.bundle.strategy == "self_align" else 1]
        together = (getattr(given, "batch_size", None) or size) * world_size()
        rows = self.contrastive_rows() if given is None else None
        return together if rows is None else min(together, rows)
