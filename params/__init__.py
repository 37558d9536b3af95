"""What can be turned: dataclasses of the standard library, their presets and how they are resolved."""

from params.basic import BasicParams
from params.craft import CraftParams
from params.errors import UserError
from params.lora import LoRAParams, QLoRAParams
from params.munichus import MUNIChusLoadConfig
from params.preference import PreferenceParams
from params.rl import RLParams
from params.sft import SFTParams
from params.train import TrainParams

__all__ = [
    "BasicParams",
    "CraftParams",
    "LoRAParams",
    "MUNIChusLoadConfig",
    "PreferenceParams",
    "QLoRAParams",
    "RLParams",
    "SFTParams",
    "TrainParams",
    "UserError",
]
