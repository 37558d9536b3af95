"""Which columns of a similarity matrix are negatives, and the queue that supplies more of them.

Ids are int64 [rows, 3], in the order of ID_COLUMNS; 0 stands for "unknown" and equals nothing.
Axes: B rows (anchors), M or K columns (candidates), D embedding size, T tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ID_COLUMNS = ("sample", "anchor", "positive")

_LOW_BITS = {shift: (1 << (64 - shift)) - 1 for shift in (27, 30, 31)}  # >> copies the sign bit; these take it off

_TABLE_SIZE = 2**16  # of the low bits of ids; 64 KB stay in the cache


def hash_tokens(input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return an int64 [B] hash of each row's tokens where the mask is not 0: the same under any padding.

    Each (rank among the real tokens, token) pair is mixed to 64 bits and the results are added up (Zobrist 1970), so
    that two different texts share a hash with probability 2^-64. An empty row has 0, "unknown".
    """
    real_BT = mask_BT != 0
    rank_BT = real_BT.cumsum(1)
    mixed_BT = _mix(_mix(rank_BT) + input_ids_BT.long())
    return mixed_BT.masked_fill(~real_BT, 0).sum(1)


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic."""
    x = x - 0x61C8864680B583EB  # adds the golden gamma 0x9E3779B97F4A7C15 modulo 2^64
    x = (x ^ ((x >> 30) & _LOW_BITS[30])) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & _LOW_BITS[27])) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & _LOW_BITS[31])


def duplicates(rows_B3: Tensor, columns_M3: Tensor) -> Tensor:
    """Return bool [B, M]: the column is the same sample as the row, and so no negative of it.

    It is when the sample ids are equal, or when any of its two text ids equals any of the row's. Exact: a table of the
    rows' low bits finds the few columns that may share an id with a row, and only those are compared.
    """
    found_BM = torch.zeros(len(rows_B3), len(columns_M3), dtype=torch.bool, device=rows_B3.device)
    seen = torch.zeros(_TABLE_SIZE, dtype=torch.bool, device=rows_B3.device)
    seen[rows_B3 & (_TABLE_SIZE - 1)] = True
    shared_M3 = seen.take(columns_M3 & (_TABLE_SIZE - 1)) & (columns_M3 != 0)
    candidates_C = shared_M3.any(1).nonzero()[:, 0]
    if len(candidates_C):
        found_BM[:, candidates_C] = _same_sample(rows_B3, columns_M3[candidates_C])
    return found_BM


def _same_sample(rows_B3: Tensor, columns_C3: Tensor) -> Tensor:
    sample_B, anchor_B, positive_B = rows_B3.unsqueeze(-1).unbind(1)
    sample_C, anchor_C, positive_C = columns_C3.unbind(1)
    same_BC = (sample_B == sample_C) & (sample_B != 0)
    for row_B in (anchor_B, positive_B):
        same_BC |= ((row_B == anchor_C) | (row_B == positive_C)) & (row_B != 0)
    return same_BC


class CachedEmbeddingBank:
    """A first-in first-out queue of embeddings with their ids: negatives from earlier batches (He et al. 2020, MoCo).

    Without a momentum encoder, as in cross-batch memory (Wang et al. 2020). `bank_size` rows of `embedding_dim`
    float32 numbers; the newest rows stay. `bank`, `ptr` (where the next row goes) and `is_full` may be read.
    """

    def __init__(self, embedding_dim: int, bank_size: int = 65536, device: torch.device | str | None = None) -> None:
        if embedding_dim < 1 or bank_size < 1:
            raise ValueError(f"a queue of {bank_size} rows of {embedding_dim} numbers holds nothing: give at least 1.")
        self.embedding_dim = embedding_dim
        self.bank_size = bank_size
        self.device = torch.device(device or "cpu")
        self.bank = torch.zeros(bank_size, embedding_dim, device=self.device)
        self.ids = torch.zeros(bank_size, len(ID_COLUMNS), dtype=torch.int64, device=self.device)
        self.ptr = 0
        self.is_full = False

    @property
    def size(self) -> int:
        """How many embeddings the queue holds."""
        return self.bank_size if self.is_full else self.ptr

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, ids: Tensor | None = None) -> None:
        """Add embeddings [n, D] and their ids [n, 3] (unknown when not given) in place of the oldest ones."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings {list(embeddings.shape)} do not fit the queue: give [rows, {self.embedding_dim}], the "
                "output of the projection head (craft_projection_dim)."
            )
        if ids is None:
            ids = self.ids.new_zeros(len(embeddings), len(ID_COLUMNS))
        if ids.shape != (len(embeddings), len(ID_COLUMNS)):
            raise ValueError(f"ids {list(ids.shape)} do not fit {len(embeddings)} embeddings: give [rows, 3].")
        rows = min(len(embeddings), self.bank_size)
        places = torch.arange(self.ptr, self.ptr + rows, device=self.device) % self.bank_size
        self.bank[places] = embeddings[len(embeddings) - rows :].detach().to(self.bank)
        self.ids[places] = ids[len(ids) - rows :].to(self.ids)
        self.is_full = self.is_full or self.ptr + rows >= self.bank_size
        self.ptr = (self.ptr + rows) % self.bank_size

    def get_negatives(self) -> Tensor:
        """Return the embeddings [size, D]; a view that the next enqueue changes."""
        return self.bank[: self.size]

    def get_ids(self) -> Tensor:
        """Return the ids [size, 3] of the embeddings; a view that the next enqueue changes."""
        return self.ids[: self.size]

    def clear(self) -> None:
        """Forget everything."""
        self.bank.zero_()
        self.ids.zero_()
        self.ptr = 0
        self.is_full = False

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the rows held, their ids, and (next place, capacity), as tensors."""
        return {
            "bank": self.get_negatives().clone(),
            "ids": self.get_ids().clone(),
            "layout": torch.tensor([self.ptr, self.bank_size]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the rows of `state_dict`, each in its own place: sums over them stay equal to the bit.

        Errors: ValueError when the saved queue has another capacity or embedding size.
        """
        ptr, bank_size = state["layout"].tolist()
        saved = (bank_size, state["bank"].shape[1])
        if saved != (self.bank_size, self.embedding_dim):
            raise ValueError(
                f"the saved queue holds up to {saved[0]} embeddings of {saved[1]} numbers, this one "
                f"{self.bank_size} of {self.embedding_dim}. Set craft_negative_queue_size={saved[0]} and "
                f"craft_projection_dim={saved[1]}, or start a new run."
            )
        self.clear()
        held = len(state["bank"])
        self.bank[:held] = state["bank"].to(self.bank)
        self.ids[:held] = state["ids"].to(self.ids)
        self.ptr, self.is_full = ptr, held == self.bank_size
