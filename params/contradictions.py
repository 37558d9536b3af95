"""Parameters that are each right but cannot hold together, or that a run would ignore."""

from params.train import TrainParams


def contradictions(params: TrainParams) -> list[str]:
    """One message per contradiction, each with its remedy; empty when the parameters agree."""
    return [*_data(params), *_model(params)]


def _data(params: TrainParams) -> list[str]:
    data, problems = params.data, []
    unnamed = [code for code in data.languages if code not in data.language_names]
    if not data.languages:
        problems.append("data.languages is empty: name at least one language, such as --languages en,ur.")
    if len(set(data.languages)) < len(data.languages):
        problems.append(f"data.languages names a language twice: {', '.join(data.languages)}.")
    if unnamed:
        problems.append(
            f"data.languages: {', '.join(unnamed)} has no name for the prompt; "
            f"add it: --set 'data.language_names={{{unnamed[0]}: NAME}}'."
        )
    if data.batch_size != 1:
        problems.append(
            "data.batch_size belongs to build_processed_dataset and has no effect here; "
            "set sft.per_device_train_batch_size."
        )
    return problems


def _model(params: TrainParams) -> list[str]:
    problems = []
    if not params.model_name and not params.demo:
        problems.append("the model name is empty: name a hub id or a local path with --model, or give --demo.")
    if params.qlora.quantize_vision and not params.qlora.load_in_4bit:
        problems.append("qlora.quantize_vision has no effect without 4 bit: drop it or set qlora.load_in_4bit=true.")
    if params.lora.init == "pissa" and params.qlora.load_in_4bit:
        problems.append("lora.init=pissa takes the principal components of unquantised weights: add --no-quantize.")
    return problems
