"""One walk: the first process chooses the rows; every process loads the model and trains; the adapter is saved."""

from pathlib import Path

from craft_arguments import Arguments
from refusals import refusals_told, require_output_dir
from run_data import RunData, load_data, read_data, refuse_other_plan, write_data
from run_model import load_model_and_tokenizer, lora_config, require_model, save_result
from run_report import described, halves_note, plan, say
from run_resume import WholeCheckpoints, find_checkpoint, goes_on, refuse_other_flags, write_run_file

from craft.trainers import CRAFTSFTTrainer
from inft.training.processes import is_main, on_main


def run(arguments: Arguments) -> CRAFTSFTTrainer | None:
    """Train, and return the trainer; None after a dry run."""
    checkpoint = on_main(lambda: find_checkpoint(arguments))
    data = prepare_data(arguments)
    if data is None:
        return None
    trainer = make_trainer(arguments, data)
    say(f"{plan(arguments)}\nCRAFT: {trainer.craft_plan or 'off (craft_alpha=1)'}")
    if trainer.craft_enabled and data.pairs is None and "messages" in data.sft.column_names:
        say(halves_note(arguments))
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    with refusals_told(with_place=True):
        trainer.train(resume_from_checkpoint=checkpoint)
    if is_main():
        say(f"saved: {save_result(trainer)}")
    return trainer


def prepare_data(arguments: Arguments) -> RunData | None:
    """The rows of the run, chosen by the first process and loaded by all; None after a dry run."""
    data_plan, directory = arguments.data_plan(), Path(arguments.training.output_dir) / "data"

    def write() -> None:
        # Before what may take long.
        require_model(arguments.model)
        require_output_dir(arguments.training.output_dir, make=not arguments.run.dry_run)
        if arguments.run.dry_run:
            say(f"{described(*read_data(data_plan))}\n{plan(arguments)}")
        elif goes_on(arguments):
            refuse_other_plan(data_plan, directory)
            refuse_other_flags(arguments)
        else:
            write_data(data_plan, directory)
            write_run_file(arguments)

    on_main(write)
    return None if arguments.run.dry_run else load_data(directory)


def make_trainer(arguments: Arguments, data: RunData) -> CRAFTSFTTrainer:
    """The trainer; what it refuses is a UserError."""
    model, tokenizer = load_model_and_tokenizer(arguments)
    with refusals_told():
        return CRAFTSFTTrainer(
            model=model,
            args=arguments.training,
            train_dataset=data.sft,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=lora_config(arguments.model),
            contrastive_dataset=data.pairs,
            callbacks=[WholeCheckpoints()],
        )
