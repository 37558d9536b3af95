"""Captions per second and the price of scoring: `inft evaluate` against a plain loop of model.generate.

    python scripts/bench/generation.py [--model llama32] [--rows 64] [--batch-size 16]

Both caption the same drawn scenes in ten languages with the embedded model, greedily, to the same captions, which is
checked first. The loop prompts one row at a time and lets transformers do the rest, as a script of ten lines would.
The second table is the time that scores with intervals take for 10,000 rows.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import interleave, machine, parser, report
from rich.console import Console

from inft.data.sample import scenes
from inft.data.scene_captions import caption
from inft.evaluation.metrics.scores import score_captions
from inft.evaluation.predict import Captioning, predict
from inft.evaluation.rows import EvalRow, load_rows
from inft.models import load_spec
from inft.models.loading import load_model, load_processor
from params import BasicParams, MUNIChusLoadConfig
from params.presets import SAMPLE_CONTEXT

LIMIT = 0.6  # of the time of the loop with batch 1
SCORED_ROWS = 10_000
MAX_NEW_TOKENS = 32
LANGUAGES = tuple(MUNIChusLoadConfig().language_names)


def main() -> None:
    options = parser(__doc__ or "", repetitions=5)
    options.add_argument("--model", default="llama32", choices=["llama32", "aya", "text"])
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--batch-size", type=int, default=16)
    args = options.parse_args()
    torch.set_num_threads(1)
    spec = load_spec(args.model)
    collator = spec.collator(load_processor(spec, ""), max_length=512)
    model = load_model(spec, "", basic=BasicParams(dtype="float32"))
    config = MUNIChusLoadConfig(data="sample", split="test", context=SAMPLE_CONTEXT[args.model])
    rows = load_rows(config, limit=args.rows, with_images=spec.takes_images).rows
    captioning = Captioning(model=model, collator=collator, max_new_tokens=MAX_NEW_TOKENS, batch_size=args.batch_size)

    def batched() -> list[str]:
        with tempfile.TemporaryDirectory() as directory:
            return [p.generated_caption for p in predict(captioning, rows, Path(directory) / "predictions.jsonl")]

    def one_by_one() -> list[str]:
        return [plain(model, collator, row) for row in rows]

    assert batched() == one_by_one(), "both write the same captions"
    seconds = interleave({"inft evaluate": batched, "loop, batch 1": one_by_one}, repetitions=args.repetitions)
    title = f"{args.rows} captions, embedded {args.model}, batch {args.batch_size}"
    report(title, seconds, ours="inft evaluate", peer="loop, batch 1", limit=LIMIT, out=args.out, images=args.rows)
    scoring()


@torch.no_grad()
def plain(model: Any, collator: Any, row: EvalRow) -> str:
    prompt = collator.prompts([row.sample])
    end = [collator.end_token_id]
    written = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end)
    text = collator.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(collator.control.sub("", text).strip())


def scoring() -> None:
    """Time the metrics of 10,000 captions in ten languages, intervals included, and print it."""
    shown = [scene.attributes for scene in scenes("train", rounds=4)]
    count = SCORED_ROWS // len(LANGUAGES)
    rows = [
        (caption(shown[(i + i % 3) % len(shown)], language), [caption(shown[i % len(shown)], language)], language)
        for language in LANGUAGES
        for i in range(count)
    ]
    captions, references, languages = zip(*rows, strict=True)
    score_captions(captions[:: count // 4], references[:: count // 4], languages[:: count // 4])
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        score_captions(captions, references, languages)
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken)
    Console().print(
        f"six metrics of {len(rows):,} rows in {len(LANGUAGES)} languages with 1,000 resamples: {seconds:.1f} s"
    )
    Console().print(machine())


if __name__ == "__main__":
    main()
