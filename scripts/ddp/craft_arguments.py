"""The flags of train_craft.py: the model's, the data's, and every field of CRAFT and of TRL's SFTConfig."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pair_sources import PARALLEL, SOURCES, PairOptions, parse_sources
from parallel_text import language_pairs
from run_data import DataPlan

from craft.config import CRAFTSFTConfig
from params.errors import UserError

Preset = Literal["minimal", "balanced", "memory_efficient", "large_batch", "aggressive"]


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The model and its adapter."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str = field(metadata=_help("Hub id or directory of a causal language model."))
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto",
        metadata=_help("Of the weights; auto: bfloat16 for adapters on a GPU that computes in it, else float32."),
    )
    attn_implementation: str = field(default="sdpa", metadata=_help("eager, sdpa or flash."))
    use_lora: bool = field(default=True, metadata=_help("Train LoRA adapters; false trains every weight."))
    load_in_4bit: bool = field(
        default=False, metadata=_help("QLoRA: frozen weights in 4-bit NF4.", aliases=["--use_qlora"])
    )
    lora_r: int = field(default=16, metadata=_help("Rank of the adapters."))
    lora_alpha: int = field(default=32, metadata=_help("Scale of the adapters is lora_alpha / lora_r."))
    lora_dropout: float = field(default=0.05, metadata=_help("On the adapters' input."))
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata=_help("Names of the layers with adapters, or all-linear.")
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The rows."""

    _argument_group_name = "data"

    sft_data: str = field(
        metadata=_help(
            "SFT rows: a .jsonl, .csv, .tsv or .parquet file, a directory of them, or hub:OWNER/NAME[:CONFIG]; "
            "columns messages, or prompt and completion, or text."
        )
    )
    eval_data: str | None = field(
        default=None,
        metadata=_help("Held-out rows of the same kind; the checkpoint with their lowest loss is kept."),
    )
    sources: list[str] = field(
        default_factory=list,
        metadata=_help(
            f"Contrastive pairs: {', '.join(SOURCES)}, each from the hub or as NAME=PATH from local files with the "
            "same columns; any other NAME=PATH with columns text and text_tgt. None: prompt against answer "
            "(self_align)."
        ),
    )
    languages: list[str] = field(
        default_factory=list, metadata=_help("FLORES codes; flores and nllb give each with --pivot_language.")
    )
    language_pairs: list[str] = field(
        default_factory=list, metadata=_help("Instead of --languages, pairs such as eng_Latn-sin_Sinh.")
    )
    pivot_language: str = field(default="eng_Latn", metadata=_help("The anchors' language with --languages."))
    flores_split: str = field(default="dev", metadata=_help("dev or devtest. Keep devtest for evaluation."))
    nllb_min_laser_score: float = field(
        default=1.25,
        metadata=_help("Mined pairs with a lower LASER score are left out; higher is cleaner, and fewer."),
    )
    nllb_max_rows: int = field(
        default=1_000_000,
        metadata=_help("Lines that are read of each NLLB file, which begins with the best scores."),
    )
    hard_negatives: bool = field(
        default=False,
        metadata=_help(
            "Also contrast with the negatives of triplets, contradictions and non-duplicates; pairs without are left "
            "out."
        ),
    )
    max_contrastive_samples: int | None = field(
        default=None,
        metadata=_help("Pairs at most, sampled so that the shares of sources and languages stay; not given: all."),
    )


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What the script does."""

    _argument_group_name = "this run"

    craft_preset: Preset | None = field(
        default=None, metadata=_help("Values of the craft_* flags that are not given themselves.")
    )
    dry_run: bool = field(default=False, metadata=_help("Read the data, print what would be trained on and stop."))


@dataclass
class TrainingFlags(CRAFTSFTConfig):
    """TRL's SFTConfig with the craft_* fields."""

    _argument_group_name = "CRAFT and training"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A whole command line."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: TrainingFlags

    def data_plan(self) -> DataPlan:
        """What the rows are made from; UserError for flags that contradict each other or that nothing would read."""
        data = self.data
        sources = parse_sources(_words(data.sources))
        parallel = [name for name in PARALLEL if name in sources]
        _refuse_unread(data, sources)
        if data.hard_negatives and parallel:
            raise UserError(f"{' and '.join(parallel)} have no negatives: leave out --hard_negatives, or the source.")
        if data.max_contrastive_samples is not None and data.max_contrastive_samples < 1:
            raise UserError(f"--max_contrastive_samples {data.max_contrastive_samples} must be at least 1.")
        if data.nllb_max_rows < 1:
            raise UserError(f"--nllb_max_rows {data.nllb_max_rows} must be at least 1.")
        options = PairOptions(
            language_pairs=language_pairs(
                _words(data.languages), _words(data.language_pairs), pivot=data.pivot_language, wanted_by=parallel
            ),
            flores_split=data.flores_split,
            nllb_min_laser_score=data.nllb_min_laser_score,
            nllb_max_rows=data.nllb_max_rows,
            hard_negatives=data.hard_negatives,
        )
        return DataPlan(
            sft=data.sft_data,
            eval=data.eval_data,
            sources=sources,
            options=options,
            max_pairs=data.max_contrastive_samples,
            seed=self.training.seed,
        )


def _words(given: Sequence[str]) -> list[str]:
    """The words of a list that is written with spaces, commas or both."""
    return [word for words in given for word in words.split(",") if word]


def _refuse_unread(data: DataArguments, sources: Mapping[str, str | None]) -> None:
    """UserError for flags of a source that is not among the run's."""
    read_by = {
        "flores_split": ("flores",),
        "nllb_min_laser_score": ("nllb",),
        "nllb_max_rows": ("nllb",),
        "pivot_language": PARALLEL,
        "hard_negatives": tuple(sources),
        "max_contrastive_samples": tuple(sources),
    }
    defaults = {f.name: f.default for f in fields(DataArguments)}
    for name, readers in read_by.items():
        if getattr(data, name) != defaults[name] and not any(reader in sources for reader in readers):
            raise UserError(f"--{name} is for {' and '.join(readers) or 'pairs'}, and --sources names none of them.")
