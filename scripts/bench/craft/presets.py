"""What CRAFT does to captions: plain fine-tuning against each preset, several seeds, on the embedded Llama 3.2 Vision.

    python scripts/bench/craft/presets.py --out presets.jsonl [--task emoji10 --data ../shared/data/emoji10]
    python scripts/bench/craft/presets.py --out presets.jsonl --table

Each run is `inft train llama32 --demo` with the preset; a run that --out holds already is not repeated. Measured are
the held-out loss per token, captions of held-out images in the languages that are taught (exact, and chrF), captions of
drawn scenes in the seven languages that the base model knew (exact, and the loss per token: what is left of them), and
the contrastive accuracy of the last logging window.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sacrebleu
import torch

from inft.data.batches import load_samples
from inft.evaluation.demo import exact_shares
from inft.evaluation.generate import generate_captions
from inft.evaluation.loss import row_losses
from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from inft.training.runlog import read_events
from inft.training.stored import load_adapter, read_adapter
from params import MUNIChusLoadConfig, TrainParams
from params.craft import CRAFT_PRESETS
from params.resolve import load_params, resolve_train

MODEL = "llama32"
TAUGHT = "ur,si,yue"
KNOWN = ("ar", "en", "fr", "hi", "id", "ja", "zh")  # languages of the embedded base model
PER_LANGUAGE = 40  # held-out rows that are captioned in each language
PAIRS = ["--craft-pairs", "translations", "--set", "sft.gradient_accumulation_steps=2"]
VARIANTS: Mapping[str, list[str]] = {
    "base model": [],  # not trained
    "plain": [],
    **{name: ["--craft-preset", name] for name in CRAFT_PRESETS},
    "alpha .6, no balancing": ["--craft"],
    # Two micro-batches a step, one of each kind: as many SFT rows are seen as without pairs.
    "alpha .6, translations": [*PAIRS, "--craft"],
    "balanced, translations": [*PAIRS, "--craft-preset", "balanced"],
}
FIGURES = ("held-out loss", "exact", "chrF", "known exact", "known loss", "accuracy")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="one JSON line per run is appended to this file")
    options.add_argument("--task", default="demo", help="name of the task in --out")
    options.add_argument("--data", default=None, help="data set; none: the drawn scenes")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options.add_argument("--table", action="store_true", help="print the table of --out and run nothing")
    args = options.parse_args()
    if args.table:
        print("\n".join(table(read(args.out))))
        return
    torch.set_num_threads(1)
    done = {(run["task"], run["variant"], run["seed"]) for run in read(args.out)}
    for seed in args.seeds:
        for variant in args.variants:
            if (args.task, variant, seed) in done:
                continue
            figures = measure(variant, seed=seed, data=args.data)
            line = json.dumps({"task": args.task, "variant": variant, "seed": seed, **figures})
            with args.out.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
            print(line, flush=True)


def measure(variant: str, *, seed: int, data: str | None) -> dict[str, float | None]:
    """Train one adapter and score it; the base model is scored as it is."""
    if variant == "base model":
        flags = {} if data is None else {"data": data, "languages": TAUGHT, "data.context": "none"}
        return {
            **score(resolve_train(MODEL, demo=True, flags=flags), adapted=False),
            "held-out loss": None,
            "accuracy": None,
        }
    with tempfile.TemporaryDirectory() as folder:
        source = [] if data is None else ["--data", data, "--languages", TAUGHT, "--set", "data.context=none"]
        command = [sys.executable, "-m", "inft", "train", MODEL, "--demo", "--seed", str(seed), *VARIANTS[variant]]
        where = ["--output-dir", f"{folder}/run", "--set", f"basic.logs_dir={folder}", "--task", "run"]
        subprocess.run([*command, *source, *where], check=True, capture_output=True)
        params = load_params(Path(folder) / "run" / "params.yaml")
        events = list(read_events(Path(folder) / "trainer_run.jsonl"))
        return {**score(params), **logged(events)}


def logged(events: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    last = [event for event in events if event["event"] == "log"][-1]
    best = min(event["loss"] for event in events if event["event"] == "eval")
    return {"held-out loss": best, "accuracy": last.get("metrics/craft_contrastive_accuracy")}


def score(params: TrainParams, *, adapted: bool = True) -> dict[str, float]:
    spec = load_spec(MODEL)
    collator = spec.collator(load_processor(spec, ""), max_length=params.basic.max_length)
    model: Any = load_model(spec, "", basic=params.basic)
    if adapted:
        model = load_adapter(model, read_adapter(Path(params.best_model_dir)), spec=spec)
    drawn = params.data.data == "sample"
    rows = replace(
        params.data, split="test" if drawn else "validation", eval_fraction=0.0, max_rows_per_lang=PER_LANGUAGE
    )
    taught = load_samples(rows, quarantine_file=None, with_images=True).train
    scenes = MUNIChusLoadConfig(
        data="sample", split="test", languages=KNOWN, eval_fraction=0.0, max_rows_per_lang=PER_LANGUAGE, context="none"
    )
    known = load_samples(scenes, quarantine_file=None, with_images=True).train
    captions = generate_captions(model, collator, taught, max_new_tokens=96, batch_size=PER_LANGUAGE)
    shares = exact_shares(taught, captions).values()
    losses = row_losses(model, collator, known, batch_size=PER_LANGUAGE)
    remembered = generate_captions(model, collator, known, max_new_tokens=96, batch_size=PER_LANGUAGE)
    return {
        "exact": sum(shares) / len(shares),
        "chrF": sacrebleu.corpus_chrf(captions, [[sample.answer for sample in taught]]).score,
        "known exact": sum(exact_shares(known, remembered).values()) / len(KNOWN),
        "known loss": sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses),
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: the mean over the seeds, and the lowest and highest of them."""
    yield f"| task | variant | seeds | {' | '.join(FIGURES)} |"
    yield "|---|---|---|" + "---|" * len(FIGURES)
    for task in dict.fromkeys(run["task"] for run in runs):
        for variant in VARIANTS:
            mine = [run for run in runs if (run["task"], run["variant"]) == (task, variant)]
            if mine:
                cells = [cell(name, [run[name] for run in mine if run[name] is not None]) for name in FIGURES]
                yield f"| {task} | {variant} | {len(mine)} | {' | '.join(cells)} |"


def cell(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""

    def shown(value: float) -> str:
        return f"{value:.0%}" if "exact" in name else f"{value:.1f}" if name == "chrF" else f"{value:.2f}"

    low, high = shown(min(values)), shown(max(values))
    return shown(statistics.mean(values)) + (f" ({low} to {high})" if low != high else "")


if __name__ == "__main__":
    main()
