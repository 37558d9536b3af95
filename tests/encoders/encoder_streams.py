"""A NeoBERT of a few thousand weights in float64, and the same documents as a flat stream and as a padded batch."""

from types import SimpleNamespace

import torch

from inft.models.neobert import NeoBERTConfig, NeoBERTForMaskedLM

VOCABULARY = 40


def tiny_model(**changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(1)
    model = NeoBERTForMaskedLM(NeoBERTConfig(**(sizes | changes))).double().eval()
    with torch.no_grad():
        for weight in model.parameters():  # so that every part matters
            weight.mul_(8)
    return model


def texts(lengths, seed, share=0.4):
    """Documents as (input_ids, labels); -100 where nothing is predicted."""
    draw = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        tokens = torch.randint(5, VOCABULARY - 1, (length,), generator=draw)
        masked = torch.rand(length, generator=draw) < share
        documents.append((torch.where(masked, 4, tokens), torch.where(masked, tokens, -100)))
    return documents


def stream(documents):
    """What FlatBatch has, of these documents."""
    lengths = [len(ids) for ids, _ in documents]
    labels_T = torch.cat([labels for _, labels in documents])
    return SimpleNamespace(
        input_ids_T=torch.cat([ids for ids, _ in documents]),
        labels_T=labels_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        masked=int((labels_T != -100).sum()),
    )


def pad(documents, *, left, spare=0):
    """The same as a padded batch: keyword arguments of the model."""
    width = max(len(ids) for ids, _ in documents) + spare
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in documents:
        empty = width - len(ids)
        sides = (empty, 0) if left else (0, empty)
        rows["input_ids"].append(torch.nn.functional.pad(ids, sides, value=3))
        rows["labels"].append(torch.nn.functional.pad(labels, sides, value=-100))
        rows["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(ids), sides))
    return {name: torch.stack(values) for name, values in rows.items()}


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))
