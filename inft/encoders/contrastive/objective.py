"""The contrastive loss of a batch: InfoNCE with hard negatives, duplicates left out, GradCache, all processes.

Axes: B rows of this process, M rows and N hard negatives of all processes, P texts that a row knows, D embedding size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from craft.distributed import gather_ids, gather_rows
from craft.gradcache import grad_cache
from craft.infonce import info_nce
from craft.negatives import duplicates
from inft.encoders.contrastive.batches import ContrastiveBatch, Texts
from inft.encoders.contrastive.encode import TextEncoder
from params.encoder import ContrastiveParams


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """What a batch's rows came to."""

    losses_B: Tensor  # float32, with gradient
    correct_B: Tensor  # bool: the positive is more similar than every negative
    contrasted_B: Tensor  # bool: the row has at least one negative


def contrastive_loss(encoder: TextEncoder, batch: ContrastiveBatch, params: ContrastiveParams) -> ContrastiveLoss:
    """Return the loss of each row of a batch, under whatever dropout the model has.

    With `gather_negatives` the mean over the processes of the gradients of ``losses_B.mean()`` is the gradient of the
    whole batch, where each process has as many rows; every process must run backward. With `gradcache_chunk_size`
    backward fills `.grad` chunk by chunk, equal to the plain gradient.
    """
    queries_BD, positives_BD, negatives_ND = encode_batch(encoder, batch, params.gradcache_chunk_size)
    return embedding_loss(queries_BD, positives_BD, negatives_ND, batch, params)


def encode_batch(encoder: TextEncoder, batch: ContrastiveBatch, chunk_size: int | None) -> tuple[Tensor, ...]:
    """Return the embeddings of queries, positives and negatives."""
    texts = [*batch.queries, *batch.positives, *batch.negatives]
    sizes = [len(batch.queries), len(batch.positives), len(batch.negatives)]
    chunks, order = [texts], torch.arange(len(texts))
    if chunk_size is not None:
        chunks, order = chunks_by_length(texts, chunk_size)
        z_MD = grad_cache(encoder.without_synchronisation, chunks, last_encode=encoder)
    elif encoder.flat:
        z_MD = encoder(texts)
    else:  # queries are mostly shorter than documents: apart they need less padding
        documents = texts[sizes[0] :]
        z_MD = torch.cat([encoder.without_synchronisation(batch.queries), encoder(documents)])
    return z_MD[order.to(z_MD.device)].split(sizes)


def chunks_by_length(texts: Texts, chunk_size: int) -> tuple[list[Texts], Tensor]:
    """Part texts into chunks of about equal length, shortest first; the index undoes the order.

    The incomplete chunk comes first, because the last one is the one that is not encoded twice.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    ends = range((len(texts) - 1) % chunk_size + 1, len(texts) + 1, chunk_size)
    chunks = [[texts[place] for place in order[max(end - chunk_size, 0) : end]] for end in ends]
    return chunks, torch.from_numpy(np.argsort(order, kind="stable"))


def embedding_loss(
    queries_BD: Tensor,
    positives_BD: Tensor,
    negatives_ND: Tensor,
    batch: ContrastiveBatch,
    params: ContrastiveParams,
) -> ContrastiveLoss:
    """Return the loss of each row from the embeddings of this process; a pure function but for the gathering.

    A column is no negative of a row when the two rows share a text, or when it is one of the row's other positives; a
    hard negative is none where it equals the row's query or one of its positives. In the symmetric form a query is no
    negative of a text that is one of this query's positives.
    """
    device = queries_BD.device
    ids_B3 = [_sample_ids(batch, kind).to(device) for kind in (0, 1)]
    known_BP2 = batch.known_keys_BP2.to(device)
    keys = [key.to(device) for key in (batch.positive_keys_B2, batch.negative_keys_N2)]
    gather = params.gather_negatives
    if not params.hard_negative_weight:
        negatives_ND, keys[1] = negatives_ND[:0], keys[1][:0]
    positives_MD, offset = gather_rows(positives_BD) if gather else (positives_BD, 0)
    negatives_ND = gather_rows(negatives_ND)[0] if gather else negatives_ND
    ids_M3 = [gather_ids(ids) if gather else ids for ids in ids_B3]
    positive_M2, negative_N2 = (gather_ids(key) if gather else key for key in keys)
    same_BM = torch.stack([duplicates(rows, columns) for rows, columns in zip(ids_B3, ids_M3, strict=True)]).any(0)
    all_queries_MD = excluded_back_BM = None
    if params.loss_type == "symmetric":
        all_queries_MD = gather_rows(queries_BD)[0] if gather else queries_BD
        known_MP2 = _gather_known(known_BP2) if gather else known_BP2
        excluded_back_BM = same_BM | _known(known_MP2, keys[0]).T
    found = info_nce(
        queries_BD,
        positives_MD,
        temperature=params.temperature,
        offset=offset,
        excluded_BM=same_BM | _known(known_BP2, positive_M2),
        negatives_ND=negatives_ND,
        excluded_BN=_known(known_BP2, negative_N2),
        negative_weight=params.hard_negative_weight or 1.0,  # without any, the weight does not matter
        all_anchors_MD=all_queries_MD,
        excluded_back_BM=excluded_back_BM,
    )
    return ContrastiveLoss(losses_B=found.losses_B, correct_B=found.correct_B, contrasted_B=found.contrasted_B)


@torch.no_grad()
def contrasted_rows(batch: ContrastiveBatch, params: ContrastiveParams, device: torch.device) -> Tensor:
    """Return bool [B]: which rows have a negative, for which no text has to be encoded."""
    sides = (batch.queries, batch.positives, batch.negatives)
    queries_B1, positives_B1, negatives_N1 = (torch.ones(len(texts), 1, device=device) for texts in sides)
    return embedding_loss(queries_B1, positives_B1, negatives_N1, batch, params).contrasted_B


def _sample_ids(batch: ContrastiveBatch, kind: int) -> Tensor:
    """Ids [B, 3] as craft.negatives has them: no sample id, the query's key, the positive's."""
    query_B, positive_B = batch.query_keys_B2[:, kind], batch.positive_keys_B2[:, kind]
    return torch.stack([torch.zeros_like(query_B), query_B, positive_B], dim=1)


def _known(known_BP2: Tensor, keys_N2: Tensor) -> Tensor:
    """bool [B, N]: the column's text, or one of the same tokens, is one of the row's known texts."""
    found_BN = torch.zeros(len(known_BP2), len(keys_N2), dtype=torch.bool, device=keys_N2.device)
    for known_B2 in known_BP2.unbind(1):
        for known_B, keys_N in zip(known_B2.unbind(1), keys_N2.unbind(1), strict=True):
            found_BN |= (known_B.unsqueeze(1) == keys_N) & (known_B != 0).unsqueeze(1)
    return found_BN


def _gather_known(known_BP2: Tensor) -> Tensor:
    """The known texts of the rows of all processes, padded to as many as the row with most has."""
    width = known_BP2.shape[1]
    most = int(gather_ids(known_BP2.new_tensor([[width]])).max())
    padded_BP2 = F.pad(known_BP2, (0, 0, 0, most - width))
    return gather_ids(padded_BP2.flatten(1)).unflatten(1, (most, 2))
