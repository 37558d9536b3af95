"""A run that stops and goes on ends as one that never stopped; what is exported knows nothing of CRAFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from craft.trainers.state import HEAD_FILE, STATE_FILE

SETTINGS = [
    {"craft_negative_strategy": "queue", "craft_negative_queue_size": 10, "craft_learnable_temperature": True},
    {"craft_gradient_balancing": "gradnorm", "craft_use_gradcache": True, "craft_projection_dropout": 0.1},
    {"craft_gradient_balancing": "uncertainty", "craft_gradient_clip_per_task": True},
    {"craft_gradient_balancing": "loss_scale", "gradient_accumulation_steps": 1, "dataloader_num_workers": 1},
    {"craft_gradient_balancing": "pcgrad", "craft_beta": 0.75, "craft_contrastive_batch_size": 5},
]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **trainer.craft_loss.state_dict(prefix="head.")}


def logged(trainer: Any) -> dict[str, float]:
    """The last log's own figures; those of transformers and TRL forget the steps before the checkpoint."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {key: value for key, value in last.items() if "craft" in key}


@pytest.mark.parametrize("strategy", ["paired_dataset", "self_align"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.get("craft_gradient_balancing", "queue"))
def test_a_resumed_run_is_bit_equal(make_trainer, make_model, rows, pairs, tmp_path, strategy, settings):
    # failures 2 (head and temperature not in checkpoints), 3 (mid-epoch resume crashed), 5 (second step with a queue),
    # 22 (contrastive order from the global RNG)
    def trainer(directory: str, **more: Any) -> Any:
        return make_trainer(
            rows(22),
            pairs(15) if strategy == "paired_dataset" else None,
            model=make_model(dropout=0.1),
            **{
                "output_dir": str(tmp_path / directory),
                "max_steps": 7,
                "save_strategy": "steps",
                "save_steps": 4,
                "logging_steps": 3,
                "data_seed": 3,  # without one the order of plain batches depends on the random state before train()
                "gradient_accumulation_steps": 2,
                **settings,
                **more,
            },
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    torch.manual_seed(12345)  # another state than the first run had
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 7
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert logged(resumed) == logged(whole)
    assert (whole._craft_objective.queue is None) == ("craft_negative_strategy" not in settings)
    if whole._craft_objective.queue is not None:
        assert torch.equal(whole._craft_objective.queue.bank, resumed._craft_objective.queue.bank)


def test_a_checkpoint_holds_head_temperature_and_queue(make_trainer, rows, tmp_path):
    trainer = make_trainer(
        rows(24),
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        craft_negative_strategy="queue",
        craft_negative_queue_size=12,
    )
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert set(load_file(checkpoint / HEAD_FILE)) == set(trainer.craft_loss.state_dict())
    state = load_file(checkpoint / STATE_FILE)
    assert torch.equal(state["queue.bank"], trainer._craft_objective.queue.bank)
    assert torch.equal(state["reference"], trainer._craft_journal.reference)


def test_the_exported_adapter_loads_without_craft(make_trainer, make_model, rows, tmp_path):
    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(rows(24), model=adapted)
    trainer.train()
    out = tmp_path / "exported"
    trainer.save_model(str(out))
    assert not [path.name for path in out.iterdir() if "craft" in path.name]
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(make_model(), str(out)).eval()
    ids = torch.tensor([[70, 71, 72]])
    trainer.model.eval()
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_a_full_model_is_exported_without_the_head(make_trainer, rows, tmp_path):
    trainer = make_trainer(rows(24))
    trainer.train()
    trainer.save_model(str(tmp_path / "exported"))
    names = set(LlamaForCausalLM.from_pretrained(tmp_path / "exported").state_dict())
    assert set(load_file(tmp_path / "exported" / "model.safetensors")) <= names


@pytest.mark.parametrize(
    ("first", "second", "words"), [(1.0, 0.6, "saved without CRAFT"), (0.6, 1.0, "saved with CRAFT")]
)
def test_a_checkpoint_of_the_other_kind_is_refused(make_trainer, rows, tmp_path, first, second, words):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(rows(24), craft_alpha=first, **settings).train()
    with pytest.raises(ValueError, match=words):
        make_trainer(rows(24), craft_alpha=second, **settings).train(
            resume_from_checkpoint=str(Path(tmp_path) / "run" / "checkpoint-1")
        )


def test_another_head_is_refused_with_its_name(make_trainer, rows, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(rows(24), **settings).train()
    with pytest.raises(ValueError, match="craft_projection_dim"):
        make_trainer(rows(24), craft_projection_dim=64, **settings).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )
