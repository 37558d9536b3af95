"""Two processes, joined by gloo, contrast the rows of both: loss, gradients and figures are those of one process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_pairs import bert, colour_rows, neobert, pair_params, tokenizer, write_rows
from torch.nn.parallel import DistributedDataParallel

from inft.encoders.contrastive.batches import BatchDraws, ContrastiveBatch, pair_batch
from inft.encoders.contrastive.encode import TextEncoder
from inft.encoders.contrastive.finetune import PairsTask
from inft.encoders.contrastive.heldout import HeldOut
from inft.encoders.contrastive.objective import contrastive_loss
from inft.encoders.contrastive.sources import PairSources, open_sources
from params.encoder import ContrastiveParams, EncoderParams

WORLD = 2
MODELS = {"neobert": neobert, "bert": bert}
CASES = {
    f"{model}-{loss_type}-{chunk}": (model, ContrastiveParams(loss_type=loss_type, gradcache_chunk_size=chunk))
    for model in MODELS
    for loss_type in ("info_nce", "symmetric")
    for chunk in (None, 3)
}


def rows_of(folder: Path):
    rows = colour_rows(12, negatives=3)
    for place in (1, 4, 7):
        rows[place]["neg"] = []  # the processes have different numbers of hard negatives
    rows[7]["query"] = rows[0]["query"]  # rows of different processes with one query
    rows[2]["pos"] = [*rows[2]["pos"], *rows[8]["pos"]]  # rows that know more answers than the others
    rows[9]["pos"] = [*rows[9]["pos"], *rows[3]["pos"], *rows[4]["pos"]]
    return write_rows(folder / "pairs.jsonl", rows)


def opened(folder: Path) -> tuple:
    params = pair_params(folder, folder / "pairs.jsonl", trainer={"per_device_eval_batch_size": 4})
    return params, open_sources(params, tokenizer(), json.loads((folder / "located.json").read_text()))


def batch(sources: PairSources, first: int, last: int) -> ContrastiveBatch:
    rows = [sources.train[0].pairs.row(number) for number in range(first, last)]
    numbers = [(0, 0, number) for number in range(first, last)]
    return pair_batch(rows, numbers, "pairs", BatchDraws(seed=0, max_negatives=9))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    params, sources = opened(place)
    found = {}
    for name, (model, objective) in CASES.items():
        wrapped = DistributedDataParallel(MODELS[model]())
        encoder = TextEncoder(model=wrapped, pooling="mean", pad_token_id=0)
        losses_B = contrastive_loss(encoder, batch(sources, 6 * rank, 6 * rank + 6), objective).losses_B
        losses_B.mean().backward()
        weights = dict(wrapped.module.named_parameters())
        found[name] = (losses_B.detach(), {weight: value.grad for weight, value in weights.items()})
    heldout = replace(sources.train[0], rows=11)
    with torch.no_grad():
        encoder = TextEncoder(model=neobert().eval(), pooling="mean", pad_token_id=0)
        found["figures"] = HeldOut([heldout], params, rank=rank, world_size=WORLD).figures(encoder)
    found["guards"] = checks(params, sources, rank)
    torch.save(found, place / f"{rank}.pt")
    dist.destroy_process_group()


def checks(params: EncoderParams, sources: PairSources, rank: int) -> list[list[str]]:
    """What is checked of batches of one row a process, with and without gathering, and of unknown words in one."""
    found = []
    model = neobert()
    # Rows 0 and 7 share a query; row 1 has no hard negative. 4 and 5: only the second process has one.
    for rows, gather in (((1, 4), True), ((1, 4), False), ((0, 7), False), ((7, 0), True)):
        objective = replace(params.contrastive, gather_negatives=gather)
        task = PairsTask(replace(params, contrastive=objective), sources, model, tokenizer())
        one = batch(sources, rows[rank], rows[rank] + 1)
        found.append([f"{result.name} {result.ok}" for result in task.guards(model, one)])
    unknown = replace(one, queries=[np.full(999, 1, dtype=np.int32)]) if rank else one
    found.append([f"{result.name} {result.ok}" for result in task.guards(model, unknown)])
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder, and what each of the two processes found."""
    from rich.console import Console

    from inft.encoders.contrastive.sources import locate_sources

    folder = tmp_path_factory.mktemp("two")
    params = pair_params(folder, rows_of(folder))
    (folder / "located.json").write_text(json.dumps(locate_sources(params, tokenizer(), Console(quiet=True))))
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=WORLD)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_contrast_as_one_with_the_rows_of_both(both, name):
    folder, found = both
    _, sources = opened(folder)
    model, objective = CASES[name]
    alone = MODELS[model]()
    encoder = TextEncoder(model=alone, pooling="mean", pad_token_id=0)
    losses_B = contrastive_loss(encoder, batch(sources, 0, 12), replace(objective, gradcache_chunk_size=None)).losses_B
    losses_B.mean().backward()
    torch.testing.assert_close(torch.cat([one[name][0] for one in found]), losses_B.detach(), rtol=1e-4, atol=1e-5)
    for weight, value in alone.named_parameters():
        for one in found:
            torch.testing.assert_close(one[name][1][weight], value.grad, rtol=1e-4, atol=1e-5)


def test_all_processes_come_to_the_same_verdict_of_the_first_batch(both):
    """Or one of them would wait for the others, which train no more."""
    _, found = both
    known, contrasted, gradients = "known words True", "contrasted rows True", "gradients True"
    sound = [known, contrasted, gradients]
    alone = [known, "contrasted rows False"]
    expected = [
        [sound, alone, [known, contrasted, gradients], sound, ["known words False"]],
        [sound, alone, [known, contrasted], sound, ["known words False"]],
    ]
    assert [one["guards"] for one in found] == expected


def test_both_processes_have_the_held_out_figures_of_one(both):
    folder, found = both
    params, sources = opened(folder)
    encoder = TextEncoder(model=neobert().eval(), pooling="mean", pad_token_id=0)
    with torch.no_grad():
        alone = HeldOut([replace(sources.train[0], rows=11)], params).figures(encoder)
    for one in found:
        assert one["figures"].pop("sources") == {"pairs": pytest.approx(alone["loss"], rel=1e-5)}
        assert one["figures"] == {name: pytest.approx(v, rel=1e-5) for name, v in alone.items() if name != "sources"}
