"""TrainParams: everything one `inft train` run was resolved to."""

from dataclasses import dataclass, field
from typing import Literal

from params.basic import BasicParams
from params.craft import CraftParams
from params.lora import LoRAParams, QLoRAParams
from params.munichus import MUNIChusLoadConfig
from params.preference import PreferenceParams
from params.rl import RLParams
from params.sft import SFTParams

ModelName = Literal["llama32", "aya", "text"]
TrainingMode = Literal["basic", "advanced"]
Method = Literal["sft", "dpo", "orpo", "grpo", "ppo"]


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """The resolved parameters of one run, saved beside it as params.yaml."""

    model: ModelName
    training_mode: TrainingMode = "basic"
    method: Method = "sft"  # of captions; dpo and orpo: of preferences; grpo and ppo: of rewards
    demo: bool = False  # the embedded tiny model; with the drawn sample set unless `data.data` names another
    output_dir: str  # checkpoints, params.yaml, quarantine.jsonl
    best_model_dir: str  # the best adapter, its processor and best.json
    model_name: str  # hub id or local path; "" means the embedded model
    processor_name: str
    task: str  # tag of the log file, trainer_<task>.jsonl
    basic: BasicParams = field(default_factory=BasicParams)
    data: MUNIChusLoadConfig = field(default_factory=MUNIChusLoadConfig)
    qlora: QLoRAParams = field(default_factory=QLoRAParams)
    lora: LoRAParams = field(default_factory=LoRAParams)
    sft: SFTParams = field(default_factory=SFTParams)
    preference: PreferenceParams = field(default_factory=PreferenceParams)
    rl: RLParams = field(default_factory=RLParams)
    craft: CraftParams = field(default_factory=CraftParams)
