"""The parameter dataclasses under the name that the guide gives them; they live in the package ``params``."""

from params import BasicParams, LoRAParams, MUNIChusLoadConfig, QLoRAParams, SFTParams, TrainParams, UserError

__all__ = ["BasicParams", "LoRAParams", "MUNIChusLoadConfig", "QLoRAParams", "SFTParams", "TrainParams", "UserError"]
