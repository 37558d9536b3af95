"""One byte-level BPE for all tiny models, dressed with the special tokens of each released family."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from inft.data.sample import combinations, keywords
from inft.data.scene_captions import GRAMMARS, caption, words
from params import MUNIChusLoadConfig

MAX_VOCABULARY = 1200  # never reached: training stops when no pair of the corpus is frequent enough

# The released tokenizers split words at \p{L}, which tears Sinhala and Devanagari vowel signs off their letters.
_WORD = r" ?[^\s\p{P}]+| ?\p{P}+|\s+"

LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",  # the last id, beyond the rows of the head, as in the released model
)
COHERE_SPECIAL = (
    "<PAD>",
    "<UNK>",
    "<BOS_TOKEN>",
    "<EOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<image>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "TILE_GLOBAL",
    *(f"TILE_{number}" for number in range(1, 13)),
    "TILE",
)


def corpus() -> list[str]:
    """Words, captions of the languages that are written with spaces, prompts and keywords.

    Chinese, Cantonese and Japanese come as separate words only: whole clauses that the tokenizer has merged would
    hide the words from the model.
    """
    config = MUNIChusLoadConfig()
    lines = [config.instruction.replace("{language}", name) for name in config.language_names.values()] * 20
    for attributes in combinations("train"):
        lines.append(keywords(attributes))
        lines += [caption(attributes, language) for language in GRAMMARS if language not in config.cjk_tokens]
    for language in config.cjk_tokens:
        lines += words(language) * 20
    lines += ["有", "一", "的", "嘅", "に", "が", "あります", "います", "。", "user", "assistant", "system"] * 20
    return lines


def byte_level_bpe() -> Tokenizer:
    """Train the byte-level BPE that all tiny models share; no special tokens yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def dress(bpe: Tokenizer, special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """Add the special tokens of a family, in order, and put its first token before every text.

    `roles` names the tokens by use: bos_token, eos_token, pad_token, unk_token.
    """
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = roles["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        **roles,
    )
