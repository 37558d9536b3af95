"""Commands that take any parameter as ``--section.key value`` beside their own options."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click import Context

DOTTED = re.compile(r"--\w+(\.\w[\w-]*)+(=.*)?", re.DOTALL)
GIVEN = "inft.dotted"  # in the context: the arguments of that form, with their values
EPILOG = "Any parameter of `inft list-params --encoder`: --section.key value."

Resume = Annotated[
    str | None,
    typer.Option(metavar="[latest|PATH]", help="Go on exactly where a run stood: --trainer.resume_from_checkpoint."),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of weights, data order and masks (42).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory.")]


def config_argument(words: str) -> Any:
    """What says that a positional argument is the configuration file."""
    return typer.Argument(metavar="CONFIG.yaml", help=words, show_default=False)


class DottedCommand(TyperCommand):
    """Sets ``--section.key value`` aside before the options are parsed; `--resume` may stand alone."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """Part the arguments, then parse the rest as ever."""
        own, ctx.meta[GIVEN] = parted(args)
        return super().parse_args(ctx, with_latest(own))


def parted(args: list[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and the dotted ones with the value that follows each."""
    own: list[str] = []
    dotted: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if not DOTTED.fullmatch(argument):
            own.append(argument)
            continue
        dotted.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            dotted.append(rest.pop(0))
    return own, dotted


def with_latest(args: list[str]) -> list[str]:
    """The arguments with "latest" after a --resume that is followed by an option or by nothing."""
    filled: list[str] = []
    for number, argument in enumerate(args):
        filled.append(argument)
        following = args[number + 1] if number + 1 < len(args) else "-"
        if argument == "--resume" and following.startswith("-"):
            filled.append("latest")
    return filled
