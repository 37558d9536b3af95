"""Small run and evaluation directories as `inft train` and `inft evaluate` leave them, without a model."""

import json
from dataclasses import replace
from pathlib import Path

from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.evaluation.metrics import ALL, Score
from inft.evaluation.records import Drift, Evaluation, Forgetting, Prediction, scores_to_json, to_json
from inft.training.runlog import JsonlLogger
from inft.training.storage import file_sha256
from params.munichus import LANGUAGE_NAMES
from params.resolve import dump_yaml, resolve_train

LANGUAGES = tuple(GRAMMARS)
METRICS = ("bleu4", "chrf", "cider", "exact", "length_ratio", "wrong_script")


def write_run(output, *, model="llama32", logs=None, craft=False, lr=3e-3, best=True, weights=b"", steps=(10, 20, 30)):
    """An output directory with params.yaml, an adapter with best.json, and a log of three steps."""
    flags = {"output_dir": str(output), "craft": craft or None}
    overrides = [f"sft.lr={lr}", f"basic.logs_dir={logs}"] if logs else [f"sft.lr={lr}"]
    params = resolve_train(model, demo=True, flags=flags, overrides=overrides)
    output.mkdir(parents=True)
    (output / "params.yaml").write_text(dump_yaml(params), encoding="utf-8")
    if best:
        write_adapter(output / "best", model=model, step=steps[-1], name=f"{output}{weights}")
    if logs:
        write_log(Path(logs) / f"trainer_{params.task}.jsonl", output, steps=steps, craft=craft)
    return output


def write_adapter(directory, *, model="llama32", step=30, name="a"):
    """Files of a stored adapter; another name gives other weights."""
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    seed = sum(name.encode())
    save_file({"layer.lora_A.weight": np.full((4, 8), seed, np.float32)}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": ""}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    files = {path.name: file_sha256(path) for path in directory.iterdir()}
    record = {"step": step, "metric": "eval_loss", "value": 0.5, "why": "", "model": model, "base_model": ""}
    record |= {"base_config_sha256": "", "params": {"task": "x"}, "files": files}
    (directory / "best.json").write_text(json.dumps(record), encoding="utf-8")


def write_log(path, output, *, steps=(10, 20, 30), craft=False, loss=2.0, captions=True):
    """A run as fit() logs it."""
    with JsonlLogger(path) as log:
        common = {"versions": {}, "hardware": {}, "data": {"source": "sample", "rows_per_language": {"ur": [40, 8]}}}
        log.event("run_start", task="t", params={"output_dir": str(output)}, resumed_from_step=None, **common)
        for step in steps:
            more = {"loss/craft_sft": 1 / step, "loss/craft_contrast": 2 / step} if craft else {}
            speed = {"learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_second": 100.0}
            log.event("log", step=step, epoch=0.1, loss=loss / step, **speed, **more)
            more = {"captions": {"chrf": 10.0 + step, "cider": 20.0}} if captions else {}
            log.event("eval", step=step, epoch=0.1, loss=3 / step, tokens=5, languages={}, seconds=0.2, **more)
        log.event("best", step=steps[-1], metric="eval_loss", value=0.5, path="x")
        ends = {"best_step": 30, "best_metric": 0.1, "peak_rss_bytes": 1, "peak_gpu_bytes": None}
        log.event("run_end", status="finished", step=steps[-1], seconds=75.0, **ends)
    return path


def rows_of(*, per_language=1, languages=LANGUAGES):
    """Predictions of drawn scenes in ten languages, every one as its reference."""
    return [
        Prediction(
            row=f"{language}{number}",
            lang=language,
            generated_caption=caption(scene.attributes, language),
            reference_caption=caption(scene.attributes, language),
            title=scene.name,
            image=f"gallery/{language}{number}.png",
        )
        for language in languages
        for number, scene in zip(range(per_language), scenes("test", rounds=1), strict=False)
    ]


def write_evaluation(directory, predictions, *, run=None, value=50.0, finished=True, images=True, **changes):
    """An evaluation of a run's adapter, or of the base, with the same value for every metric."""
    languages = tuple(dict.fromkeys(prediction.lang for prediction in predictions))
    record = Evaluation(
        model="llama32",
        base_model="",
        adapter=str(run / "best") if run else None,
        adapter_sha256=file_sha256(run / "best" / "adapter_model.safetensors") if run else None,
        step=30 if run else None,
        task="x",
        setting="zero-shot",
        data="sample",
        split="test",
        fingerprint="f1",
        languages=languages,
        language_names={language: LANGUAGE_NAMES.get(language, language) for language in languages},
        rows=len(predictions),
        without_reference=0,
        generation={"max_new_tokens": 96},
    )
    (directory / "gallery").mkdir(parents=True)
    (directory / "evaluation.json").write_text(to_json(replace(record, **changes)), encoding="utf-8")
    lines = [json.dumps(vars(prediction) | {"references": list(prediction.references)}) for prediction in predictions]
    (directory / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if finished:
        scores = scores_to_json(scores_of(languages, value))
        (directory / "scores.json").write_text(scores, encoding="utf-8")
    for scene, prediction in zip(scenes("test", rounds=2), predictions if images else (), strict=False):
        scene.image.load().save(directory / prediction.image)
    return directory


def scores_of(languages, value, *, spread=2.0):
    """The same score for every metric of every language."""
    return {
        language: {name: Score(value, value - spread, value + spread) for name in METRICS}
        for language in [*languages, ALL]
    }


def write_forgetting(directory, *, languages=("en", "fr", "ur"), base=None, adapter=None):
    """What was forgotten: en lost, fr kept, ur never known, unless told otherwise."""
    base = base or {"en": 99.1, "fr": 90.0, "ur": 3.0}
    adapter = adapter or {"en": 2.3, "fr": 89.5, "ur": 80.0}

    def scores(values, spread):
        return {
            language: {name: Score(value, value - spread, value + spread) for name in METRICS}
            for language, value in {**values, ALL: 50.0}.items()
        }

    difference = {language: adapter[language] - base[language] for language in languages}
    loss = {language: {"base": Score(1, 1, 1), "adapter_text_only": Score(2.5, 2.4, 2.6)} for language in languages}
    found = Forgetting(
        data="sample",
        split="test",
        rows=30,
        fingerprint="f" * 64,
        loss_rows=30,
        language_names=LANGUAGE_NAMES,
        could_do=("en", "fr"),
        base=scores(base, 0.5),
        adapter=scores(adapter, 0.5),
        difference=scores(difference, 0.75),
        base_shuffled=scores(dict.fromkeys(languages, 3.0), 0.5),
        adapter_shuffled=scores(dict.fromkeys(languages, 3.0), 0.5),
        loss=loss,
    )
    (directory / "forgetting.json").write_text(to_json(found), encoding="utf-8")


def write_drift(directory):
    """Three layers."""
    found = Drift(
        data="sample",
        split="test",
        rows=8,
        fingerprint="f",
        layers=(0, 1, 2),
        cka=(1.0, 0.9, 0.7),
        cosine=(1.0, 0.8, 0.6),
    )
    (directory / "drift.json").write_text(to_json(found), encoding="utf-8")
