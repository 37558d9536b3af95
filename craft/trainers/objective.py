"""InfoNCE of embedded pairs against everything that counts as a negative: the batch, other ranks, the queue."""

import torch
from torch import Tensor

from craft.distributed import gather_ids, gather_rows, world_size
from craft.losses import InfoNCEOutput, info_nce
from craft.negatives import CachedEmbeddingBank, duplicates


class ContrastiveObjective:
    """Gathers the positives of all ranks, masks duplicates, adds the queue, and keeps what is to be enqueued."""

    def __init__(
        self, *, strategy: str, symmetric: bool, queue_size: int, dim: int, device: torch.device | str = "cpu"
    ) -> None:
        self.strategy = strategy
        self.symmetric = symmetric
        self.queue = CachedEmbeddingBank(dim, bank_size=queue_size, device=device) if strategy == "queue" else None
        self.connection: Tensor | None = None  # a zero through which every rank takes part in the backward collectives
        self._waiting: tuple[Tensor, Tensor] | None = None  # positives of all ranks and their ids, to be enqueued

    def __call__(
        self,
        anchors_BD: Tensor,
        positives_BD: Tensor,
        *,
        temperature: Tensor | float,
        ids_B3: Tensor,
        negatives_ND: Tensor | None = None,
        negative_ids_N3: Tensor | None = None,
    ) -> InfoNCEOutput:
        """Return the loss of each of this rank's anchors, exact over all ranks (the mean over ranks is the global one).

        anchors and positives are unit vectors [B, D]; ids [B, 3] as in craft.negatives, 0 where unknown.
        """
        rows = len(positives_BD)
        fused = torch.cat([anchors_BD, positives_BD], dim=1) if self.symmetric else positives_BD
        gathered, offset = gather_rows(fused)
        ids_M3 = gather_ids(ids_B3)
        all_anchors, all_positives = gathered.chunk(2, dim=1) if self.symmetric else (None, gathered)
        excluded_BN = None
        if negatives_ND is not None and negative_ids_N3 is not None:
            negatives_ND, _ = gather_rows(negatives_ND)
            excluded_BN = duplicates(ids_B3, gather_ids(negative_ids_N3))
        self.connection = gathered.sum() * 0.0 if world_size() > 1 else None
        excluded_BM = self._excluded(ids_B3, ids_M3, rows=rows, offset=offset)
        queue_KD = excluded_BK = None
        if self.queue is not None:
            if self.queue.size:
                queue_KD = self.queue.get_negatives()
                excluded_BK = duplicates(ids_B3, self.queue.get_ids())
            self._waiting = (all_positives.detach(), ids_M3)
        return info_nce(
            anchors_BD,
            all_positives,
            temperature=temperature,
            offset=offset,
            excluded_BM=excluded_BM,
            queue_KD=queue_KD,
            excluded_BK=excluded_BK,
            negatives_ND=negatives_ND,
            excluded_BN=excluded_BN,
            all_anchors_MD=all_anchors,
        )

    def enqueue(self) -> None:
        """Put the last batch's positives into the queue; called after its backward pass."""
        if self.queue is not None and self._waiting is not None:
            self.queue.enqueue(*self._waiting)
            self._waiting = None

    def forget(self) -> None:
        """Drop what waits to be enqueued, of a step that was not finished."""
        self._waiting = self.connection = None

    def _excluded(self, ids_B3: Tensor, ids_M3: Tensor, *, rows: int, offset: int) -> Tensor:
        if self.strategy == "none":
            return torch.ones(rows, len(ids_M3), dtype=torch.bool, device=ids_B3.device)
        return duplicates(ids_B3, ids_M3)
