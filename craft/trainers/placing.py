"""A user's own loader, divided among the processes and put on the device."""

from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from craft.distributed import world_size


def placed(loader: Any, accelerator: Any) -> Any:
    """Return a torch DataLoader as accelerate prepares it, any other loader as it is; ValueError where each of several
    processes would read all of its rows.
    """
    if isinstance(loader, DataLoader) and accelerator is not None:
        if not isinstance(loader.dataset, IterableDataset):
            return accelerator.prepare(loader)
        # Each process reads the stream and takes its own rows: the main one cannot join batches of texts to send them.
        return prepare_data_loader(
            loader,
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            put_on_device=True,
            dispatch_batches=False,
        )
    if world_size() > 1:
        raise ValueError(
            f"a loader of type {type(loader).__name__} cannot be divided among the {world_size()} processes: each "
            "would read all of its rows. Pass a torch DataLoader, or one made by accelerator.prepare."
        )
    return loader
