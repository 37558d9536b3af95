"""The command line of train_craft.py, read by transformers' HfArgumentParser, and its --help."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from craft_arguments import Arguments, DataArguments, ModelArguments, RunArguments, TrainingFlags
from refusals import refusals_told, refuse_flags
from transformers import HfArgumentParser

from craft.config import CRAFTConfigMixin
from craft.fields import did_you_mean
from craft.presets import CRAFT_PRESETS, get_preset
from inft.training.hardware import has_bf16
from params.errors import UserError

EXAMPLES = """examples:
  python train_craft.py --model_name_or_path MODEL --sft_data train.jsonl --output_dir out   (self_align)
  torchrun --nproc_per_node 4 train_craft.py --model_name_or_path MODEL --load_in_4bit --sft_data train.jsonl \\
      --sources flores nllb=bitext/ all-nli mine=pairs.jsonl --languages sin_Sinh urd_Arab yue_Hant \\
      --max_contrastive_samples 50000 --craft_preset balanced --output_dir out
  the same command with --resume_from_checkpoint latest goes on after the last checkpoint."""

# Arguments of the trainer that --help shows; --help_all shows the others, too.
SHOWN = (
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_length",
    "bf16",
    "seed",
    "assistant_only_loss",
    "completion_only_loss",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "resume_from_checkpoint",
)
# What these flags mean here.
HELP = {
    "output_dir": "Directory of the rows, the checkpoints and the adapter.",
    "resume_from_checkpoint": "latest, or a checkpoint of the output directory: go on after it, with the same flags.",
    "craft_contrastive_keys": 'JSON, such as {"anchor_labels": "my_labels"}: role -> column of the batches.',
}


def parse(argv: Sequence[str]) -> Arguments:
    """Return the arguments of a command line.

    Errors: UserError for an unknown flag, with the one that was meant, for a value that is not allowed, and for a
    flag that nothing reads.
    """
    parser = make_parser(argv)
    with refusals_told():
        model, data, run, training, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        told = [f"{word}{did_you_mean(word, flags) if word.startswith('--') else ''}" for word in unknown]
        raise UserError(f"unknown: {' '.join(told)} (--help lists the flags, --help_all those of the trainer too)")
    refuse_flags(training)
    return Arguments(model=model, data=data, run=run, training=training)


def make_parser(argv: Sequence[str]) -> HfArgumentParser:
    """Return the parser of every flag, with the defaults that follow from the machine and from other flags."""
    parser = _Parser(
        [ModelArguments, DataArguments, RunArguments, TrainingFlags],
        description="Fine-tune a language model with SFT and CRAFT's contrastive term, in one process or in several.",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", help="Show every argument of the trainer as well.")
    _read_words(parser)
    parser.set_defaults(**_defaults(argv))
    own = {f.name for cls in (ModelArguments, DataArguments, RunArguments, CRAFTConfigMixin) for f in fields(cls)}
    for action in parser._actions:
        shown = "--help_all" in argv or action.dest in (*own, *SHOWN, "help", "help_all")
        if not shown or action.option_strings[0].startswith("--no_"):  # false says the same
            action.help = argparse.SUPPRESS
        elif action.dest in HELP:
            action.help = HELP[action.dest]
    return parser


class _Parser(HfArgumentParser):
    """Says what is wrong as a UserError, which the first process alone prints."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and says defaults only where there are any."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = (
            action.default in (None, [], argparse.SUPPRESS)
            or isinstance(action.default, dict)
            or "Defaults to" in (action.help or "")
        )
        return action.help if plain else super()._get_help_string(action)

    def _format_usage(self, *args: Any, **kwargs: Any) -> str:
        return f"usage: {self._prog} --model_name_or_path MODEL --sft_data PATH --output_dir DIR [flags]\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The flag as its underscores are written, once: each also exists with hyphens."""
        name = next((option for option in action.option_strings if option.startswith("--")), "")
        others = [option for option in action.option_strings if option.replace("-", "_") != name.replace("-", "_")]
        word = "true|false" if action.nargs == "?" else action.dest.split("_")[-1].upper()
        value = "" if action.nargs == 0 else f" {self._format_args(action, word)}"
        return f"{', '.join([name, *others])}{value}"


def _defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Defaults that replace those of the arguments' classes."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--craft_preset", "--eval_data", "--save_steps", "--save_strategy"):
        early.add_argument(name, name.replace("_", "-"))
    given, _ = early.parse_known_args(list(argv))
    found: dict[str, Any] = {"bf16": has_bf16(), **_processor()}
    if given.craft_preset in CRAFT_PRESETS:  # any other is refused when it is parsed
        found |= get_preset(given.craft_preset)
    if given.eval_data is not None and given.save_strategy == "no":
        found |= {"eval_strategy": "epoch"}
    elif given.eval_data is not None:
        found |= {
            "eval_strategy": given.save_strategy or "steps",
            "eval_steps": given.save_steps or "500",  # text, which the parser checks as if it had been given
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return found


def _processor() -> dict[str, bool]:
    import torch

    return {} if torch.cuda.is_available() else {"use_cpu": True, "dataloader_pin_memory": False}


def _read_words(parser: HfArgumentParser) -> None:
    """Let craft_* flags take "none" where they may be unset, and tell why a value of theirs is refused."""
    hints = get_type_hints(CRAFTConfigMixin)
    for action in parser._actions:
        if action.dest in hints and action.type is not None:
            action.type = _converter(action.type, may_be_none=NoneType in get_args(hints[action.dest]))


def _converter(kind: Any, *, may_be_none: bool) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        if may_be_none and word.lower() == "none":
            return None
        try:
            return kind(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r}: {error}") from error

    return convert
