"""One training client: a LoRA adapter with its optimizer, driven step by step."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inft.client.sdk.futures import Future
from inft.client.sdk.results import (
    RESULTS,
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    SampleResult,
    SaveStateResult,
)
from inft.client.sdk.seeds import drawn_seed
from inft.client.sdk.transport import Transport, Values
from inft.client.sdk.values import plain_batch, plain_images, plain_value
from params.client import TrainingConfig
from params.errors import UserError

if TYPE_CHECKING:
    from inft.client.losses.registry import Loss


class TrainingClient:
    """A training client, made by ServiceClient; operations run in the order in which they are called.

    `step`, `status` and `dp_metrics` are at least as new as every result that was seen here; `refresh` asks at once.
    Safe in several threads, and several handles of one client keep one order.
    """

    def __init__(self, transport: Transport, info: Values, *, timeout: float | None = None) -> None:
        self._transport, self._info, self._timeout = transport, info, timeout
        self._stale = False  # an outcome was seen since `_info` was asked for
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TrainingClient(id={self.id!r}, model_ref={self._info['config']['model_ref']!r}, {self._transport!r})"

    @property
    def id(self) -> str:
        """The client's id, which ServiceClient.get_training_client takes."""
        return str(self._info["id"])

    @property
    def config(self) -> TrainingConfig:
        """Its configuration; the seed is set, drawn where none was given."""
        from params.client_resolve import training_config

        return training_config(self._info["config"])

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self._current()["step"])

    @property
    def status(self) -> str:
        """active; or poisoned, after a loss or gradient that was not finite, until a load_state."""
        return str(self._current()["status"])

    @property
    def dp_enabled(self) -> bool:
        """Whether it trains with differential privacy."""
        return bool(self._info["dp_enabled"])

    @property
    def dp_metrics(self) -> Mapping[str, Any] | None:
        """What privacy has cost so far (epsilon, delta, steps, ...); None without differential privacy."""
        found: Mapping[str, Any] | None = self._current()["dp_metrics"]
        return found

    def refresh(self) -> "TrainingClient":
        """Ask for the client's state as it is now, and return this handle."""
        with self._lock:
            self._stale = False  # before asking: what ends meanwhile may not be in the answer
        self._info = self._transport.get_client(self.id)
        return self

    def delete(self) -> None:
        """Delete this client with its operations; the checkpoints that it saved stay.

        Errors: Conflict while operations of it have not ended.
        """
        self._transport.delete_client(self.id)

    def forward_backward(
        self,
        batch: Mapping[str, Any],
        loss: "str | Loss | None" = None,
        loss_options: Mapping[str, Any] | None = None,
    ) -> Future[ForwardBackwardResult]:
        """Compute the loss of a batch and add its gradient to what was accumulated since the last step.

        `batch` has `input_ids` [rows, tokens] with `attention_mask` and `labels` of the same shape, or `prompt` and
        `completion` texts with `images`; and what the loss needs beside them, such as `advantages`. Lists, tensors and
        arrays will do. `loss` is a name, `module:function`, or (in process) a function; none: the configuration's.
        Errors: UserError that names the field and the row; nothing has changed then.
        """
        payload = {
            "batch": plain_batch(batch),
            "loss": loss if isinstance(loss, str) else None,
            "loss_options": None if loss_options is None else plain_value(loss_options, name="loss_options"),
        }
        return self._submit("forward_backward", payload, loss=None if isinstance(loss, str) else loss)

    def optim_step(self, apply_dp_noise: bool = True, learning_rate: float | None = None) -> Future[OptimStepResult]:
        """Take an optimizer step with the accumulated gradient, which is gone then.

        `learning_rate` is for this step alone. `apply_dp_noise=False` counts as a step without privacy.
        """
        payload = {"apply_dp_noise": apply_dp_noise, "learning_rate": learning_rate}
        return self._submit("optim_step", _plain(payload))

    def poisson_batches(self, rows: int) -> Iterator[list[int]]:
        """Yield the row numbers of each step without end, drawn as this client's privacy is counted.

        Each row is in a step by a chance of its own, dp_config.sample_rate or batch_size / dataset_size. A step may
        have no row, or more than batch_size, which several forward_backwards bring. dp_config.seed makes it repeatable.
        Errors: UserError without differential privacy, and for another number of rows than dp_config.dataset_size.
        """
        dp = self.config.dp
        if dp is None:
            raise UserError("poisson_batches is for private clients: give dp_config.")
        if rows != dp.dataset_size:
            raise UserError(f"there are {rows} rows and dp_config.dataset_size is {dp.dataset_size}: give the same.")
        from inft.client.privacy.noise import NoiseSource, poisson_batches  # brings torch

        rate = self.config.batch_size / rows if dp.sample_rate is None else dp.sample_rate
        # Other numbers than the noise's, which the learner draws from dp_config.seed itself.
        digest = hashlib.sha256(f"rows {dp.seed}".encode()).digest()
        return poisson_batches(rows, rate, NoiseSource(None if dp.seed is None else int.from_bytes(digest[:4])))

    def sample(
        self,
        prompts: Sequence[str],
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        stop_sequences: Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        seed: int | None = None,
        num_samples: int = 1,
        include_logprobs: bool = False,
    ) -> SampleResult:
        """Let the current weights, after all operations before, continue each prompt, and wait for it.

        `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave all tokens in. Without a `seed` one is
        drawn from Python's random. Errors: UserError that names the field; TimedOut after the ServiceClient's timeout.
        """
        payload = {
            "prompts": prompts,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop_sequences": [] if stop_sequences is None else stop_sequences,
            "seed": drawn_seed() if seed is None else seed,
            "num_samples": num_samples,
            "include_logprobs": include_logprobs,
        }
        payload = _plain(payload) | {"images": plain_images(images)}
        found: SampleResult = self._submit("sample", payload).result(self._timeout)
        return found

    def save_state(self, include_optimizer: bool = True, metadata: Mapping[str, Any] | None = None) -> SaveStateResult:
        """Write a checkpoint of the state after all operations before, and wait for it; it never changes any more.

        Without the optimizer it holds the adapter alone. Errors: StorageFull, which leaves nothing half-written.
        """
        payload = {"include_optimizer": include_optimizer, "metadata": {} if metadata is None else metadata}
        found: SaveStateResult = self._submit("save_state", _plain(payload)).result(self._timeout)
        return found

    def load_state(self, artifact_id: str) -> LoadStateResult:
        """Go back to a checkpoint, whose next steps are then those of the run that wrote it; and wait for it.

        Errors: NotFound; UserError for a checkpoint of another base, rank or privacy, and for a damaged one.
        """
        found: LoadStateResult = self._submit("load_state", _plain({"artifact_id": artifact_id})).result(self._timeout)
        return found

    def _submit(self, kind: str, payload: Values, *, loss: Callable[..., Any] | None = None) -> Future[Any]:
        if loss is not None and not callable(loss):
            raise UserError(f"loss is of type {type(loss).__name__}: give a name or a function.")
        info = self._transport.submit(self.id, kind, payload, loss=loss)
        return Future(self._transport, info, RESULTS[kind], on_finished=self._finished)

    def _finished(self, info: Values) -> None:
        self._stale = True

    def _current(self) -> Values:
        if self._stale:
            self.refresh()
        return self._info


def _plain(payload: Values) -> Values:
    return {name: plain_value(value, name=name) for name, value in payload.items()}
