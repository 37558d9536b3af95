"""What each of two processes does for test_craft_joint_processes.py, which launches it with the directory OUT."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from joint_trainers import make_joint, method_rows, preference_rows
from tiny_runs import pair_rows, tiny_llama
from transformers import AutoTokenizer
from two_processes import everyones, identical_everywhere


def run(out: Path, name: str, method: str, strategy: str, **config: Any) -> dict[str, Any]:
    """Train, and say whether both replicas are equal, what was logged and which rows this rank had."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    trainer = make_joint(method, out / name, tokenizer, strategy=strategy, max_steps=5, **config)
    pairs: list[list[int]] = []
    if trainer._craft_stream is not None:
        take = trainer._craft_stream.take
        trainer._craft_stream.take = lambda number: [pairs.extend(b["input_ids"].tolist()) or b for b in take(number)]
    trainer.train()
    logs = [{k: v for k, v in e.items() if "craft" in k} for e in trainer.state.log_history if "loss" in e]
    return {"identical": identical_everywhere(trainer), "logs": everyones(logs), "pairs": everyones(pairs)}


def resumed(out: Path) -> bool:
    """Whether a DPO run with pairs that stops and goes on ends as one that does not, on both ranks."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    settings = {"strategy": "paired_dataset", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "data_seed": 1}
    whole = make_joint("dpo", out / "whole", tokenizer, **settings)
    whole.train()
    again = make_joint("dpo", out / "again", tokenizer, **settings)
    again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    return all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def gradients_of_both(out: Path) -> float:
    """Relative difference of the weights after one SGD step of two processes to one with the same rows in one."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    rows: Dataset = preference_rows(4)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    trainer = make_joint(
        "dpo", out / "one", tokenizer, rows=rows, per_device_train_batch_size=2, learning_rate=0.1, **settings
    )
    start = [p.detach().clone() for p in tiny_llama().parameters()]
    trainer.train()
    moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)])
    torch.save(moved, out / "moved.pt")
    return float(moved.norm())


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "dpo self_align": run(out, "a", "dpo", "self_align", craft_learnable_temperature=True),
        "dpo pairs": run(out, "b", "dpo", "paired_dataset", craft_gradient_balancing="pcgrad"),
        "grpo self_align": run(out, "c", "grpo", "self_align", rows=method_rows("grpo")),
        "grpo pairs": run(out, "d", "grpo", "paired_dataset", craft_gradient_clip_per_task=True),
        "dpo streamed pairs": run(
            out, "f", "dpo", "paired_dataset", pairs=pair_rows(10).to_iterable_dataset(), craft_alpha=0.5
        ),
        "orpo self_align": run(out, "e", "orpo", "self_align"),
        "resumed": everyones(resumed(out)),
        "moved": gradients_of_both(out),
    }
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
