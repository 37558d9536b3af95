"""What two processes exchange, in a real gloo group, against one process over the joined batch in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from plain_infonce import info_nce_by_loops
from torch import Tensor, nn

from craft import distributed
from craft.distributed import (
    average_gradients,
    average_tensors,
    gather_ids,
    gather_rows,
    rank,
    sum_over_ranks,
    world_size,
)
from craft.losses import info_nce
from craft.negatives import CachedEmbeddingBank, duplicates

WORLD = 2
ROWS = {"equal": (3, 3), "unequal": (3, 2), "empty": (4, 0)}  # rows of each process
DIM = 6


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def joined(case: str) -> dict[str, Tensor]:
    """The batch of all processes together: pairs, hard negatives, ids with one sample on both, queue."""
    rows = sum(ROWS[case])
    ids = torch.arange(1, 3 * rows + 1).reshape(rows, 3)
    ids[-1, 0] = ids[0, 0]
    return {
        "anchor": numbers(rows, DIM, seed=1),
        "positive": numbers(rows, DIM, seed=2),
        "negative": numbers(rows, DIM, seed=3),
        "queue": F.normalize(numbers(5, DIM, seed=4), dim=-1),
        "ids": ids,
    }


def weight() -> nn.Parameter:
    return nn.Parameter(numbers(DIM, DIM, seed=5))


# In the processes


def contrastive_step(case: str, symmetric: bool) -> dict[str, Any]:
    """Loss and averaged gradient of this process's rows of the batch."""
    sizes = ROWS[case]
    mine = slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))
    batch, w = joined(case), weight()
    a, p, n = (F.normalize(batch[side][mine] @ w, dim=-1) for side in ("anchor", "positive", "negative"))
    positives, offset = gather_rows(p)
    negatives, _ = gather_rows(n)
    all_ids = gather_ids(batch["ids"][mine])
    losses = info_nce(
        a,
        positives,
        temperature=0.1,
        offset=offset,
        excluded_BM=duplicates(batch["ids"][mine], all_ids),
        queue_KD=batch["queue"],
        negatives_ND=negatives,
        all_anchors_MD=gather_rows(a)[0] if symmetric else None,
    ).losses_B
    (losses.sum() * WORLD / sum(sizes)).backward()
    average_gradients([w])
    queue = CachedEmbeddingBank(DIM, 16)
    queue.enqueue(positives, all_ids)
    return {
        "losses": losses.detach(),
        "gradient": w.grad,
        "offset": offset,
        "ids": all_ids,
        "queue": queue.state_dict(),
    }


def averaging() -> dict[str, Any]:
    """Parameters with a gradient on both, one and no process, in two dtypes and small buckets."""
    shapes = ((2, 3), (4,), (5,), (1,), (7, 2))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters += [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2)]
    for number, parameter in enumerate(parameters):
        if number in (0, 4, 5) or (number == 1 and rank() == 1):  # 1: on one process only; 2, 3, 6: on none
            parameter.grad = torch.full_like(parameter, float(number + 1 + 2 * rank()))
    kept = parameters[0].grad
    whole = sum_calls("all_reduce", lambda: average_gradients(parameters))
    extra = average_gradients([], torch.tensor([1.0 + rank(), 10.0 * rank()]))
    distributed.BUCKET_BYTES = 40  # bytes: the float32 parameters need four all-reduces
    own = torch.tensor([float(rank())])
    small = sum_calls("all_reduce", lambda: average_gradients(parameters, own))
    distributed.BUCKET_BYTES = 2**28
    return {
        "gradients": [parameter.grad for parameter in parameters],
        "in place": parameters[0].grad is kept,
        "calls": (whole, small),
        "extra": extra,
        "own extra": own,
        "tensors": average_tensors([None, torch.ones(2) * rank()], [torch.zeros(1), torch.zeros(2)]),
    }


def sum_calls(name: str, action: Callable[[], object]) -> int:
    """How often `action` calls a collective."""
    calls, original = [], getattr(dist, name)
    setattr(dist, name, lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1])
    try:
        action()
    finally:
        setattr(dist, name, original)
    return len(calls)


def one_side_frozen() -> float:
    """Only process 0's rows need a gradient, and process 1 must help it to them."""
    x = torch.full((rank() + 1, 2), 1.0 + rank(), requires_grad=rank() == 0)
    everything, _ = gather_rows(x)
    (everything.sum() * (rank() + 1)).backward()
    return 0.0 if x.grad is None else x.grad.sum().item()


def backward_collectives() -> dict[str, int]:
    counts = {}
    for name in ("reduce_scatter_tensor", "all_reduce", "all_gather_into_tensor"):
        everything, _ = gather_rows(torch.ones(rank() + 1, 2, requires_grad=True))
        counts[name] = sum_calls(name, everything.sum().backward)
    return counts


def without_grad() -> bool:
    with torch.no_grad():
        return gather_rows(torch.ones(1, 2, requires_grad=True))[0].requires_grad


def nothing_anywhere() -> Tensor:
    x = torch.ones(0, 2, requires_grad=True)
    everything, _ = gather_rows(x)
    everything.sum().backward()
    assert x.grad is not None
    return everything.detach()


def work(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=WORLD)
    found = {
        "who": (rank(), world_size()),
        "steps": {(case, both): contrastive_step(case, both) for case in ROWS for both in (False, True)},
        "average": averaging(),
        "frozen": one_side_frozen(),
        "collectives": backward_collectives(),
        "sum": sum_over_ranks(torch.tensor([1, process], dtype=torch.int64)),
        "half": gather_rows(torch.full((process, 2), 0.5, dtype=torch.bfloat16))[0],
        "no grad": without_grad(),
        "nothing": nothing_anywhere(),
    }
    torch.save(found, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


# In the test's process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{process}.pt") for process in range(WORLD)]


def test_each_process_knows_its_place(found: list[dict[str, Any]]) -> None:
    assert [one["who"] for one in found] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_loss_and_gradient_are_those_of_the_joined_batch(
    found: list[dict[str, Any]], case: str, symmetric: bool
) -> None:
    # failure 8
    batch, w = joined(case), weight()
    a, p, n = (F.normalize(batch[side] @ w, dim=-1) for side in ("anchor", "positive", "negative"))
    losses = info_nce_by_loops(
        a,
        p,
        temperature=0.1,
        excluded=duplicates(batch["ids"], batch["ids"]),
        queue=batch["queue"],
        negatives=n,
        all_anchors=a if symmetric else None,
    )
    losses.mean().backward()
    steps = [one["steps"][case, symmetric] for one in found]
    torch.testing.assert_close(torch.cat([step["losses"] for step in steps]), losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steps[0]["gradient"], w.grad, rtol=1e-11, atol=1e-12)
    assert torch.equal(steps[0]["gradient"], steps[1]["gradient"])
    assert [step["offset"] for step in steps] == [0, ROWS[case][0]]


@pytest.mark.parametrize("case", ROWS)
def test_ids_and_queue_are_the_same_on_all_processes_in_rank_order(found: list[dict[str, Any]], case: str) -> None:
    steps = [one["steps"][case, False] for one in found]
    for step in steps:
        assert torch.equal(step["ids"], joined(case)["ids"])
        assert torch.equal(step["queue"]["ids"], joined(case)["ids"])
        assert torch.equal(step["queue"]["bank"], steps[0]["queue"]["bank"])


def test_gradients_are_averaged_whichever_process_has_them(found: list[dict[str, Any]]) -> None:
    for one in found:
        gradients = one["average"]["gradients"]
        # both: (n + 1) and (n + 3); one: 4 / 2; then averaged a second time, in small buckets, to the same values
        means = {0: 2.0, 1: 2.0, 4: 6.0, 5: 7.0}
        for number, gradient in enumerate(gradients):
            if number in means:
                assert gradient.unique().tolist() == [means[number]]
            else:
                assert gradient is None
        assert gradients[5].dtype == torch.bfloat16
        assert one["average"]["in place"]


def test_one_all_reduce_per_dtype_and_bucket(found: list[dict[str, Any]]) -> None:
    # float32: one; bfloat16: one. In buckets of 40 bytes: 24 | 16 + 20 | 4, then 56, then 4 of the extra; and bfloat16
    assert [one["average"]["calls"] for one in found] == [(2, 5), (2, 5)]


def test_extra_values_are_averaged_along_and_the_callers_are_left_alone(found: list[dict[str, Any]]) -> None:
    for process, one in enumerate(found):
        assert one["average"]["extra"].tolist() == [1.5, 5]
        assert one["average"]["own extra"].tolist() == [process]
        none, mean = one["average"]["tensors"]
        assert none is None
        assert mean.tolist() == [0.5, 0.5]


def test_a_process_whose_rows_need_no_gradient_helps_the_others(found: list[dict[str, Any]]) -> None:
    assert [one["frozen"] for one in found] == [2 * (1 + 2), 0]


def test_the_backward_pass_of_gathered_rows_is_one_collective(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["collectives"] == {"reduce_scatter_tensor": 1, "all_reduce": 0, "all_gather_into_tensor": 0}


def test_sums_half_precision_and_evaluation(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["sum"].tolist() == [2, 1]
        assert one["half"].tolist() == [[0.5, 0.5]]
        assert one["half"].dtype == torch.bfloat16
        assert not one["no grad"]
        assert one["nothing"].shape == (0, 2)


def test_in_one_process_everything_is_the_identity() -> None:
    x, ids, extra = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.int64), torch.ones(1)
    parameter = nn.Parameter(torch.zeros(2))
    gathered, offset = gather_rows(x)
    assert (gathered is x, offset, gather_ids(ids) is ids) == (True, 0, True)
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks(extra).tolist() == [1]
    assert average_gradients([parameter], extra) is extra
    assert parameter.grad is None
    assert average_tensors([None, extra], [extra, extra]) == [None, extra]
