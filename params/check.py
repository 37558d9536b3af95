"""The parameters of ``inft train`` as dotted names."""

from collections.abc import Mapping

from params.basic import BasicParams
from params.craft import CraftParams
from params.lora import LoRAParams, QLoRAParams
from params.munichus import MUNIChusLoadConfig
from params.preference import PreferenceParams
from params.rl import RLParams
from params.schema import Schema
from params.sft import SFTParams
from params.train import TrainParams

SECTIONS: Mapping[str, type] = {
    "basic": BasicParams,
    "data": MUNIChusLoadConfig,
    "qlora": QLoRAParams,
    "lora": LoRAParams,
    "sft": SFTParams,
    "preference": PreferenceParams,
    "rl": RLParams,
    "craft": CraftParams,
}
TRAIN = Schema(TrainParams, SECTIONS, "--set {}.FIELD=VALUE")
