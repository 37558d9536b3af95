"""What each of two processes does for test_ddp_runs.py: command lines one after the other, and the weights of each."""

import json
import sys
from pathlib import Path

import torch
from craft_parser import parse
from run_craft import run
from safetensors.torch import save_file

from inft.training.processes import joined, rank
from params.errors import UserError


def main(out: Path) -> None:
    torch.set_num_threads(1)
    for name, argv in json.loads((out / "jobs.json").read_text(encoding="utf-8")).items():
        try:
            with joined():
                trainer = run(parse(argv))
        except UserError as error:
            (out / f"{name}.rank{rank()}.said").write_text(str(error), encoding="utf-8")
            continue
        named = [*trainer.model.named_parameters(), *trainer.craft_loss.named_parameters(prefix="head")]
        weights = {key: value.detach().clone() for key, value in named if value.requires_grad}
        save_file(weights, out / f"{name}.rank{rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
