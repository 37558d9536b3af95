"""Parameters of an encoder's run that are each right but cannot hold together, or that the run would ignore."""

from collections.abc import Iterator, Mapping
from typing import Any

from params.encoder import EncoderParams
from params.encoder_lowprecision import SECTIONS as LOW_PRECISION
from params.encoder_lowprecision import low_precision_problems, unread_low_precision
from params.encoder_schedule import schedule_problems
from params.yamlfile import Given

NOTHING: Mapping[str, Given] = {}

# Fields that are read under some values of another field only.
DEPENDS: Mapping[str, tuple[str, Any]] = {
    "trainer.torch_compile_backend": ("trainer.torch_compile", True),
    "trainer.torch_compile_dynamic": ("trainer.torch_compile", True),
    "trainer.enforce_full_packed_batches": ("datacollator.pack_sequences", True),
    "trainer.fused_linear_cross_entropy": ("trainer.masked_logits_only_loss", True),
    "optimizer.momentum": ("optimizer.name", "muon"),
    "dataset.shuffle_buffer_size": ("dataset.streaming", True),
}
# Fields that one of the two tasks reads; sections by their names.
PRETRAINING_ONLY = (
    "datacollator",
    *LOW_PRECISION,
    "trainer.masked_logits_only_loss",
    "trainer.fused_linear_cross_entropy",
    "trainer.enforce_full_packed_batches",
    "dataset.name",
    "dataset.config",
    "dataset.streaming",
    "dataset.shuffle_buffer_size",
    "dataset.num_workers",
    "dataset.pin_memory",
    "dataset.persistent_workers",
    "dataset.prefetch_factor",
    "dataset.pre_tokenize",
    "dataset.train_split",
    "dataset.long_documents",
    "dataset.max_bad_fraction",
    "dataset.text_column",
    "dataset.language_column",
)
CONTRASTIVE_ONLY = ("contrastive", "dataset.sources", "dataset.mixing_alpha")


def contradictions(params: EncoderParams, told: Mapping[str, Given] = NOTHING) -> list[str]:
    """One message per contradiction, each with its remedy; `told` are the fields that somebody gave."""
    return [*_model(params), *_data(params), *_trainer(params), *_contrastive(params), *_unread(params, told)]


def _model(params: EncoderParams) -> Iterator[str]:
    model = params.model
    if model.name is not None:
        return
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size {model.hidden_size} is no multiple of model.num_attention_heads "
            f"{model.num_attention_heads}: change one of them."
        )
    elif model.rope and model.hidden_size // model.num_attention_heads % 2:
        yield "rotary positions need an even hidden_size / num_attention_heads: change one, or set model.rope: false."
    longest = max(params.dataset.max_seq_length, params.contrastive.query_max_length or 0)
    if longest > model.max_position_embeddings:
        yield (
            f"documents of {longest} tokens do not fit model.max_position_embeddings {model.max_position_embeddings}: "
            "raise it, or lower dataset.max_seq_length."
        )


def _data(params: EncoderParams) -> Iterator[str]:
    data = params.dataset
    given = [
        name
        for name, value in (("name", data.name), ("path", data.path), ("sources", data.sources))
        if value and (name != "sources" or params.task == "contrastive")
    ]
    if not given:
        yield "there is no data: give dataset.path (files), or dataset.name (a hub data set)."
    elif len(given) > 1:
        yield f"dataset.{' and dataset.'.join(given)} are given: keep one of them."
    if data.config is not None and data.name is None and given:
        yield "dataset.config is of a hub data set (dataset.name): drop it."
    if data.eval_split and data.eval_samples:
        yield "dataset.eval_split and dataset.eval_samples are two ways to evaluate: keep one of them."
    if not data.num_workers and (data.persistent_workers or data.prefetch_factor):
        yield "dataset.persistent_workers and dataset.prefetch_factor need dataset.num_workers of at least 1."
    if data.pre_tokenize and data.streaming:
        yield "dataset.pre_tokenize reads all before the first step and dataset.streaming does not: drop one of them."


def _trainer(params: EncoderParams) -> Iterator[str]:
    trainer = params.trainer
    if len(params.optimizer.betas) != 2:
        yield f"optimizer.betas are two numbers, such as 0.9,0.95; got {len(params.optimizer.betas)}."
    if not trainer.masked_logits_only_loss and trainer.fused_linear_cross_entropy in ("torch", "liger"):
        yield (
            f"trainer.fused_linear_cross_entropy: {trainer.fused_linear_cross_entropy} is of the masked positions: "
            "set trainer.masked_logits_only_loss: true."
        )
    yield from schedule_problems(params.scheduler, trainer.max_steps)
    yield from low_precision_problems(params)


def _contrastive(params: EncoderParams) -> Iterator[str]:
    contrastive = params.contrastive
    if contrastive.simcse_share and not contrastive.simcse_dropout:
        yield "contrastive.simcse_share needs a contrastive.simcse_dropout above 0: two passes would be the same."


def _unread(params: EncoderParams, told: Mapping[str, Given]) -> Iterator[str]:
    """What somebody gave although nothing reads it; a value that equals the one in force does no harm."""
    defaults = EncoderParams()
    other = CONTRASTIVE_ONLY if params.task == "pretraining" else PRETRAINING_ONLY
    yield from unread_low_precision(params, told)
    if params.model.name is not None:
        # In a file they may stand: that of a run that went on from another has them all.
        asked = [key for key, given in told.items() if key.startswith("model.") and given.origin.startswith("--")]
        if own := [key for key in asked if key not in ("model.name", "model.attn_backend")]:
            yield f"{', '.join(own)}: {params.model.name} brings its own architecture. Drop it."
    for key in dict.fromkeys(".".join(key.split(".")[:2]) for key in told):  # an entry of a mapping stands for it
        section, _, name = key.partition(".")
        changed = name and getattr(getattr(params, section), name) != getattr(getattr(defaults, section), name)
        if changed and (section in other or key in other):
            yield f"{key} has no effect in {params.task}: drop it."
        elif changed and key in DEPENDS:
            switch, needed = DEPENDS[key]
            on, _, what = switch.partition(".")
            if getattr(getattr(params, on), what) != needed:
                yield f"{key} has no effect unless {switch} is {str(needed).lower()}: set that, or drop it."
