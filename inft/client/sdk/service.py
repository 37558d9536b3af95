"""Where training clients come from: a service at a URL, or an engine in this process."""

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from inft.client.sdk.archive import check_content
from inft.client.sdk.futures import Future
from inft.client.sdk.http import HttpTransport
from inft.client.sdk.local import LocalTransport
from inft.client.sdk.results import RESULTS
from inft.client.sdk.seeds import drawn_seed
from inft.client.sdk.settings import LOCAL_TENANT, settings_of
from inft.client.sdk.training import TrainingClient
from inft.client.sdk.transport import Transport, Values, plain_id
from inft.client.sdk.values import plain_value
from inft.training.storage import staged
from params.client import TrainingConfig
from params.errors import UserError

ANSWER_WITHIN = 60.0  # seconds for which a request is repeated, where no timeout is given
MOST_ENTRIES = 1000  # of the audit log in one answer


class ServiceClient:
    """The way to training clients.

    `config` is a URL, or a mapping with base_url, api_key, tenant_id and timeout, or with the fields of EngineParams
    (state_dir, models, device, ...) for an engine in this process; the environment variables INFT_BASE_URL and
    INFT_API_KEY stand in for a URL and a key. Without a URL the engine is in this process: it starts at the first use,
    keeps its state in outputs/client, and is shared by all ServiceClients of one state_dir. `timeout` is how many
    seconds sample, save_state and load_state wait (None: as long as it takes), and how long a request is repeated that
    has no answer or finds a full queue (None: 60). Close it, or use it in a `with`; the interpreter's end does it too.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        tenant_id: str | None = None,
        timeout: float | None = None,
    ) -> None:
        given = {"base_url": base_url, "api_key": api_key, "tenant_id": tenant_id, "timeout": timeout}
        settings = settings_of(config, given)
        self._timeout = settings.timeout
        self._transport: Transport
        if settings.base_url is None:
            tenant = settings.tenant_id or LOCAL_TENANT
            self._transport = LocalTransport(settings.engine, tenant, timeout=settings.timeout or ANSWER_WITHIN)
        else:
            self._transport = HttpTransport(
                settings.base_url,
                api_key=settings.api_key,
                tenant_id=settings.tenant_id,
                timeout=settings.timeout or ANSWER_WITHIN,
            )

    def __repr__(self) -> str:
        return f"ServiceClient({self._transport!r})"

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine or the service; what was accepted is finished, now or when it is started again."""
        self._transport.close()

    def create_training_client(self, config: Mapping[str, Any] | TrainingConfig) -> TrainingClient:
        """Return a new training client; a configuration without a seed gets one from Python's random.

        Errors: UserError that lists everything wrong with the configuration, or says why the model cannot be loaded.
        """
        values = _plain_config(config)
        if values.get("seed") is None:
            values["seed"] = drawn_seed()
        return self._handle(self._transport.create_client(values))

    def get_training_client(self, client_id: str) -> TrainingClient:
        """Return a handle of an existing training client, which goes on where it is. Errors: NotFound."""
        return self._handle(self._transport.get_client(client_id))

    def list_training_clients(self) -> list[TrainingClient]:
        """Return handles of all training clients, oldest first."""
        return [self._handle(info) for info in self._transport.list_clients()]

    def get_future(self, future_id: str) -> Future[Any]:
        """Return the future of an operation that was accepted before, by this process or another. Errors: NotFound."""
        info = self._transport.future(future_id)
        return Future(self._transport, info, RESULTS[info["kind"]])

    def get_audit_logs(self, after: int = 0, limit: int = 100) -> list[Values]:
        """Return the entries of the audit log with numbers above `after`, oldest first, `limit` (1 to 1000) at most."""
        return self._transport.audit_logs(_whole("after", after, 0, 2**53 - 1), _whole("limit", limit, 1, MOST_ENTRIES))

    def pull_artifact(self, artifact_id: str, directory: str | PathLike[str]) -> Path:
        """Put a checkpoint into a new directory, `directory`/`artifact_id`, and return that.

        It is what PeftModel.from_pretrained takes. Each file is checked against its SHA-256 before it is there.
        Errors: NotFound; UserError where the directory exists already, or has no room; InternalError for damage.
        """
        place = Path(directory) / plain_id(artifact_id)
        if place.exists():
            raise UserError(f"{place} exists already: remove it, or choose another directory.")
        with staged(place, what=f"checkpoint {artifact_id}", remedy="Free space there and pull it again.") as staging:
            info = self._transport.pull(artifact_id, staging)
            check_content(staging, info["content_hash"])
        return place

    def _handle(self, info: Values) -> TrainingClient:
        return TrainingClient(self._transport, info, timeout=self._timeout)


def _plain_config(config: Mapping[str, Any] | TrainingConfig) -> Values:
    """The configuration as JSON has it; its sections may be dataclasses, its sequences tuples."""
    if isinstance(config, TrainingConfig):
        config = asdict(config)
    if not isinstance(config, Mapping):
        raise UserError(f"a training configuration is a mapping or a TrainingConfig, not {type(config).__name__}.")
    return {str(name): plain_value(value, name=str(name)) for name, value in config.items()}


def _whole(name: str, value: Any, least: int, most: int) -> int:
    found = plain_value(value, name=name)
    if type(found) is not int or not least <= found <= most:
        raise UserError(f"{name} is {value!r:.60}: give a whole number from {least} to {most}.")
    return found
