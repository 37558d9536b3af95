"""contrastive-ft's GradCache and its InfoNCE with a queue on the pairs of pair_model, in its own environment."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from pair_model import CHUNK, TEMPERATURE, new_encoder, new_head, take_over
from safetensors.torch import load_file
from served import serve
from torch import nn

from craft import CachedEmbeddingBank, GradCacheConfig, GradCacheContrastiveLoss, InfoNCELoss, pool_hidden_states


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    encoder = new_encoder()
    encoder.load_state_dict(load_file(directory / "model.safetensors"))
    head = new_head()
    head.load_state_dict(load_file(directory / "head.safetensors"))
    loss_of = GradCacheContrastiveLoss(
        encoder,
        head,
        lambda hidden, mask: pool_hidden_states(hidden, mask, "mean"),
        GradCacheConfig(chunk_size=CHUNK, temperature=TEMPERATURE),
    )
    batches = {name: take_over(directory, name) for name in ("ragged", "equal")}

    def step(batch: str) -> dict[str, float]:
        anchors, positives = batches[batch]
        loss_of.zero_grad(set_to_none=True)
        loss = loss_of(*anchors.values(), *positives.values())
        loss.backward()
        return {"loss": float(loss.detach())}

    def norm(part: nn.Module) -> float:
        gradients = [weight.grad.norm() for weight in part.parameters() if weight.grad is not None]
        return float(torch.stack(gradients).norm()) if gradients else 0.0

    def norms(batch: str) -> dict[str, object]:
        found = step(batch)
        return {**found, "backbone": norm(encoder), "head": norm(head), "version": version("contrastive-ft")}

    def queue() -> dict[str, object]:
        """Steps of InfoNCE with the queue in the order of its trainer: loss, enqueue, backward."""
        torch.manual_seed(0)
        own = InfoNCELoss(hidden_size=64, projection_dim=32, pooling="mean")
        bank = CachedEmbeddingBank(32, bank_size=1024)
        mask = torch.ones(8, 4)
        for number in (1, 2, 3):
            sides = torch.randn(8, 4, 64), torch.randn(8, 4, 64)
            negatives = bank.get_negatives() if bank.size else None
            loss, details = own(*sides, mask, mask, return_details=True, additional_negatives=negatives)
            bank.enqueue(details["anchor_embeddings"])
            try:
                loss.backward()
            except RuntimeError as error:
                return {"failed_at": number, "error": str(error).partition(":")[0]}
        return {"failed_at": None, "error": ""}

    serve({"step": step, "norms": norms, "queue": queue})


if __name__ == "__main__":
    main()
