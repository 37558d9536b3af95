"""What is refused before a run begins, and how the refusals of the libraries are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from params.errors import UserError

if TYPE_CHECKING:
    from craft_arguments import TrainingFlags

# Arguments of TRL's SFTConfig that nothing reads here, and what to give instead.
UNREAD = {
    "model_init_kwargs": "the model is loaded by --model_name_or_path, --dtype, --attn_implementation and "
    "--load_in_4bit: give these",
    "trust_remote_code": "code that comes with a model is never run here: leave it out",
    "dataset_text_field": "texts are read from the column text: rename the column",
}
AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
OWN_PACKAGES = ("craft", "inft", "params")
LIBRARY_ABSENT = "to be installed"  # transformers' RuntimeError for --report_to


def refuse_flags(training: "TrainingFlags") -> None:
    """UserError for flags of the trainer that nothing reads, and for numbers that no run can have."""
    for name, remedy in UNREAD.items():
        if getattr(training, name) != getattr(type(training), name):
            raise UserError(f"--{name} is not read: {remedy}.")
    for name in AT_LEAST_ONE:
        value = getattr(training, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")
    if not training.learning_rate >= 0:  # nan, too
        raise UserError(f"--learning_rate {training.learning_rate:g} must be at least 0.")
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs {training.num_train_epochs:g} must be above 0, or give --max_steps.")


def require_output_dir(given: str, *, make: bool) -> None:
    """UserError when there can be no directory of that name; with ``make`` it is there afterwards."""
    directory = Path(given)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output_dir {given}: {there} is a file. Choose another directory.")
    if make:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {given} cannot be made ({error}). Choose another directory.") from error


@contextmanager
def refusals_told(*, with_place: bool = False) -> Iterator[None]:
    """Turn what the libraries refuse, and what they lack, into a UserError.

    ``with_place`` names the line of a library, for what may as well be a fault of the program: training is long.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{error}{_place(error) if with_place else ''}") from error
    except ImportError as error:
        raise _absent(error) from error
    except RuntimeError as error:
        if LIBRARY_ABSENT not in str(error):
            raise
        raise _absent(error) from error


def _absent(error: Exception) -> UserError:
    return UserError(f"{str(error).strip().rstrip('.')}. Install it, or leave out the flag that asks for it.")


def _place(error: BaseException) -> str:
    """Where a library raised an error; "" for our own, whose messages say what to do."""
    step: Any = error.__traceback__
    while step.tb_next is not None:
        step = step.tb_next
    module = step.tb_frame.f_globals.get("__name__", "")
    return "" if module.split(".")[0] in OWN_PACKAGES else f" ({module}, line {step.tb_lineno})"
