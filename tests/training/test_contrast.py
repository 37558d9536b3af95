"""The contrastive side of a run up to the trainer: pairs, ids, arguments, and what the plan says of them."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.models.pairs import PairCollator
from inft.sample import Pair, Prompt, Sample
from inft.training.adapters import add_adapters
from inft.training.callbacks import TrainerLoggingCallback
from inft.training.contrast import contrast_figures, contrast_lines, plan_windows, read_contrast, shortage
from inft.training.methods import load_method
from inft.training.plan import Steps, count_steps, make_plan, show_plan
from inft.training.prepare import read_inputs
from inft.training.rows import PairRows, RowCollator
from inft.training.runlog import JsonlLogger, read_events
from inft.training.sft import sft_config
from params import CraftParams, TrainParams, UserError
from params.craft import CRAFT_PRESETS
from params.presets import lora_targets

Make = Callable[..., TrainParams]
QUIET = Console(quiet=True)
STEPS = Steps(per_epoch=7, total=21, warmup=5, effective_batch=6)


def sample(answer: str, language: str = "en", **meta: Any) -> Sample:
    return Sample(image=None, prompt=Prompt(instruction="Say."), answer=answer, language=language, meta=meta)


@pytest.fixture
def translated(tmp_path: Path) -> Path:
    """Twelve articles, each captioned in two languages."""
    rows = [
        {"title": f"article {i}", "content": "", "caption": f"{language} caption {i}", "language": language}
        for i in range(12)
        for language in ("en", "si")
    ]
    path = tmp_path / "translated"
    path.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "train.jsonl").write_text(text, encoding="utf-8")
    (path / "validation.jsonl").write_text(text.replace("article", "other"), encoding="utf-8")
    return path


def contrast_of(params: TrainParams, samples: list[Sample]) -> Any:
    spec = load_spec("text")
    processor = load_processor(spec, params.processor_name)
    collator = spec.collator(processor, max_length=params.basic.max_length)
    return read_contrast(params, samples, spec=spec, processor=processor, collator=collator, quarantine_file=None)


def test_training_batches_carry_ids_when_told_to_and_held_out_ones_never() -> None:
    def collator(samples: Any) -> dict[str, Any]:
        return {"answers": [one.answer for one in samples]}

    train, heldout = [sample("a"), sample("b")], [sample("c")]
    rows = RowCollator(train, heldout, collator, ids=[2**62, 9])
    assert rows([{"row": 1}, {"row": 0}])["craft_sample_ids"].tolist() == [9, 2**62]
    assert set(rows([{"row": 2}])) == {"answers", "rows"}
    assert set(RowCollator(train, heldout, collator)([{"row": 0}])) == {"answers"}
    with pytest.raises(AssertionError, match="an id for each"):
        RowCollator(train, heldout, collator, ids=[1])


def test_a_trainer_gets_craft_alpha_1_without_craft_and_every_field_with_it(make_params: Make) -> None:
    plain = sft_config(make_params(), output_dir=Path("x"), steps=STEPS, evaluate=True)
    assert plain.craft_alpha == 1.0
    craft = CraftParams(
        enabled=True,
        preset="minimal",
        pairs="translations",
        alpha=0.31,
        beta=0.32,
        beta_mode="auto",
        length_strategy="cap",
        contrastive_batch_size=3,
        temperature=0.34,
        learnable_temperature=True,
        projection_dim=35,
        projection_dropout=0.36,
        pooling="mean",
        symmetric=True,
        use_gradcache=True,
        gradcache_chunk_size=37,
        negative_strategy="queue",
        negative_queue_size=38,
        gradient_balancing="gradnorm",
        gradnorm_alpha=0.39,
        loss_scale_momentum=0.4,
        balancing_max_ratio=4.0,
        gradient_clip_per_task=True,
        gradient_clip_value=0.41,
    )
    config = sft_config(make_params(craft=craft), output_dir=Path("x"), steps=STEPS, evaluate=True)
    for name in set(CraftParams.__dataclass_fields__) - {"enabled", "preset", "pairs"}:
        assert getattr(craft, name) != getattr(CraftParams(), name)
        assert getattr(config, f"craft_{name}") == getattr(craft, name)
    different = {name for name, value in plain.to_dict().items() if config.to_dict()[name] != value}
    assert different
    assert all(name.startswith("craft_") for name in different)


@pytest.mark.parametrize(("pairs", "pooling"), [("", "last_token"), ("translations", "mean")])
def test_pairs_are_pooled_over_their_captions_and_rows_at_their_last_tokens(
    make_params: Make, pairs: str, pooling: str
) -> None:
    config = sft_config(
        make_params(craft=CraftParams(enabled=True, pairs=pairs)), output_dir=Path("x"), steps=STEPS, evaluate=True
    )
    assert config.craft_pooling == pooling


@pytest.mark.parametrize("name", CRAFT_PRESETS)
def test_every_preset_makes_arguments(make_params: Make, name: Any) -> None:
    craft = CraftParams(enabled=True, preset=name, **CRAFT_PRESETS[name])
    config = sft_config(make_params(craft=craft), output_dir=Path("x"), steps=STEPS, evaluate=True)
    assert config.craft_alpha == CRAFT_PRESETS[name]["alpha"]


def test_pairs_are_read_only_for_a_run_that_uses_them(make_params: Make, translated: Path) -> None:
    samples = [sample("a", "en", title="1"), sample("b", "si", title="1")]
    assert contrast_of(make_params(), samples) is None
    assert contrast_of(make_params(craft__enabled=True), samples) is None
    contrast = contrast_of(make_params(craft=CraftParams(enabled=True, pairs="translations")), samples)
    assert len(contrast.rows) == 2
    batch = contrast.rows.collate([contrast.rows[0], contrast.rows[1]])
    assert {"input_ids", "input_ids_tgt", "craft_pooling_mask", "craft_pooling_mask_tgt"} <= set(batch)
    assert isinstance(contrast.rows, PairRows)
    assert isinstance(contrast.rows.collator, PairCollator)


def test_a_pair_above_max_length_is_dropped_or_told_before_training(make_params: Make) -> None:
    samples = [
        sample("a", "en", title="1", where="line 1"),
        sample("b" * 300, "si", title="1", where="line 2"),
        sample("a", "en", title="2", where="line 3"),
        sample("b", "si", title="2", where="line 4"),
    ]
    craft = CraftParams(enabled=True, pairs="translations")
    with pytest.raises(UserError, match=r"2 pairs .*line 1 .*basic\.max_length=256.*sft\.over_length=drop"):
        contrast_of(make_params(craft=craft), samples)
    contrast = contrast_of(make_params(craft=craft, sft__over_length="drop"), samples)
    assert (len(contrast.rows), contrast.too_long) == (2, 2)


def test_steps_are_those_of_the_plan_when_contrastive_batches_lengthen_an_epoch(make_params: Make) -> None:
    params = make_params(
        sft__max_steps=None, sft__num_epochs=2.0, craft=CraftParams(enabled=True, pairs="translations")
    )
    assert count_steps(params, 40).per_epoch == 5  # 10 batches of 4, 2 a step
    windows = plan_windows(params, rows=40, pairs=24)
    steps = count_steps(params, 40, windows=windows)
    assert windows.windows == ((1, 1),) * 10
    assert (steps.per_epoch, steps.total, steps.effective_batch) == (10, 20, 4)
    halves = plan_windows(params, rows=40, pairs=24, processes=2)
    assert count_steps(params, 40, windows=halves, processes=2).per_epoch == 5


def test_numbers_that_the_length_strategy_refuses_are_the_users_error(make_params: Make) -> None:
    craft = CraftParams(enabled=True, pairs="translations", length_strategy="error")
    with pytest.raises(UserError, match=r"craft\.length_strategy='error'.*10 SFT batches and 6 contrastive"):
        plan_windows(make_params(craft=craft), rows=40, pairs=24)


@pytest.mark.parametrize(
    ("craft", "pairs", "processes", "words"),
    [
        (
            {},
            None,
            1,
            (
                "self-alignment",
                "n_sft 2, n_con 2 micro-batches a step, the same ones",
                "0.6 fine-tuning",
                "3 per anchor",
            ),
        ),
        ({"alpha": 0.75}, None, 2, ("0.75 fine-tuning to 0.25 contrast", "7 per anchor")),
        ({"negative_strategy": "queue", "negative_queue_size": 9}, None, 1, ("3 per anchor in the batch and up to 9",)),
        ({"negative_strategy": "queue", "negative_queue_size": 1000}, None, 1, ("up to 40 in the queue",)),
        ({"gradient_balancing": "loss_scale"}, None, 1, ("weighed further by loss_scale",)),
        (
            {"pairs": "translations", "contrastive_batch_size": 6},
            24,
            1,
            ("24 pairs (translations), 6 a micro-batch, oversample", "n_sft 1, n_con 1", "5 per anchor"),
        ),
        ({"pairs": "translations", "contrastive_batch_size": 64}, 24, 1, ("up to 23 per anchor",)),
        ({"pairs": "translations", "contrastive_batch_size": 6}, 2, 2, ("up to 1 per anchor",)),
    ],
)
def test_the_plan_names_kinds_weight_and_negatives(
    make_params: Make, craft: dict[str, Any], pairs: int | None, processes: int, words: tuple[str, ...]
) -> None:
    params = make_params(craft=CraftParams(enabled=True, **craft))
    plan = plan_windows(params, rows=40, pairs=pairs, processes=processes) if pairs is not None else None
    figures = contrast_figures(params, rows=40, pairs=pairs, plan=plan, processes=processes)
    assert figures is not None
    text = "\n".join(f"{what}: {how}" for what, how in contrast_lines(params, figures))
    assert all(word in text for word in words)


def test_steps_of_one_micro_batch_take_turns_and_the_plan_says_so(make_params: Make) -> None:
    craft = CraftParams(enabled=True, pairs="translations", length_strategy="auto_beta")
    params = make_params(craft=craft, sft__gradient_accumulation_steps=1)
    plan = plan_windows(params, rows=40, pairs=4)
    assert plan.windows == ((1, 0),) * 10 + ((0, 1),)
    figures = contrast_figures(params, rows=40, pairs=4, plan=plan)
    assert figures is not None
    assert (figures.n_sft, figures.n_con) == ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("strategy", "pairs", "words"),
    [
        ("auto_beta", 8, "8 fine-tuning batches of each epoch are left out"),
        ("auto_beta", 400, "90 contrastive batches of each epoch are left out"),
        ("auto_beta", 40, None),
        ("oversample", 8, None),
        ("cap", 8, None),
    ],
)
def test_batches_that_auto_beta_leaves_out_are_told_with_the_remedy(
    make_params: Make, strategy: Any, pairs: int, words: str | None
) -> None:
    params = make_params(craft=CraftParams(enabled=True, pairs="translations", length_strategy=strategy))
    figures = contrast_figures(params, rows=40, pairs=pairs, plan=plan_windows(params, rows=40, pairs=pairs))
    assert figures is not None
    told = shortage(params, figures)
    assert (told is None) == (words is None)
    assert words is None or (words in str(told) and "--set craft.length_strategy=oversample" in str(told))


@pytest.mark.parametrize(("anchors", "size"), [(None, 65536), (24, 24), (100_000, 65536)])
def test_the_queue_holds_no_more_than_there_are_pairs(make_params: Make, anchors: int | None, size: int) -> None:
    craft = CraftParams(enabled=True, pairs="translations", negative_strategy="queue")
    config = sft_config(make_params(craft=craft), output_dir=Path("x"), steps=STEPS, evaluate=True, anchors=anchors)
    assert config.craft_negative_queue_size == size


def test_the_whole_plan_of_a_run_on_translations(make_params: Make, translated: Path) -> None:
    params = make_params(data__data=str(translated), craft=CraftParams(enabled=True, pairs="translations"))
    method = load_method("sft")
    inputs = read_inputs(params, None, kind="captions", sides=method.sides, dry_run=True, console=QUIET)
    contrast = contrast_of(params, inputs.loaded.train)
    base = load_model(inputs.spec, params.model_name, basic=params.basic, quantization_config=None)
    model = add_adapters(base, inputs.spec, params.lora, lora_targets("text", "basic", params.lora), seed=0)
    plan = make_plan(
        params,
        inputs.loaded,
        0,
        model=model,
        spec=inputs.spec,
        collator=inputs.collator,
        method=method,
        contrast=contrast,
    )
    console = Console(record=True, width=140, file=StringIO())
    show_plan(console, params, plan)
    text = console.export_text()
    assert "24 pairs (translations), 4 a micro-batch, oversample" in text
    assert "n_sft 1, n_con 1 micro-batches a step" in text
    assert plan.steps.per_epoch == 6
    plain = make_plan(
        make_params(data__data=str(translated)),
        inputs.loaded,
        0,
        model=model,
        spec=inputs.spec,
        collator=inputs.collator,
        method=method,
    )
    assert plain.contrast is None


def test_the_figures_of_craft_reach_the_log_as_they_are(tmp_path: Path) -> None:
    figures = {
        "loss/craft_sft": 1.5,
        "loss/craft_contrast": 0.25,
        "loss/craft_total": 1.0,
        "metrics/craft_contrastive_accuracy": 0.75,
        "metrics/craft_representation_consistency": 0.5,
        "metrics/craft_temperature": 0.05,
    }
    with JsonlLogger(tmp_path / "log.jsonl") as log:
        callback = TrainerLoggingCallback(log)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        logs = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0, "num_tokens": 3.0, **figures}
        callback.on_log(args, TrainerState(), TrainerControl(), logs=logs)
    (event,) = read_events(tmp_path / "log.jsonl")
    assert event.items() >= figures.items()


def test_pairs_have_a_number_each_and_survive_a_worker(make_params: Make, tiny_text_dir: Path) -> None:
    spec = load_spec("text")
    collator = PairCollator(spec.collator(load_processor(spec, str(tiny_text_dir))))
    pairs = [Pair(anchor=sample(f"a{i}"), positive=sample(f"b{i}"), id=i + 1) for i in range(4)]
    rows = PairRows(pairs, collator)
    loader: Any = DataLoader(rows, batch_size=2, collate_fn=rows.collate, num_workers=1)
    assert [batch["craft_sample_ids"].tolist() for batch in loader] == [[1, 2], [3, 4]]
