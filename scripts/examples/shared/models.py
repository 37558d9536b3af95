"""The model that an example trains: where it is, how a run is set up, and what it can do before and after."""

from collections.abc import Sequence
from typing import Any

import datasets
import sacrebleu
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from craft import CRAFTCollator, compute_contrastive_accuracy, get_backbone, pool_hidden_states, tokenize_pairs
from inft.models import load_spec
from inft.models.loading import find_source
from params.errors import UserError
from shared.options import Options
from shared.texts import Corpus, Translation

# Chinese and Cantonese are cut into words, Japanese into characters; other scripts at spaces and punctuation.
BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "char"}


def model_path(options: Options) -> str:
    """Return the directory or hub id of the model; SystemExit when there is none."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not options.model:
        torch.set_num_threads(1)  # more are slower on a model this small
    try:
        return find_source(load_spec("text"), options.model).name
    except UserError as error:
        raise SystemExit(str(error)) from error


def run_settings(options: Options) -> dict[str, Any]:
    """Return the training arguments that have nothing to do with CRAFT: length, rate, log, seed and device."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(options.output_dir / "run"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 20,
        "logging_steps": max(1, options.steps // 40),
        "seed": options.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "activation_checkpointing": bool(options.model),  # memory for time: not worth it for a tiny model
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@torch.no_grad()
def translate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, translations: Sequence[Translation]
) -> list[str]:
    """Return what the model writes, greedily, for the text of each translation."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(corpus.question(each.text), tokenize=False, add_generation_prompt=True)
        for each in translations
    ]
    longest = max(len(tokenizer(each.translation)["input_ids"]) for each in translations)
    written = []
    for start in range(0, len(prompts), 32):
        # The template writes the special tokens itself. Prompts end together, so that the answers begin together.
        batch = tokenizer(
            prompts[start : start + 32],
            add_special_tokens=False,
            return_token_type_ids=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        tokens_BT = model.generate(**batch, do_sample=False, max_new_tokens=longest + 8, use_cache=True)
        answers_BT = tokens_BT[:, batch["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    return [text.strip() for text in written]


def scores(written: Sequence[str], translations: Sequence[Translation], corpus: Corpus) -> dict[str, float]:
    """Return BLEU and chrF of a corpus (sacrebleu, 0 to 100), and the percentage of exact translations."""
    references = [each.translation for each in translations]
    bleu = sacrebleu.corpus_bleu(written, [references], tokenize=BLEU_TOKENIZERS.get(corpus.target, "13a"))
    exact = sum(one == other for one, other in zip(written, references, strict=True)) / len(references)
    return {
        "BLEU": bleu.score,
        "chrF": sacrebleu.corpus_chrf(written, [references]).score,
        "exact translations (%)": 100 * exact,
    }


@torch.no_grad()
def retrieval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, translations: Sequence[Translation]) -> float:
    """Return the percentage of texts whose nearest translation is their own: mean hidden states, cosine, no head."""
    model.eval()
    rows = tokenize_pairs(pairs(translations), tokenizer)
    collate = CRAFTCollator(pad_token_id=tokenizer.pad_token_id)
    sides: dict[str, list[torch.Tensor]] = {"": [], "_tgt": []}
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        for suffix, vectors in sides.items():
            ids_BT, mask_BT = (batch[name + suffix].to(model.device) for name in ("input_ids", "attention_mask"))
            hidden_BTH = get_backbone(model)(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            vectors.append(normalize(pool_hidden_states(hidden_BTH, mask_BT, "mean").float(), dim=-1))
    texts_BH, translations_BH = (torch.cat(vectors) for vectors in sides.values())
    return 100 * compute_contrastive_accuracy(texts_BH, translations_BH).item()


def pairs(translations: Sequence[Translation]) -> list[dict[str, str]]:
    """Return pairs for the contrast: the column of the text, and that of its positive."""
    return [{"text": each.text, "text_tgt": each.translation} for each in translations]
