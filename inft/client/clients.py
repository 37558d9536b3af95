"""The training clients of all tenants: made once for a request, looked up by their tenant alone, and deleted."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inft.client.bases import Base, Bases
from inft.client.errors import Conflict, InvalidRequest, NotFound
from inft.client.losses.registry import resolve_loss
from inft.client.operations import audit_entry, new_id, now
from inft.client.residents import Residents
from inft.client.store import ClientRow, Store
from inft.client.worker import Worker
from params.client import MOST_NAME, EngineParams, TrainingConfig
from params.client_resolve import as_mapping, training_config

Values = dict[str, Any]


class Clients:
    """What the engine does with clients as such; what changes the model is done by its worker."""

    def __init__(self, store: Store, bases: Bases, residents: Residents, worker: Worker, params: EngineParams) -> None:
        self._store, self._bases, self._residents = store, bases, residents
        self._worker, self._params = worker, params
        self._configs: dict[str, TrainingConfig] = {}  # by client: to check one costs a millisecond

    def row(self, tenant: str, client_id: str) -> ClientRow:
        """Return a tenant's client. Errors: NotFound."""
        found = self._store.client(client_id)
        if found is None or found.tenant != tenant:
            raise NotFound(f"there is no training client {client_id!r:.80}.")
        return found

    def config(self, row: ClientRow) -> TrainingConfig:
        """Return a client's configuration."""
        return self._configs.get(row.id) or self._configs.setdefault(row.id, training_config(row.config))

    def base(self, config: TrainingConfig) -> Base:
        """Return a client's base; the worker loads it, since a load changes torch's default dtype meanwhile."""
        loaded = self._bases.loaded(config.model_ref)
        if loaded is not None:
            return loaded
        base: Base = self._worker.call(lambda: self._bases.get(config.model_ref))
        return base

    def info(self, row: ClientRow) -> Values:
        """Return a client's ClientInfo."""
        return {
            "id": row.id,
            "status": row.status,
            "reason": row.reason,
            "step": row.step,
            "config": row.config,
            "created_at": row.created_at,
            "dp_enabled": row.dp_metrics is not None,
            "dp_metrics": row.dp_metrics,
            "next_run": row.next_run,
            "next_seq": self._store.last_seq(row.id) + 1,
        }

    def of_tenant(self, tenant: str) -> list[Values]:
        """Return the ClientInfo of each of a tenant's clients, oldest first."""
        return [self.info(row) for row in self._store.clients(tenant)]

    def create(self, tenant: str, config: Mapping[str, Any] | TrainingConfig, request_id: str | None) -> Values:
        """Return the ClientInfo of a new client, or of the one that the same request has made.

        Errors: UserError for a configuration, a model or targets that are not right; Conflict for a `request_id` that
        made a client with another configuration.
        """
        _check_tenant(tenant)
        checked = training_config(config)
        if request_id is not None and (before := self._store.client_made_by(tenant, request_id)):
            return self._made_before(before, checked)
        if self._store.count_clients(tenant) >= self._params.max_clients_per_tenant:
            raise Conflict(
                f"the tenant has {self._params.max_clients_per_tenant} training clients, which is the limit: delete "
                "some."
            )
        if checked.seed is None:
            checked = replace(checked, seed=secrets.randbits(31))
        if self._params.losses is not None:  # elsewhere a module is imported when its loss is first used
            resolve_loss(checked.loss, allowed=self._params.losses, options=checked.loss_options)
        base = self.base(checked)
        if checked.dp is not None:
            from inft.client.private import with_noise

            checked = with_noise(checked)  # seconds, in which others' operations go on
        row = ClientRow(
            id=new_id("tc"),
            tenant=tenant,
            config=as_mapping(checked),
            created_at=now(),
            fingerprint=base.fingerprint,
            placement=base.placement,
            request_id=request_id,
        )
        entry = audit_entry(tenant, "create_client", row.id, "completed", {"model_ref": checked.model_ref}, request_id)
        made: Values = self._worker.call(lambda: self._created(row, entry))
        return made

    def _made_before(self, row: ClientRow, config: TrainingConfig) -> Values:
        made = training_config(row.config)
        if config.seed is None:
            made = replace(made, seed=None)
        if made.dp_config is not None and config.dp_config is not None and config.dp_config.noise_multiplier is None:
            made = replace(made, dp_config=replace(made.dp_config, noise_multiplier=None))
        if made != config:
            raise Conflict(f"request {row.request_id!r:.80} made client {row.id} with another configuration.")
        return self.info(row)

    def _created(self, row: ClientRow, entry: Values) -> Values:
        if row.request_id is not None and (before := self._store.client_made_by(row.tenant, row.request_id)):
            return self.info(before)  # two requests at once: the worker makes one after the other
        learner = self._residents.create(row)
        row = replace(row, dp_metrics=learner.dp_metrics())
        try:
            self._store.add_client(row, entry)
        except BaseException:
            self._residents.drop(row.id)
            raise
        return self.info(row)

    def delete(self, row: ClientRow, request_id: str | None) -> None:
        """Remove a client that has nothing open, its log and its snapshot; its checkpoints stay."""
        entry = audit_entry(row.tenant, "delete_client", row.id, "completed", {}, request_id)
        self._worker.call(lambda: self._deleted(row, entry))
        self._configs.pop(row.id, None)

    def _deleted(self, row: ClientRow, entry: Values) -> None:
        self._store.delete_client(row.id, entry)
        self._residents.delete(row.id)


def _check_tenant(tenant: str) -> None:
    if not tenant or len(tenant) > MOST_NAME or not tenant.isprintable():
        raise InvalidRequest(f"tenant {tenant!r:.60} is not a printable name of at most {MOST_NAME} characters.")
