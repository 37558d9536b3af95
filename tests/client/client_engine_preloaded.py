"""What the server that engine processes are forked from does once: all imports, those of a first adapter included."""

import torch

import inft.client.engine
import inft.client.learner
import inft.client.sampling  # noqa: F401
from inft.client.bases import Bases
from params.client import EngineParams, LoRAConfig

torch.set_num_threads(1)
Bases(EngineParams()).get("embedded/text").add_adapter("first", LoRAConfig(), seed=0)
