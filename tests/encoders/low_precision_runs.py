"""A tiny NeoBERT on a flat stream, and parameters with one low-precision section."""

from typing import Any

import torch
from torch import Tensor

from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM
from params.encoder import EncoderParams, EncoderTrainerParams
from params.lowprecision import Quartet2Params, TorchAOParams, TransformerEngineParams

SECTIONS = {"torchao": TorchAOParams, "transformer_engine": TransformerEngineParams, "quartet2": Quartet2Params}
COMPILED = EncoderTrainerParams(torch_compile=True)
NOT_COMPILED = EncoderTrainerParams(torch_compile=False)


def with_section(name: str, trainer: EncoderTrainerParams = COMPILED, **fields: Any) -> EncoderParams:
    """Parameters with that section enabled."""
    return EncoderParams(trainer=trainer, **{name: SECTIONS[name](enable=True, **fields)})


def tiny_model(seed: int = 0, **fields: Any) -> NeoBERTForMaskedLM:
    """Three blocks of 64 numbers; every linear layer has sides in multiples of 32."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    config = NeoBERTConfig(**{**sizes, "max_position_embeddings": 64, "vocab_size": 128, **fields})
    return NeoBERTForMaskedLM(config)


def loss_of(model: NeoBERTForMaskedLM, *, autocast: bool = False) -> Tensor:
    """The loss on a stream of 64 tokens in two documents, a third of them masked."""
    draw = torch.Generator().manual_seed(1)
    input_ids_T = torch.randint(5, 128, (64,), generator=draw)
    labels_T = torch.where(torch.arange(64) % 3 == 0, torch.randint(5, 128, (64,), generator=draw), -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(
            input_ids_T,
            cu_seqlens=torch.tensor([0, 20, 64], dtype=torch.int32),
            position_ids=torch.cat([torch.arange(20), torch.arange(44)]),
            max_seqlen=44,
            labels=labels_T,
            masked_only=True,
        ).loss
