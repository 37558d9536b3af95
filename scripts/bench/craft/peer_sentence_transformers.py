"""sentence-transformers' CachedMultipleNegativesRankingLoss on the pairs of pair_model, in its own environment."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from pair_model import CHUNK, TEMPERATURE, new_encoder, new_head, take_over
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from served import serve
from torch import Tensor, nn


class Pooled(nn.Module):
    """The encoder with mean pooling and a linear head, as a module that takes and returns features."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.encoder = new_encoder()
        self.encoder.load_state_dict(load_file(directory / "model.safetensors"))
        self.head = new_head()
        self.head.load_state_dict(load_file(directory / "head.safetensors"))

    def forward(self, features: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        mask_BT1 = features["attention_mask"].unsqueeze(-1).float()
        hidden_BTH = self.encoder(features["input_ids"], features["attention_mask"]).last_hidden_state
        mean_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        return {**features, "sentence_embedding": self.head(mean_BH)}


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    pooled = Pooled(directory)
    model = SentenceTransformer(modules=[pooled], device="cpu")
    loss_of = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)
    batches = {name: take_over(directory, name) for name in ("ragged", "equal")}
    model.train()

    def step(batch: str) -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        loss = loss_of([dict(side) for side in batches[batch]], None)
        loss.backward()
        return {"loss": float(loss.detach())}

    def gradients(batch: str, to: str) -> dict[str, object]:
        found = step(batch)
        named = pooled.named_parameters()
        save_file({name: weight.grad for name, weight in named if weight.grad is not None}, to)
        return {**found, "version": version("sentence-transformers")}

    serve({"step": step, "gradients": gradients})


if __name__ == "__main__":
    main()
