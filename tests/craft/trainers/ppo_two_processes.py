"""What each of two processes does for test_ppo_processes.py, which launches it with the directory OUT."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ppo_runs import letters, make_ppo, prompt_rows, training_logs
from tiny_runs import pair_rows
from transformers import AutoTokenizer

from craft import CRAFTPPOConfig, CRAFTPPOTrainer
from craft.ppo.losses import whiten


def everyones(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


def run(out: Path, name: str, **given: Any) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    seen: list[Any] = []

    def watched(prompts: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.append([list(columns["number"]), [list(ids) for ids in completion_ids]])
        return letters(completion_ids)

    given.setdefault("trainer", {})["eval_dataset"] = prompt_rows(5)
    given = {"rows": prompt_rows(32), "max_steps": 6, **given}
    trainer = make_ppo(out / name, tokenizer, reward_funcs=watched, **given)
    trainer.train()
    rollouts = everyones(seen[:3])
    parameters = [*trainer.model.parameters(), *trainer.value_head.parameters()]
    flat = torch.cat([p.detach().double().flatten() for p in parameters])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    metrics = trainer.evaluate()
    return {
        "identical": torch.equal(*both),
        "value": float(trainer.value_head.weight.detach().abs().sum()),
        "rollouts": rollouts,
        "logs": everyones([{k: v for k, v in e.items() if k != "epoch"} for e in training_logs(trainer)]),
        "evaluated": everyones({k: v for k, v in metrics.items() if "reward" in k or "kl" in k}),
    }


def whitened() -> dict[str, Any]:
    """Whitening of tokens that two processes hold: 3 and 1 of them."""
    torch.manual_seed(dist.get_rank())
    x, mask = torch.randn(1, 3, dtype=torch.float64), torch.tensor([[True, dist.get_rank() == 0, dist.get_rank() == 0]])
    return {"x": everyones(x[mask].tolist()), "white": everyones(whiten(x, mask)[mask].tolist())}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    craft = {"cls": CRAFTPPOTrainer, "args_class": CRAFTPPOConfig}
    found = {
        "whitened": whitened(),
        "plain": run(out, "plain"),
        "one prompt": run(out, "one", rows=[{"prompt": "one", "number": 0}], max_steps=1),
        "self_align": run(out, "self_align", **craft),
        "paired_dataset": run(out, "paired", **craft, trainer={"contrastive_dataset": pair_rows(12)}),
    }
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
