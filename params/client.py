"""What can be turned in the training client: a client's configuration, the engine's and the service's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from params.bounds import Bounds, Count, CountOrZero, NonNegative, PartialShare, Positive, PositiveShare, Seed

MOST_NAME = 128  # characters of a tenant's name
MOST_RATE = 1e30  # learning rate: above it the optimizers' own float32 arithmetic overflows
Rank = Annotated[int, Bounds(1, 4096, high_included=True)]
LearningRate = Annotated[float, Bounds(0, MOST_RATE, high_included=True)]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """A client's adapter on the shared, frozen base."""

    rank: Rank = 16  # of A and B
    alpha: Positive = 32.0  # scale is alpha / rank
    dropout: PartialShare = 0.05  # on the adapter's input, while training
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "k_proj", "o_proj")  # last parts of names, or globs
    bias: Literal["none"] = "none"  # the base is shared and frozen: its biases cannot be trained


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A client's optimizer; the learning rate is constant unless optim_step is given another."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"  # adam couples its decay with the gradient; sgd without momentum
    learning_rate: LearningRate = 1e-4  # per optimizer step
    weight_decay: NonNegative = 0.01  # of the adapter's weights
    betas: tuple[PartialShare, PartialShare] = (0.9, 0.999)  # of adam and adamw
    eps: Positive = 1e-8  # of adam and adamw
    max_grad_norm: Positive | None = None  # global L2 norm to which a step's gradient is cut; none: no limit


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """Differential privacy of a client: what a step may reveal of one row, and what all steps may spend."""

    dataset_size: Count  # n, rows that batches are drawn from
    enabled: bool = True  # false: as if there were no dp_config
    noise_multiplier: NonNegative | None = None  # σ; none: calibrated to target_epsilon over max_steps
    max_grad_norm: Positive = 1.0  # C, L2 norm to which each row's gradient is clipped
    target_epsilon: Positive | None = 8.0  # most ε that may be spent; none: no limit
    target_delta: PartialShare = 1e-5  # δ at which ε is counted, below 1 / dataset_size
    sample_rate: PositiveShare | None = None  # q, chance of a row to be in a step; none: batch_size / dataset_size
    accountant: Literal["prv", "rdp"] = "prv"  # which bound of ε counts
    seed: Seed | None = None  # of the noise; a seeded run can be repeated and is marked as not private


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training client."""

    model_ref: str  # hub id or directory, a name the service gives, or embedded/text, embedded/llama32, embedded/aya
    lora_config: LoRAConfig | None = None  # none: LoRAConfig's defaults
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dp_config: DPConfig | None = None  # none: no differential privacy
    batch_size: Count = 8  # most rows of one forward_backward
    gradient_accumulation_steps: Count = 1  # forward_backwards that make a step; an optim_step before waits for more
    max_steps: Count | None = None  # optimizer steps; none: no limit
    max_length: Count | None = None  # most tokens of a row; none: what the model can take, at most 4,096
    loss: str = "token_ce"  # where forward_backward names none: a name of the registry, or module:function
    loss_options: Mapping[str, float | int | str | bool] = field(default_factory=dict)  # such as {"margin": 0.5}
    seed: Seed | None = None  # of the adapter's first weights and its dropout; none: drawn from Python's random

    @property
    def lora(self) -> LoRAConfig:
        """The adapter's configuration."""
        return self.lora_config or LoRAConfig()

    @property
    def dp(self) -> DPConfig | None:
        """The privacy settings that hold; None without differential privacy."""
        return self.dp_config if self.dp_config is not None and self.dp_config.enabled else None


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """Where an engine keeps its state, which models it may load, and how much it takes on."""

    state_dir: str = "outputs/client"  # log, snapshots and checkpoints; one process at a time
    models: Mapping[str, str] = field(default_factory=dict)  # name that clients use -> hub id, directory or embedded/…
    any_model: bool = True  # also hub ids, directories and embedded/… that `models` does not name
    losses: tuple[str, ...] | None = None  # names and module:function that are allowed; none: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base; auto: bfloat16 on CUDA, float32 on the CPU
    quantize: bool = False  # base in 4 bit (NF4)
    snapshot_steps: Count = 50  # optimizer steps between snapshots (or four times as many operations), for a crash
    max_batch_tokens: Count = 2**18  # tokens of one forward_backward, padding included
    max_resident_clients: Count = 64  # adapters in memory; one that is idle is stored and read back when needed
    max_pending: Count = 1024  # operations that wait, of all tenants
    max_pending_per_tenant: Count = 256  # operations that wait, of one tenant
    max_clients_per_tenant: Count = 1024  # training clients of one tenant
    max_attempts: Count = 5  # processes that an operation may end by running before it is given up
    durable: bool = False  # wait for the disk at each commit: survives a power cut too, not only a killed process


@dataclass(frozen=True, kw_only=True)
class ServeParams:
    """The HTTP face."""

    host: str = "127.0.0.1"  # another than loopback needs api_key_file
    port: CountOrZero = 8787  # 0: any that is free
    api_key_file: str | None = None  # lines of "tenant key"; none: one tenant, "local", without a key
    rate_limit: Positive = 100.0  # requests a second of one tenant, over time
    rate_burst: Count = 200  # requests of one tenant at once
    max_body_bytes: Count = 32 * 1024 * 1024  # of a request
    max_wait_s: Positive = 60.0  # longest long poll
