"""What the first process tells: the table of the rows, and the figures of a run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parallel_text import ABSENT
from stratified import Selected

from inft.training.processes import is_main, process_count

if TYPE_CHECKING:
    from craft_arguments import Arguments


def say(text: str) -> None:
    """Print in the first process."""
    if is_main():
        print(text, flush=True)


def described(sft: Sequence[Any], held_out: Sequence[Any] | None, pairs: Selected | None) -> str:
    """Return the table of what was read, left out and kept."""
    lines = [f"SFT rows: {len(sft):,}" + ("" if held_out is None else f"   evaluation rows: {len(held_out):,}")]
    if pairs is None:
        return "\n".join([*lines, "contrastive pairs: none given, prompt against answer of the SFT rows (self_align)"])
    rows = [("source", "language", "usable", "kept", "left out")]
    for stratum in sorted({*pairs.usable, *pairs.left_out}):
        reasons = _counted(pairs.left_out.get(stratum, {}))
        rows.append((stratum[0], stratum[1] or "-", f"{pairs.usable[stratum]:,}", f"{pairs.kept[stratum]:,}", reasons))
    rows.append(("all", "", f"{pairs.usable.total():,}", f"{pairs.kept.total():,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for source, language, usable, kept, reasons in rows:
        cells = [f"{source:<{widths[0]}}", f"{language:<{widths[1]}}", f"{usable:>{widths[2]}}", f"{kept:>{widths[3]}}"]
        lines.append("  ".join([*cells, reasons]).rstrip())
    return "\n".join(lines)


def reasons_of(pairs: Selected, name: str) -> str:
    """Return why rows of a source were left out, with their numbers."""
    found = [counts for (source, _), counts in pairs.left_out.items() if source == name]
    return ", ".join(_counted(counts) for counts in found)


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(why if why == ABSENT else f"{why} {count:,}" for why, count in sorted(reasons.items()))


def plan(arguments: "Arguments") -> str:
    """Return what an optimizer step holds, and what is trained, in two lines."""
    training, model, processes = arguments.training, arguments.model, process_count()
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    weights = (
        f"LoRA of rank {model.lora_r} on {', '.join(model.lora_target_modules)}" if model.use_lora else "all weights"
    )
    quantised = " over 4-bit NF4 weights" if model.load_in_4bit else ""
    length = f"{training.max_steps:,} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    return (
        f"trained: {weights}{quantised}, {length} at a learning rate of {training.learning_rate:g}\n"
        f"an optimizer step: {processes} process{'es' if processes > 1 else ''} x {steps} micro-batches x {rows} rows"
    )


def halves_note(arguments: "Arguments") -> str:
    """Return what self_align makes of conversations without a mask of the answers."""
    if arguments.training.assistant_only_loss:
        return "the answers are what the chat template marks as the assistant's"
    return (
        "note: without a mask of the answers, self_align sets the first half of each conversation against its second. "
        "For prompt against answer give --assistant_only_loss true, or rows of prompt and completion."
    )
