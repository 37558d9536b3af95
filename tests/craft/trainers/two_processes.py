"""What each of two processes does for test_craft_processes.py, which launches it with the directory OUT."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_craft_objective import head, last_state, pooled, relative_error, token_losses
from tiny_runs import Spy, pair_rows, prompt_rows, tiny_llama
from transformers import AutoTokenizer

from craft.config import CRAFTSFTConfig
from craft.spans import self_align_spans
from craft.trainers import CRAFTSFTTrainer


def make(out: Path, strategy: str, **config: Any) -> CRAFTSFTTrainer:
    settings = {
        "output_dir": str(out / "run"),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
        "logging_steps": 5,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
    }
    config = {**settings, **config}
    dtype = config.pop("dtype", torch.float32)
    return CRAFTSFTTrainer(
        model=tiny_llama(dtype=dtype),
        args=CRAFTSFTConfig(**config),
        train_dataset=prompt_rows(30),
        contrastive_dataset=pair_rows(26) if strategy == "paired_dataset" else None,
        processing_class=AutoTokenizer.from_pretrained(out / "tokenizer"),
    )


def identical_everywhere(trainer: Any) -> bool:
    """Whether every weight, the head's and the balancer's included, is the same on both ranks."""
    flat = torch.cat(
        [p.detach().double().flatten() for p in (*trainer.model.parameters(), *trainer.craft_parameters())]
    )
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return torch.equal(*both)


def rows_seen(spy: Spy) -> dict[str, list[list[int]]]:
    """Input ids of every row that this rank trained on, by kind."""
    seen: dict[str, list[list[int]]] = {"sft": [], "craft": []}
    for step in spy.batches:
        for batch in step:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                seen[batch.get("craft_batch_type", "sft")].append(ids[mask.bool()].tolist())
    return seen


def everyones(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


def replicas(out: Path, strategy: str, **config: Any) -> dict[str, Any]:
    trainer = make(out, strategy, **config)
    spy = Spy().watch(trainer)
    trainer.train()
    seen = everyones(rows_seen(spy))
    logs = [{k: v for k, v in entry.items() if "craft" in k} for entry in trainer.state.log_history if "loss" in entry]
    return {
        "identical": identical_everywhere(trainer),
        "steps": trainer.state.global_step,
        "seen": seen,
        "logs": everyones(logs),
    }


def exactness(out: Path, strategy: str, **config: Any) -> float:
    """Largest relative error of a step's gradient against the objective over both ranks' batches in one process."""
    trainer = make(out, strategy, max_steps=3, max_grad_norm=0.0, dtype=torch.float64, **config)
    trainer.craft_loss.double()
    spy = Spy().watch(trainer)
    errors = []
    keep = spy.on_pre_optimizer_step

    def compare(*args: Any, **kwargs: Any) -> None:
        keep(*args, **kwargs)
        parameters = [*trainer.model.parameters(), *trainer.craft_loss.parameters()]
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        objective(trainer, everyones(spy.batches[-1])).backward()
        errors.append(relative_error(spy.gradients[-1], trainer))
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    spy.on_pre_optimizer_step = compare
    trainer.train()
    assert len(errors) == 3
    return max(errors)


def objective(trainer: Any, ranks: list[list[dict[str, Any]]]) -> torch.Tensor:
    """The objective over one step's micro-batches of both ranks; negatives are those of both ranks' micro-batch."""
    tokens, anchors = [], []
    tau = trainer.craft_loss.temperature
    for micro in zip(*ranks, strict=True):
        sides: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in micro:
            if batch.get("craft_batch_type", "sft") == "sft":
                tokens.append(token_losses(trainer.model, batch))
            if trainer.craft_bundle.strategy == "self_align":
                spans = self_align_spans(batch, strategy="auto", mask_key=None)
                hidden = last_state(trainer.model, batch["input_ids"], batch["attention_mask"])
                sides.append((pooled(hidden, spans.anchor_BT), pooled(hidden, spans.positive_BT)))
            elif batch.get("craft_batch_type") == "craft":
                states = [
                    last_state(trainer.model, batch["input_ids" + end], batch["attention_mask" + end])
                    for end in ("", "_tgt")
                ]
                sides.append(
                    (pooled(states[0], batch["attention_mask"]), pooled(states[1], batch["attention_mask_tgt"]))
                )
        if sides:
            a, p = (head(trainer, torch.cat(parts)) for parts in zip(*sides, strict=True))
            logits = a @ p.T / tau
            anchors += list(torch.logsumexp(logits, 1) - logits.diagonal())
            if trainer.craft_args.craft_symmetric:
                back = torch.logsumexp(logits, 0) - logits.diagonal()
                anchors[-len(back) :] = [(x + y) / 2 for x, y in zip(anchors[-len(back) :], back, strict=True)]
    sft = torch.cat(tokens).sum() / sum(map(len, tokens)) if tokens else 0.0
    contrastive = sum(anchors) / len(anchors) if anchors else 0.0
    shares = trainer._craft_loaders.shares
    return 0.6 / shares["sft"] * sft + 0.4 / shares["contrastive"] * contrastive


def all_reduces(out: Path, **config: Any) -> dict[str, list[int]]:
    """Floating-point all-reduces as large as the gradients, in each optimizer step by its kind."""
    trainer = make(out, "paired_dataset", gradient_accumulation_steps=1, max_steps=6, **config)
    spy = Spy().watch(trainer)
    size = sum(p.numel() for p in trainer.model.parameters())
    counts: dict[str, list[int]] = {"sft": [], "craft": []}
    calls = 0
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += tensor.is_floating_point() and tensor.numel() >= size // 2
        return plain(tensor, *args, **kwargs)

    keep = spy.on_pre_optimizer_step

    def note(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        keep(*args, **kwargs)
        counts[spy.batches[-1][0]["craft_batch_type"]].append(calls)
        calls = 0

    spy.on_pre_optimizer_step = note
    dist.all_reduce = counted
    buckets = []
    wrap = trainer.accelerator.prepare_model

    def hooked(*args: Any, **kwargs: Any) -> Any:
        model = wrap(*args, **kwargs)
        if hasattr(model, "register_comm_hook"):
            model.register_comm_hook(None, lambda _, bucket: buckets.append(1) or finished(bucket.buffer()))
        return model

    trainer.accelerator.prepare_model = hooked
    trainer.train()
    dist.all_reduce = plain
    return {**counts, "ddp": [len(buckets)]}


def finished(tensor: torch.Tensor) -> torch.futures.Future:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(tensor)
    return future


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "pairs": replicas(out, "paired_dataset", craft_gradient_balancing="pcgrad"),
        "self_align": replicas(
            out,
            "self_align",
            craft_negative_strategy="queue",
            craft_negative_queue_size=20,
            craft_gradient_balancing="uncertainty",
            craft_learnable_temperature=True,
        ),
        "exact pairs": exactness(out, "paired_dataset"),
        "exact pairs, symmetric, GradCache": exactness(
            out, "paired_dataset", craft_symmetric=True, craft_use_gradcache=True, craft_gradcache_chunk_size=2
        ),
        "exact self_align": exactness(out, "self_align"),
        "exact single steps": exactness(out, "paired_dataset", gradient_accumulation_steps=1),
        "reduces": all_reduces(out),
        "reduces with GradCache": all_reduces(out, craft_use_gradcache=True, craft_gradcache_chunk_size=1),
    }
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
