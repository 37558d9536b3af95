"""The kinds of operation, and their payloads checked before they are accepted."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from inft.client import audit
from inft.client.errors import InvalidRequest

if TYPE_CHECKING:
    from inft.client.bases import Base
    from params.client import TrainingConfig

FORWARD_BACKWARD, OPTIM_STEP, SAMPLE = "forward_backward", "optim_step", "sample"
SAVE_STATE, LOAD_STATE = "save_state", "load_state"
KINDS = (FORWARD_BACKWARD, OPTIM_STEP, SAMPLE, SAVE_STATE, LOAD_STATE)
CHANGING = (FORWARD_BACKWARD, OPTIM_STEP, LOAD_STATE)  # what is run again after a crash to get the state back
MOST_METADATA = 65_536  # characters of a checkpoint's metadata as JSON

FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    FORWARD_BACKWARD: {
        "batch": (Mapping,),
        "loss": (str, type(None)),
        "loss_options": (Mapping, type(None)),
    },
    OPTIM_STEP: {"apply_dp_noise": (bool,), "learning_rate": (int, float, type(None))},
    SAVE_STATE: {"include_optimizer": (bool,), "metadata": (Mapping, type(None))},
    LOAD_STATE: {"artifact_id": (str,)},
}
REQUIRED = {FORWARD_BACKWARD: "batch", LOAD_STATE: "artifact_id"}


def check_operation(
    base: "Base",
    config: "TrainingConfig",
    kind: str,
    payload: Mapping[str, Any],
    *,
    loss: Callable[..., Any] | None = None,
    allowed_losses: tuple[str, ...] | None = None,
) -> Any:
    """Return what validation makes of a payload (a prepared batch, a sampling request), or None; changes nothing.

    Errors: InvalidRequest, or another UserError, that names the field and the row.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"there is no operation {kind!r:.60}: choose one of {', '.join(KINDS)}.")
    if kind == SAMPLE:
        from inft.client.sampling import check_sample

        return check_sample(base, payload)
    _check_fields(kind, payload)
    if kind == FORWARD_BACKWARD:
        from inft.client.learner import prepare

        return prepare(base, config, payload, loss=loss, allowed_losses=allowed_losses)
    if kind == OPTIM_STEP:
        from inft.client.learner import check_optim_step

        check_optim_step(payload)
    if kind == SAVE_STATE and len(json.dumps(payload.get("metadata") or {})) > MOST_METADATA:
        raise InvalidRequest(f"metadata has more than {MOST_METADATA} characters: store large things elsewhere.")
    return None


def _check_fields(kind: str, payload: Mapping[str, Any]) -> None:
    known = FIELDS[kind]
    for name, value in payload.items():
        if name not in known:
            raise InvalidRequest(f"{kind} has no field {name!r:.60}: it takes {', '.join(known)}.")
        wrong_bool = isinstance(value, bool) and bool not in known[name]
        if not isinstance(value, known[name]) or wrong_bool:
            raise InvalidRequest(f"{kind}: {name} is of type {type(value).__name__}: give {_words(known[name])}.")
    if (needed := REQUIRED.get(kind)) is not None and needed not in payload:
        raise InvalidRequest(f"{kind} needs {needed}.")


def _words(kinds: tuple[type, ...]) -> str:
    names = {Mapping: "a mapping", bool: "true or false", str: "a text", float: "a number", type(None): "null"}
    return " or ".join(names[kind] for kind in kinds if kind in names)


def refuse_too_many(tokens: int, most: int) -> None:
    """Raise InvalidRequest for a batch of more tokens, padding included, than are taken at once."""
    if tokens > most:
        raise InvalidRequest(
            f"the batch has {tokens} tokens with its padding, and {most} are taken at once (max_batch_tokens): send "
            "fewer or shorter rows in each of several forward_backwards, whose gradients add up."
        )


def as_run(kind: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload as it is kept and run: with a seed where a sample has none, so that it runs again alike."""
    if kind == SAMPLE and payload.get("seed") is None:
        return {**payload, "seed": secrets.randbits(31)}
    return dict(payload)


def has_images(payload: Mapping[str, Any]) -> bool:
    """Whether images are sent with a batch or with prompts."""
    batch = payload.get("batch")
    return bool(payload.get("images")) or (isinstance(batch, Mapping) and "images" in batch)


def canonical(payload: Mapping[str, Any]) -> str:
    """Return the payload as JSON with sorted keys; InvalidRequest for what JSON cannot hold, NaN included."""
    try:
        text = audit.canonical(payload)
        if "\\ud" in text:  # half of a character's pair, maybe: no UTF-8 has it
            json.dumps(payload, ensure_ascii=False).encode()
        return text
    except UnicodeEncodeError as error:
        raise InvalidRequest("the payload holds half a surrogate pair, which is no text: mend it.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"the payload is not plain JSON: {error}. Give lists, texts and finite numbers."
        ) from error


def digest(kind: str, text: str, loss: Callable[..., Any] | None = None) -> str:
    """Return the sha256 by which a repeated request is known: of the kind, the canonical payload, and a function."""
    function = "" if loss is None else str(id(loss))  # a function is known in its own process alone
    return hashlib.sha256(f"{kind}\n{function}\n{text}".encode()).hexdigest()


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess: the prefix and 24 hexadecimal digits."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def audit_entry(
    tenant: str, action: str, target: str, outcome: str, details: Mapping[str, Any], request_id: str | None
) -> dict[str, Any]:
    """Return what `audit.append` takes, of this moment."""
    return {
        "tenant": tenant,
        "action": action,
        "target": target,
        "outcome": outcome,
        "details": dict(details),
        "at": now(),
        "request_id": request_id,
    }
