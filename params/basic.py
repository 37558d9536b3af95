"""Which model is loaded, in what precision, where a run writes and how it generates."""

from dataclasses import dataclass
from typing import Literal

from params.bounds import Count, CountOrZero, Positive, PositiveShare, TokenLimit


@dataclass(frozen=True, kw_only=True)
class BasicParams:
    """Model names, precision, directories and generation settings shared by every run."""

    seed: CountOrZero = 42  # of data order, splits and adapter initialisation
    logs_dir: str = "logs"  # directory of the logs trainer_<task>.jsonl
    output_dir: str = "outputs"  # parent of the run directories that SFTParams names
    metric_dir: str = "metrics"  # directory of the evaluations that inft evaluate makes; not read by inft train
    llama_model_name: str = "meta-llama/Llama-3.2-11B-Vision-Instruct"  # hub id or local path; "": the embedded model
    llama_processor_name: str = "meta-llama/Llama-3.2-11B-Vision-Instruct"  # hub id or local path
    aya_model_name: str = "CohereLabs/aya-vision-8b"  # hub id or local path
    aya_processor_name: str = "CohereLabs/aya-vision-8b"  # hub id or local path
    text_model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id or local path of any causal LM
    text_processor_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id or local path of its tokenizer
    attn_impl: str = "eager"  # attention: eager, sdpa, flash (= flash_attention_2); Mllama takes eager and sdpa only
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the weights that are not quantised
    max_length: TokenLimit = 4096  # tokens per row, image tokens included
    max_image_tiles: Count | None = None  # Aya only: tiles an image is cut into at most; None keeps the processor's own
    num_threads: Count | None = None  # CPU threads for torch; None: 1 for the embedded models, torch's choice otherwise
    device_map: str | None = "auto"  # as in from_pretrained; used when CUDA is there
    gen_do_sample: bool = True  # False: greedy; for evaluation, not read by inft train
    gen_top_p: PositiveShare = 0.9  # nucleus, when sampling; for evaluation, not read by inft train
    gen_temperature: Positive = 0.7  # when sampling; for evaluation, not read by inft train
    gen_num_beams: Count = 1  # 1: no beam search; for evaluation, not read by inft train
    gen_max_new_tokens: Count = 96  # tokens a caption has at most; in inft train for a demo and eval_captions
