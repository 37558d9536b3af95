"""inft serve: the training client's service over HTTP."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from params.client import EngineParams, ServeParams
from params.client_resolve import ENGINE, SERVE
from params.describe import describe
from params.errors import UserError
from params.schema import Schema
from params.yamlfile import Given

if TYPE_CHECKING:
    import socket

    from inft.client.api.auth import Keys
    from inft.client.engine import Engine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
EXAMPLES = """\b
Examples:
  inft serve
  inft serve --model llama=meta-llama/Llama-3.2-1B-Instruct --device cuda
  inft serve --host 0.0.0.0 --api-key-file keys.txt --model demo=embedded/text

\b
A file of keys has a line for each tenant, its name and its key:
  (umask 077; python -c "import secrets; print('ada', 'tml-' + secrets.token_urlsafe(24))" >> keys.txt)
"""
_SCHEMA = Schema(object, {"engine": EngineParams, "serve": ServeParams}, "--{}")
_TEXTS = {text.name.partition(".")[2]: text for section in _SCHEMA.sections for text in describe(section, _SCHEMA)}
Params = TypeVar("Params", EngineParams, ServeParams)


def _option(name: str, metavar: str, *, words: str | None = None) -> Any:
    text = _TEXTS[name]
    said = words or text.help
    default = "" if text.default == "none" else f" (default {text.default})"
    help_text = f"{said[:1].upper()}{said[1:]}{default}"
    return typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=help_text, show_default=False)


def _flag(name: str, words: str) -> Any:
    return typer.Option(f"--{name}", help=words, show_default=False)


@app.command(epilog=EXAMPLES)
def serve(
    context: typer.Context,
    host: Annotated[str | None, _option("host", "HOST", words="Address; others than loopback need keys")] = None,
    port: Annotated[str | None, _option("port", "N")] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME[=PATH]",
            help="A model that clients may name, with its hub id, directory or embedded/…; repeatable (default: the "
            "embedded models).",
        ),
    ] = None,
    api_key_file: Annotated[str | None, _option("api_key_file", "FILE")] = None,
    state_dir: Annotated[str | None, _option("state_dir", "DIR")] = None,
    allow_losses: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-loss", metavar="MODULE:FUNCTION", help="A loss of your own beside the built-in ones; repeatable."
        ),
    ] = None,
    device: Annotated[str | None, _option("device", "auto|cpu|cuda")] = None,
    dtype: Annotated[str | None, _option("dtype", "auto|float32|bfloat16")] = None,
    quantize: Annotated[bool, _flag("quantize", "Load the base in 4 bit (NF4), for QLoRA.")] = False,
    durable: Annotated[
        bool,
        typer.Option(
            "--durable/--no-durable",
            help="Wait for the disk at each request, which survives a power cut too; a killed process loses nothing "
            "either way (default durable).",
            show_default=False,
        ),
    ] = True,
    snapshot_steps: Annotated[str | None, _option("snapshot_steps", "N")] = None,
    max_resident_clients: Annotated[str | None, _option("max_resident_clients", "N")] = None,
    max_pending: Annotated[str | None, _option("max_pending", "N")] = None,
    max_pending_per_tenant: Annotated[str | None, _option("max_pending_per_tenant", "N")] = None,
    max_clients_per_tenant: Annotated[str | None, _option("max_clients_per_tenant", "N")] = None,
    max_batch_tokens: Annotated[str | None, _option("max_batch_tokens", "N")] = None,
    max_attempts: Annotated[str | None, _option("max_attempts", "N")] = None,
    rate_limit: Annotated[str | None, _option("rate_limit", "X")] = None,
    rate_burst: Annotated[str | None, _option("rate_burst", "N")] = None,
    max_body_bytes: Annotated[str | None, _option("max_body_bytes", "N")] = None,
    max_wait_s: Annotated[str | None, _option("max_wait_s", "SECONDS")] = None,
) -> None:
    """Run the training service over HTTP.

    Clients train LoRA adapters of their own on models that are loaded once: forward_backward, optim_step, sample,
    save_state and load_state, from Python (inft.client.ServiceClient with the URL) or as plain JSON under /v1, which
    /openapi.json describes. What was accepted survives a crash: it runs when the service is started again on the same
    state directory. Without keys there is one tenant, and the service answers this machine alone. Traffic is not
    encrypted: put a proxy with TLS before a public address. Ctrl-C or SIGTERM finishes the running operation and keeps
    the rest for the next start; a second one ends at once. "inft audit verify" checks the log of who did what.
    """
    from inft.cli.extras import require_client

    given = {name: value for name, value in context.params.items() if name in _TEXTS and value is not None}
    given |= {"models": named_models(models), "losses": allowed(allow_losses), "any_model": False}
    engine_params = checked(ENGINE, EngineParams, given)
    params = checked(SERVE, ServeParams, given)
    require_client()
    run(engine_params, params)


def checked(schema: Schema, kind: type[Params], given: Mapping[str, Any]) -> Params:
    """The parameters of those options that are its fields; one UserError that lists everything wrong."""
    problems: list[str] = []
    own = {
        name: Given(value, f"--{name.replace('_', '-')}", isinstance(value, str))
        for name, value in given.items()
        if name in schema.field_types
    }
    found = schema.checked(own, problems)
    if problems:
        raise UserError("\n".join(problems))
    return kind(**found)


def named_models(given: list[str] | None) -> dict[str, str]:
    """What --model names, by the clients' names; the embedded models where nothing is named."""
    from inft.models import MODELS

    if not given:
        return {f"embedded/{name}": f"embedded/{name}" for name in MODELS}
    models: dict[str, str] = {}
    for text in given:
        name, equals, target = text.partition("=")
        if not name or (equals and not target):
            raise UserError(f"--model {text!r}: give NAME, or NAME=PATH.")
        if name in models:
            raise UserError(f"--model {name} is given twice: give each model a name of its own.")
        models[name] = target or name
    return models


def allowed(given: list[str] | None) -> tuple[str, ...]:
    """The built-in losses and those that --allow-loss names, which must exist."""
    from inft.client.losses.registry import BUILT_IN, resolve_loss

    for loss in given or []:
        if ":" not in loss:
            raise UserError(f"--allow-loss {loss!r}: give module:function; the built-in losses are always allowed.")
        resolve_loss(loss)
    return (*BUILT_IN, *(given or []))


def run(engine_params: EngineParams, params: ServeParams) -> None:
    """Serve until a signal, then close the engine: its running operation is finished, the rest stays in its log."""
    from inft.client.api.auth import read_keys
    from inft.client.api.server import bind, is_public

    keys = read_keys(Path(params.api_key_file).expanduser()) if params.api_key_file is not None else None
    with closing(bind(params.host, params.port)) as bound:
        if keys is None and is_public(bound):
            raise UserError(
                f"host {params.host} can be reached from other machines, and there are no keys: give --api-key-file, "
                "or leave --host out."
            )
        run_on(bound, engine_params, params, keys)


def run_on(bound: "socket.socket", engine_params: EngineParams, params: ServeParams, keys: "Keys | None") -> None:
    """Load the models, and serve on a bound socket."""
    from inft.client.api.app import create_app
    from inft.client.api.server import Server, stopping
    from inft.client.engine import Engine
    from inft.training.quiet import quiet_libraries

    quiet_libraries(progress_bars=False)
    with Engine(engine_params, preload=True) as engine:
        names = engine.health()["models"]
        pending = engine.health()["pending"]

        def ready() -> None:
            for line in ready_lines(bound, names, keys, pending):
                print(line, flush=True)

        server = Server(create_app(engine, params, keys=keys), ready=ready)
        with stopping(server):
            server.run(sockets=[bound])
            close(engine)


def close(engine: "Engine") -> None:
    """End the engine, and say what is kept."""
    print("stopping: the running operation is finished first; once more ends at once", flush=True)
    engine.close()
    print("stopped: what had not run is kept in the state directory, and runs at the next start", flush=True)


def ready_lines(bound: "socket.socket", names: list[str], keys: "Keys | None", pending: int) -> Iterator[str]:
    """What a user is told once the service answers."""
    from inft.client.api.server import url_of

    who = "this machine alone, no key" if keys is None else f"tenants: {', '.join(keys.tenants)}"
    yield f"serving {url_of(bound)} · models: {', '.join(names)} · {who} · stop with Ctrl-C"
    if pending:
        yield f"{pending} operations that were accepted before are running now"
