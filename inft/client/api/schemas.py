"""Requests and answers as pydantic models: what /openapi.json describes, and what a request is checked against.

A request's fields have the types of JSON, and nothing is converted; what the values mean is checked by the engine,
which names the row. Only fields that were sent go into a payload, so that a repeated request has the same contents.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from inft.client.api.configuration import configuration_schema

LARGEST_SEQ = 2**53 - 1  # what every JSON reader keeps exactly
LARGEST_SEED = 2**63 - 1
Json = dict[str, Any]

_Ids = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
_Texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
BATCH_SCHEMA: Json = {
    "type": "object",
    "title": "Batch",
    "description": (
        "input_ids, or prompt and completion; every further field is an extra of the loss (advantages, old_logprobs, "
        "weights, targets, pair_ids, chosen): numbers, an entry for each row"
    ),
    "properties": {
        "input_ids": _Ids | {"description": "token ids, rows of equal length"},
        "attention_mask": _Ids | {"description": "1 for a token, 0 for padding; without it, all 1"},
        "labels": _Ids | {"description": "about the token at the same place, -100 for none; without it, input_ids"},
        "prompt": _Texts,
        "completion": _Texts,
        "images": {
            "type": "array",
            "items": {"type": ["string", "null"]},
            "description": "with texts: an image file in base64 for each row, or null",
        },
    },
    "additionalProperties": True,
    "examples": [{"prompt": ["Once upon a time"], "completion": [" there was a model."]}],
}
NumberOrText = Annotated[
    float | str,
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}),
]
Configuration = Annotated[Json, WithJsonSchema(configuration_schema())]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OperationRequest(_Request):
    """What every operation takes."""

    seq: Annotated[
        int | None,
        Field(
            ge=1,
            le=LARGEST_SEQ,
            description="its number in the client's order, from 1; repeated with the same contents it is the same "
            "operation; without it, the next number",
        ),
    ] = None

    def payload(self) -> Json:
        """Return what was sent, without `seq`."""
        return self.model_dump(exclude_unset=True, exclude={"seq"})


class ForwardBackwardRequest(OperationRequest):
    """Loss and gradient of a batch, added to those since the last step."""

    batch: Annotated[Json, WithJsonSchema(BATCH_SCHEMA)]
    loss: Annotated[str | None, Field(description="a built-in loss, or module:function that the service allows")] = None
    loss_options: Annotated[Json | None, Field(examples=[{"margin": 0.5}])] = None


class OptimStepRequest(OperationRequest):
    """A step of the optimizer with the gradient so far."""

    apply_dp_noise: Annotated[bool, Field(description="false: no noise on this step, so no privacy for it")] = True
    learning_rate: Annotated[float | None, Field(ge=0, description="for this step alone")] = None


class SampleBody(OperationRequest):
    """Completions of prompts with the current weights."""

    prompts: Annotated[list[str], Field(min_length=1, examples=[["Once upon a time"]])]
    images: Annotated[
        list[str | None] | None, Field(description="an image file in base64 for each prompt, or null")
    ] = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] = 128
    temperature: Annotated[float, Field(ge=0, description="0: the likeliest token")] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Field(ge=0, le=2**31, description="0: off")] = 50
    stop_sequences: list[str] = []
    seed: Annotated[int | None, Field(ge=0, le=LARGEST_SEED)] = None
    num_samples: Annotated[int, Field(ge=1, le=2**31, description="completions of each prompt")] = 1
    include_logprobs: Annotated[bool, Field(description="tokens and their log-probabilities too")] = False


class SaveStateRequest(OperationRequest):
    """A checkpoint, which never changes afterwards."""

    include_optimizer: bool = True
    metadata: Annotated[Json, Field(examples=[{"notes": "epoch 1"}])] = {}


class LoadStateRequest(OperationRequest):
    """The state of a checkpoint."""

    artifact_id: Annotated[str, Field(examples=["art-0123456789abcdef01234567"])]


class DPMetrics(_Answer):
    """What privacy has been spent, and how."""

    epsilon: NumberOrText
    delta: float
    target_epsilon: NumberOrText
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    accountant: str
    steps: int
    private: Annotated[bool, Field(description="false where the noise is seeded, and so can be repeated")]
    clipped_fraction: float | None = None
    mean_norm: float | None = None


class ForwardBackwardResult(_Answer):
    """What a batch gave."""

    loss: float
    grad_norm: Annotated[float, Field(description="of the gradient so far, as a step would apply it")]
    tokens_processed: int
    dp_metrics: DPMetrics | None
    metrics: dict[str, float | None]
    accumulated: Annotated[int, Field(description="forward_backwards since the last step")]


class OptimStepResult(_Answer):
    """What a step did."""

    step: int
    learning_rate: float
    applied: Annotated[bool, Field(description="false while fewer than gradient_accumulation_steps batches came")]
    grad_norm: float | None
    dp_metrics: DPMetrics | None


class Completion(_Answer):
    """One completion."""

    prompt: str
    completion: str
    tokens_generated: int
    finish_reason: Literal["stop", "length"]
    prompt_tokens: list[int] | None = None
    tokens: list[int] | None = None
    logprobs: list[float] | None = None


class SampleResult(_Answer):
    """Completions in the order of the prompts, those of one prompt next to each other."""

    samples: list[Completion]
    model_step: int


class SaveStateResult(_Answer):
    """The checkpoint that was written."""

    artifact_id: str
    size_bytes: int
    content_hash: str
    created_at: str
    step: int


class LoadStateResult(_Answer):
    """The checkpoint that was loaded."""

    loaded_artifact_id: str
    step: int


class ErrorBody(_Answer):
    """What went wrong."""

    code: Annotated[str, Field(examples=["not_found"])]
    message: Annotated[str, Field(description="what is wrong, and how to mend it")]
    details: Json
    request_id: str


class ErrorAnswer(_Answer):
    """Every answer that is no success."""

    error: ErrorBody


class OperationError(_Answer):
    """Why an operation failed or did not run."""

    code: str
    message: str
    details: Json


class FutureInfo(_Answer):
    """An accepted operation. It stays accepted when the connection, or the service, ends."""

    id: Annotated[str, Field(examples=["fut-0123456789abcdef01234567"])]
    client_id: str
    kind: Literal["forward_backward", "optim_step", "sample", "save_state", "load_state"]
    seq: int
    status: Annotated[
        Literal["waiting", "queued", "running", "completed", "failed", "cancelled"],
        Field(description="waiting: for an operation of an earlier number that has not come"),
    ]
    waits_for: Annotated[int | None, Field(description="the first number that has not come, while it is waiting")]
    created_at: str
    finished_at: str | None
    result: ForwardBackwardResult | OptimStepResult | SampleResult | SaveStateResult | LoadStateResult | None
    error: OperationError | None


class Deleted(_Answer):
    """What deleting came to."""

    deleted: Literal[True]


class ClientInfo(_Answer):
    """A training client."""

    id: Annotated[str, Field(examples=["tc-0123456789abcdef01234567"])]
    status: Literal["active", "poisoned"]
    reason: Annotated[str, Field(description="why it is poisoned; load_state makes it active again")]
    step: int
    config: Json
    created_at: str
    dp_enabled: bool
    dp_metrics: DPMetrics | None
    next_seq: Annotated[int, Field(description="the next operation's number")]
    next_run: Annotated[int, Field(description="the number that runs next: every smaller one is done")]


class ClientList(_Answer):
    """The tenant's clients, oldest first."""

    training_clients: list[ClientInfo]


class Cancelled(_Answer):
    """Whether the operation had not begun, and now never will; its number counts as done."""

    cancelled: bool


class ArtifactInfo(_Answer):
    """A checkpoint."""

    artifact_id: str
    client_id: str
    step: int
    size_bytes: int
    content_hash: str
    created_at: str
    metadata: Json


class AuditEntry(_Answer):
    """What was done or refused; hash = sha256(previous + canonical JSON of the entry without previous and hash)."""

    tenant: str
    number: int
    at: str
    action: str
    target: str
    outcome: str
    details: Json
    request_id: str | None
    previous: str
    hash: str


class AuditLog(_Answer):
    """Entries of the tenant, oldest first."""

    audit_logs: list[AuditEntry]


class Health(_Answer):
    """The state of the service; nothing of it tells of a tenant."""

    status: Literal["ok", "closing"]
    version: str
    models: Annotated[list[str], Field(description="what model_ref may be")]


AnyRequest = TypeVar("AnyRequest", bound=OperationRequest)
