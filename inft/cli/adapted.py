"""What commands share that use a trained model: their options, and its parameters from best.json onwards."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from params.errors import UserError
from params.presets import MODEL_NAMES

if TYPE_CHECKING:
    from params.evaluation import EvalParams

READ = ("basic", "data", "qlora")  # sections of a run's parameters that are used here
FORGETTING = "forgetting."  # of --set: a field of the forgetting data
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
    base: bool = False,
    forgetting: tuple[str, str | None] | None = None,
    overrides: Sequence[str] = (),
    **own: Any,
) -> "EvalParams":
    """The parameters of an evaluation, from what was recorded beside the adapter onwards.

    With ``base`` the adapter is left out and its record stays: the same rows and prompts for the base model. Overrides
    that begin with "forgetting." stand for the data section of the forgetting data.
    """
    from dataclasses import replace

    from params.evaluation import resolve_eval

    common = {**recorded(adapter, model), **{name: value for name, value in own.items() if value is not None}}
    if common.get("model_name") == "":  # the embedded model, as the adapter says
        common |= {"model_name": None, "demo": True}
    if base:
        common["adapter"] = None
    of_forgetting = [text for text in overrides if text.startswith(FORGETTING)]
    main = [text for text in overrides if text not in of_forgetting]
    if of_forgetting and forgetting is None:
        raise UserError(f"--set {of_forgetting[0]}: there is no forgetting data: give --forgetting.")
    main = [*precision_of_merged(common.get("model_name")), *main]
    params = resolve_eval(model, flags=flags, overrides=main, **common)
    if forgetting is None:
        return params
    data, split = forgetting
    other = {**flags, "data": data, "split": split, "languages": "all"}
    shared = [text for text in main if data == params.data.data or not text.startswith("data.columns")]
    theirs = [f"data.{text.removeprefix(FORGETTING)}" for text in of_forgetting]
    found = resolve_eval(model, flags=other, overrides=[*shared, *theirs], **common).data
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
    trained = (stored.record or {}).get("params") or parameters_beside(stored.directory, model)
    if not (trained is None or (isinstance(trained, dict) and all(isinstance(trained.get(k, {}), dict) for k in READ))):
        raise UserError(
            f"{stored.directory}/best.json is damaged: its params are no sections. Copy the directory again."
        )
    if trained is None:
        print(
            f"note: nothing beside {stored.directory} says how it was trained: prompt, precision and length are the "
            "defaults. --set changes them.",
            file=sys.stderr,
        )
        return {"adapter": str(stored.directory), "model_name": stored.base_model}
    return {"adapter": str(stored.directory), "trained": trained}


def precision_of_merged(name: str | None) -> list[str]:
    """The precision in which `inft merge` wrote a model, as overrides; none for any other model."""
    from inft.evaluation.merged import MERGE_FILE, read_merged

    if not name or not (Path(name) / MERGE_FILE).is_file():
        return []
    return ["qlora.load_in_4bit=false", f"basic.dtype={read_merged(Path(name))['dtype']}"]


def parameters_beside(directory: Path, model: str) -> dict[str, Any] | None:
    """The parameters of the run that a checkpoint belongs to; None where no params.yaml lies above it."""
    from dataclasses import asdict

    from inft.training.resume import PARAMS_FILE
    from params.resolve import load_params

    file = directory.resolve().parent / PARAMS_FILE
    if not file.is_file():
        return None
    params = load_params(file)
    if params.model != model:
        raise UserError(f"{directory} is of a run of {params.model}: write {params.model} instead of {model}.")
    return asdict(params)


def refuse_early(params: "EvalParams") -> None:
    """UserError for what can be found wrong without torch."""
    from inft.data.locate import find_source
    from inft.models.loading import local_source

    find_source(params.data)
    if params.forgetting is not None:
        find_source(params.forgetting)
    if "/" in params.model_name:
        local_source(params.model_name)
