"""inft list-modules: linear layers by part, and which of them each mode adapts."""

from typing import Annotated

import typer

from inft.cli.console import make_console
from params.presets import MODEL_NAMES, TRAINING_MODES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def list_modules(
    model: Annotated[str, typer.Argument(metavar="|".join(MODEL_NAMES), help="Model family.")],
    training_mode: Annotated[
        str | None, typer.Option(metavar="|".join(TRAINING_MODES), help="Only this mode (default: each).")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model", metavar="ID|PATH", help="Another model of the family.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The embedded tiny model.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Such as lora.r=16; repeatable.")
    ] = None,
) -> None:
    """Show linear layers and what gets adapters.

    By part, with shapes and the parameters that each mode trains; no weights are read.
    """
    from inft.cli.extras import require_extras

    require_extras("peft", "accelerate")
    from inft.cli.modeltext import adapters_table, layers_table
    from inft.models import load_spec
    from inft.models.modules import linear_groups, meta_model
    from params.resolve import resolve_train

    runs = [
        resolve_train(
            model, training_mode=mode, demo=demo or None, overrides=overrides or (), flags={"model": model_name}
        )
        for mode in ([training_mode] if training_mode else TRAINING_MODES)
    ]
    spec = load_spec(model)
    empty = meta_model(spec, runs[0].model_name)
    console = make_console()
    console.print(layers_table(linear_groups(empty, spec), title=runs[0].model_name or f"embedded {model}"))
    console.print(adapters_table(empty, spec, runs))
