"""What commands share that use a trained model: their options, and its parameters from best.json onwards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from params.presets import MODEL_NAMES

if TYPE_CHECKING:
    from params.evaluation import EvalParams

Model = Annotated[str, typer.Argument(metavar="|".join(MODEL_NAMES), help="Model family.")]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A stored adapter, such as outputs/llama32_basic/best, or its run's directory."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="ID|PATH", help="The base model's place (default: as the adapter's run says)."),
]
Demo = Annotated[
    bool, typer.Option("--demo", help="The embedded tiny model; an adapter trained on it needs no --demo.")
]
NoQuantize = Annotated[
    bool, typer.Option("--no-quantize", help="Unquantised base weights (default: as the adapter was trained).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any parameter of basic, data and qlora; repeatable."),
]


def resolve(
    model: str,
    adapter: Path | None,
    flags: dict[str, Any],
    *,
    forgetting: tuple[str, str | None] | None = None,
    overrides: Any = (),
    **own: Any,
) -> "EvalParams":
    """The parameters of an evaluation, from what best.json beside the adapter says onwards."""
    from dataclasses import replace

    from params.evaluation import resolve_eval

    common = {**recorded(adapter, model), **{name: value for name, value in own.items() if value is not None}}
    params = resolve_eval(model, flags=flags, overrides=overrides, **common)
    if forgetting is None:
        return params
    data, split = forgetting
    other = {**flags, "data": data, "split": split, "languages": "all"}
    found = resolve_eval(model, flags=other, overrides=overrides, **common).data
    if split is None:
        from inft.evaluation.splits import first_split

        found = first_split(found)
    return replace(params, forgetting=found)


def recorded(adapter: Path | None, model: str) -> dict[str, Any]:
    """What is told by the adapter: its own directory, its run's parameters, else the base model that it names."""
    if adapter is None:
        return {}
    from inft.training.stored import read_adapter, refuse_other_family

    stored = read_adapter(adapter)
    refuse_other_family(stored, model)
    if stored.record is None:
        return {"adapter": str(stored.directory), "model_name": stored.base_model}
    return {"adapter": str(stored.directory), "trained": stored.record.get("params")}


def refuse_early(params: "EvalParams") -> None:
    """UserError for what can be found wrong without torch."""
    from inft.data.locate import find_source
    from inft.models.loading import local_source

    find_source(params.data)
    if params.forgetting is not None:
        find_source(params.forgetting)
    if "/" in params.model_name:
        local_source(params.model_name)
