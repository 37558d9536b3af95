"""A contrastive step in chunks: inft's GradCache against sentence-transformers' cached loss, on ragged texts.

    python scripts/bench/encoder/gradcache.py [--pairs 128] [--chunk 8]

Both run the same BERT (4 layers, hidden size 256, no dropout, mean pooling) on the same pairs, on one thread: queries
of 4 to 24 tokens, documents of 8 to 128, most of them short. The peer is CachedMultipleNegativesRankingLoss as it
comes, on batches that its own collator would make, each side padded to its longest text. Loss and gradients must agree
before the two are timed. Memory is what torch's allocator holds at the peak of a step, gradients included.

    pip install sentence-transformers==6.2.0
"""

import math
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from inft.encoders.contrastive.batches import BatchDraws, ContrastiveBatch, pair_batch
from inft.encoders.contrastive.encode import TextEncoder, padded_inputs
from inft.encoders.contrastive.objective import contrastive_loss
from inft.encoders.contrastive.tokenized import TokenizedRow
from params.encoder import ContrastiveParams

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import interleave, parser, peak_bytes, report

VOCABULARY = 4096
TEMPERATURE = 0.05
QUERIES, DOCUMENTS = (4, 24), (8, 128)  # tokens
TIME_LIMIT = 1.0  # ours over the peer's
MEMORY_LIMIT = 1.1

Features = dict[str, Tensor]


def main() -> None:
    """Check that both compute the same, then memory, then time; exit code 1 when a limit is missed."""
    options = parser(__doc__, repetitions=7)
    options.add_argument("--pairs", type=int, default=128)
    options.add_argument("--chunk", type=int, default=8, help="rows encoded at a time")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    texts = [ragged(chosen.pairs, lengths, seed) for seed, lengths in enumerate((QUERIES, DOCUMENTS))]
    model = new_model()
    steps = {"inft": ours(model, texts, chosen.chunk), "sentence-transformers": peer(model, texts, chosen.chunk)}
    compare(model, steps)
    memory = {}
    for name, step in steps.items():
        model.zero_grad(set_to_none=True)
        memory[name] = peak_bytes(step)
    words = ", ".join(f"{name} {held / 2**20:.1f} MB" for name, held in memory.items())
    ratio = memory["inft"] / memory["sentence-transformers"]
    print(f"peak memory of a step: {words}; ratio {ratio:.3f}, limit {MEMORY_LIMIT}")
    print(f"share of padding where each side is padded to its longest text: {padding(texts):.0%}")
    seconds = interleave(steps, repetitions=chosen.repetitions)
    report(
        f"contrastive step, {chosen.pairs} ragged pairs, chunks of {chosen.chunk}",
        seconds,
        ours="inft",
        peer="sentence-transformers",
        limit=TIME_LIMIT,
        out=chosen.out,
    )
    if ratio > MEMORY_LIMIT:
        raise SystemExit(f"memory: ratio {ratio:.3f} is above its limit {MEMORY_LIMIT}")


def new_model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=DOCUMENTS[1],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).train()


def ragged(rows: int, lengths: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Random tokens; the logarithm of a text's length is drawn evenly."""
    draw = random.Random(seed)
    low, high = (math.log(length) for length in lengths)
    sizes = [round(math.exp(draw.uniform(low, high))) for _ in range(rows)]
    return [np.array(draw.choices(range(5, VOCABULARY), k=size), dtype=np.int32) for size in sizes]


def padding(texts: list[list[np.ndarray]]) -> float:
    places = sum(len(side) * max(map(len, side)) for side in texts)
    return 1 - sum(len(text) for side in texts for text in side) / places


def ours(model: BertModel, texts: list[list[np.ndarray]], chunk: int) -> Callable[[], float]:
    rows = [
        TokenizedRow(query, 2 * number + 1, [document], [2 * number + 2], [], [])
        for number, (query, document) in enumerate(zip(*texts, strict=True))
    ]
    numbers = [(0, 0, number) for number in range(len(rows))]
    batch: ContrastiveBatch = pair_batch(rows, numbers, "ragged", BatchDraws(seed=0, max_negatives=0))
    params = ContrastiveParams(temperature=TEMPERATURE, gradcache_chunk_size=chunk)
    encoder = TextEncoder(model=model, pooling="mean", pad_token_id=0)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = contrastive_loss(encoder, batch, params).losses_B.mean()
        loss.backward()
        return float(loss.detach())

    return step


class Words(nn.Module):
    """The model as a module of sentence-transformers, in front of its own pooling."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Features, **_: object) -> Features:
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "token_embeddings": self.model(**inputs).last_hidden_state}


def peer(model: BertModel, texts: list[list[np.ndarray]], chunk: int) -> Callable[[], float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling

    whole = SentenceTransformer(modules=[Words(model), Pooling(model.config.hidden_size, "mean")], device="cpu")
    loss_of = CachedMultipleNegativesRankingLoss(whole, scale=1 / TEMPERATURE, mini_batch_size=chunk)
    sides = [padded_inputs(side, 0, torch.device("cpu")) for side in texts]
    whole.train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = loss_of([dict(side) for side in sides], None)
        loss.backward()
        return float(loss.detach())

    return step


def compare(model: BertModel, steps: dict[str, Callable[[], float]]) -> None:
    """Loss and gradients of the two are the same, but for float32's rounding."""
    found = {}
    for name, step in steps.items():
        loss = step()
        weights = [weight.grad for weight in model.parameters() if weight.grad is not None]
        found[name] = (loss, torch.cat([gradient.flatten() for gradient in weights]).double())
    (loss, gradient), (peer_loss, peer_gradient) = found.values()
    off = float((gradient - peer_gradient).norm() / peer_gradient.norm())
    print(f"loss {loss:.6f} and {peer_loss:.6f}; the gradients differ by {off:.1e} of their norm")
    assert abs(loss - peer_loss) < 1e-5 * abs(peer_loss), "the losses differ"
    assert off < 1e-5, "the gradients differ"


if __name__ == "__main__":
    main()
