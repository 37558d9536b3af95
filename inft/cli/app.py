"""The `inft` command group, and the one place where a user's mistake becomes a message."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from inft.cli import COMMANDS, INTERRUPTED
from inft.training.processes import is_main, wait_for_main
from params.errors import UserError

if TYPE_CHECKING:
    from typer._click import Command, Context


class LazyGroup(TyperGroup):
    """Commands are imported when they are asked for; UserError ends with a message and status 2."""

    def list_commands(self, ctx: "Context") -> list[str]:
        """The names in COMMANDS, in its order."""
        return list(COMMANDS)

    def get_command(self, ctx: "Context", cmd_name: str) -> "Command | None":
        """Import and return one command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command = typer.main.get_command(getattr(import_module(module), attribute))
        command.name = cmd_name
        return command

    def invoke(self, ctx: "Context") -> Any:
        """Run the command; a UserError is printed to stderr without a traceback."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            wait_for_main()
            prefix = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
            print(prefix, error, file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            if is_main():
                print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error


_typer = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@_typer.callback()
def _root() -> None:
    """Fine-tune vision-language models and text models on captioned images in many languages."""


def app(args: Sequence[str] | None = None, *, prog_name: str = "inft") -> None:
    """Run one command line and exit with its status."""
    typer.main.get_command(_typer)(args=args, prog_name=prog_name)
