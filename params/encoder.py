"""What can be turned in pretraining and contrastive fine-tuning of a text encoder, section by section."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from params.bounds import (
    Count,
    CountOrZero,
    NonNegative,
    PartialShare,
    Positive,
    PositiveShare,
    Seed,
    Share,
    TokenLimit,
)
from params.lowprecision import Quartet2Params, TorchAOParams, TransformerEngineParams

DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"  # where neither a tokenizer nor a stored model is named

EncoderTask = Literal["pretraining", "contrastive"]
Pooling = Literal["mean", "cls", "last_token", "weighted_mean"]


@dataclass(frozen=True, kw_only=True)
class EncoderModelParams:
    """The architecture; a model that is loaded (name) brings its own and takes attn_backend alone."""

    name: str | None = None  # directory or hub id of weights to start from; none: new ones, drawn from the seed
    hidden_size: Count = 768  # of every layer's input and output
    num_hidden_layers: Count = 12  # blocks
    num_attention_heads: Count = 12  # hidden_size / num_attention_heads must be even, for rotary pairs
    intermediate_size: Count = 3072  # before SwiGLU's two thirds: 3072 makes layers of 2048
    max_position_embeddings: TokenLimit = 512  # tokens of the longest document
    vocab_size: Count = 30522  # rows of the embedding: at least the tokenizer's
    rope: bool = True  # rotary positions; false: learned ones
    rms_norm: bool = True  # false: layer norm
    norm_eps: Positive = 1e-5  # added to the mean square
    hidden_act: Literal["swiglu", "gelu"] = "swiglu"  # of the feed-forward layers
    dropout_prob: PartialShare = 0.0  # after attention and feed-forward
    tie_word_embeddings: bool = True  # the head's weights are the embedding's
    attn_backend: Literal["sdpa", "flash_attn_varlen"] = "sdpa"  # sdpa takes torch's varlen kernel on CUDA in bfloat16


@dataclass(frozen=True, kw_only=True)
class TokenizerParams:
    """The vocabulary."""

    name: str | None = None  # hub id or directory; none: that of model.name, else google-bert/bert-base-uncased


@dataclass(frozen=True, kw_only=True)
class DatasetParams:
    """The documents, or in contrastive fine-tuning the queries with their positives."""

    name: str | None = None  # hub id; none: path
    config: str | None = None  # configuration of a hub data set
    path: str | None = None  # file, directory of shards, glob, or what inft preprocess wrote
    sources: Mapping[str, str] = field(default_factory=dict)  # contrastive: name -> path, mixed by size^mixing_alpha
    mixing_alpha: Share = 0.5  # contrastive: 1 draws by size, 0 draws every source alike
    streaming: bool = False  # read as training goes on, instead of all before it
    max_seq_length: TokenLimit = 512  # tokens of a document, special ones included
    long_documents: Literal["split", "drop"] = "split"  # what becomes of a longer one; both are counted
    max_bad_fraction: PartialShare = 0.01  # of the rows: corrupt ones are skipped and counted, more end the run
    train_split: str = "train"  # of a data set with splits
    eval_split: str | None = None  # none: validation, eval, test or dev where there is one
    eval_samples: Count | None = None  # first rows of the train split kept for evaluation where there is no other split
    text_column: str = "text"  # of the rows
    language_column: str | None = None  # whose evaluation is shown per language
    num_workers: CountOrZero = 0  # processes that read and tokenise
    pin_memory: bool | None = None  # page-locked batches; none: on CUDA
    persistent_workers: bool | None = None  # kept between epochs; none: where there are workers
    prefetch_factor: Count | None = None  # blocks that a worker reads ahead; none: 2, on CUDA 4
    shuffle_buffer_size: Count = 10_000  # rows that are shuffled at a time when streaming; 1: the order of the files
    pre_tokenize: bool = False  # tokenise all before the first step and keep it in pre_tokenized_dir
    pre_tokenized_dir: str | None = None  # where inft preprocess writes; none: below trainer.output_dir


@dataclass(frozen=True, kw_only=True)
class EncoderTrainerParams:
    """Steps, batches, precision, evaluation and checkpoints."""

    per_device_train_batch_size: Count = 16  # documents, or packed sequences, of a micro-batch
    per_device_eval_batch_size: Count = 32  # documents
    gradient_accumulation_steps: Count = 1  # micro-batches of a step, weighted by their masked tokens or rows
    max_steps: Count = 1_000_000  # optimizer steps
    save_steps: Count = 10_000  # steps between checkpoints
    eval_steps: Count = 10_000  # steps between evaluations
    logging_steps: Count = 100  # steps between log events
    output_dir: str = "outputs/neobert"  # checkpoints/<step>, model_checkpoints/<step>
    logs_dir: str = "logs"  # directory of trainer_<name>.jsonl
    run_name: str = "neobert"  # tag of the log
    mixed_precision: Literal["no", "fp32", "bf16"] = "bf16"  # no and fp32 are the same; fp16 is unsupported
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: a third slower, less memory
    gradient_clipping: Positive | None = 1.0  # largest gradient norm; none: no limit
    torch_compile: bool = False  # compile the model's blocks
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"  # of torch.compile
    torch_compile_dynamic: bool | None = None  # none: static shapes, pretraining pads batches to one size
    enforce_full_packed_batches: bool = True  # packed: keep documents back until a micro-batch is full
    eval_max_batches: Count | None = None  # none: all, or 64 when streaming
    masked_logits_only_loss: bool = True  # logits of the masked positions alone; false: of all, an ablation
    fused_linear_cross_entropy: Literal["auto", "off", "torch", "liger"] = "auto"  # head and loss in one; auto: on CUDA
    max_bad_steps: Count = 8  # steps in a row with a non-finite loss or gradient before the run ends
    resume_from_checkpoint: str | None = None  # directory of a checkpoint, or latest
    save_total_limit: Count | None = None  # checkpoints that are kept; none: all
    num_threads: Count | None = None  # CPU threads for torch; none: torch's choice


@dataclass(frozen=True, kw_only=True)
class SchedulerParams:
    """The learning rate over the steps: warm-up, decay to final_lr_ratio, then constant."""

    name: Literal["cosine", "linear", "wsd"] = "cosine"  # wsd: constant until the decay at the end, linear
    warmup_steps: CountOrZero = 2_000  # linear from 0
    decay_steps: Count | None = None  # cosine and linear: step at which the decay ends; wsd: steps of the decay
    final_lr_ratio: Share = 0.1  # of the peak


@dataclass(frozen=True, kw_only=True)
class OptimizerParams:
    """How a step is made; norms, biases and embeddings of positions are never decayed."""

    name: Literal["adamw", "adam", "muon"] = "adamw"  # muon: of the blocks' matrices, AdamW for the rest
    lr: Positive = 1e-4  # peak
    weight_decay: NonNegative = 0.01  # decoupled; with adam it is added to the gradient
    betas: tuple[PartialShare, ...] = (0.9, 0.95)  # of the moments
    eps: Positive = 1e-8  # added to the root of the second moment
    momentum: PartialShare = 0.95  # of muon


@dataclass(frozen=True, kw_only=True)
class DataCollatorParams:
    """Which tokens are masked, and how documents share a sequence."""

    mlm_probability: PositiveShare = 0.15  # share of a document's tokens that are predicted; evaluation: 0.15 always
    mask_all: bool = False  # true: all of them become [MASK]; false: 80 % do, 10 % a random token, 10 % stay
    pack_sequences: bool = False  # true: several documents in a sequence of max_seq_length; none sees another


@dataclass(frozen=True, kw_only=True)
class ContrastiveParams:
    """The objective of contrastive fine-tuning."""

    temperature: Positive = 0.05  # similarities are divided by it
    pooling: Pooling = "mean"  # of a text's hidden states
    loss_type: Literal["info_nce", "symmetric"] = "info_nce"  # symmetric: positives find their queries, too
    hard_negative_weight: NonNegative = 1.0  # a hard negative counts as this many in-batch ones; 0: not at all
    max_hard_negatives: CountOrZero = 7  # of a row, drawn anew in each epoch
    query_prefix: str = ""  # put before every query, in training, evaluation and the stored model
    document_prefix: str = ""  # put before every positive and negative
    query_max_length: Count | None = None  # tokens; none: dataset.max_seq_length
    simcse_share: Share = 0.0  # of the steps: a query's positive is itself under another dropout
    simcse_dropout: PartialShare = 0.1  # of these steps
    gradcache_chunk_size: Count | None = None  # rows encoded at a time; none: all at once
    gather_negatives: bool = True  # positives and hard negatives of all processes are contrasted


@dataclass(frozen=True, kw_only=True)
class EncoderParams:
    """All parameters of one run."""

    task: EncoderTask = "pretraining"  # which of the two objectives
    seed: Seed = 42  # of weights, data order and masks
    model: EncoderModelParams = field(default_factory=EncoderModelParams)
    tokenizer: TokenizerParams = field(default_factory=TokenizerParams)
    dataset: DatasetParams = field(default_factory=DatasetParams)
    trainer: EncoderTrainerParams = field(default_factory=EncoderTrainerParams)
    scheduler: SchedulerParams = field(default_factory=SchedulerParams)
    optimizer: OptimizerParams = field(default_factory=OptimizerParams)
    datacollator: DataCollatorParams = field(default_factory=DataCollatorParams)
    contrastive: ContrastiveParams = field(default_factory=ContrastiveParams)
    torchao: TorchAOParams = field(default_factory=TorchAOParams)
    transformer_engine: TransformerEngineParams = field(default_factory=TransformerEngineParams)
    quartet2: Quartet2Params = field(default_factory=Quartet2Params)
