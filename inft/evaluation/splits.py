"""Which split of a data set is evaluated where nobody said so."""

from collections.abc import Sequence
from dataclasses import replace

from inft.data import load_source
from inft.data.locate import find_source
from inft.data.rows import MissingSplit
from params.evaluation import HELDOUT, EvalParams
from params.munichus import MUNIChusLoadConfig

FOR_FORGETTING = ("test", "validation", "train")  # the first that the data has


def has_split(config: MUNIChusLoadConfig) -> bool:
    """Whether the data set has the split that its config names; reads a row at the most."""
    source, location = find_source(config)
    try:
        next(iter(load_source(source)(config, location=location, split=config.split)), None)
    except MissingSplit:
        return False
    return True


def settled_split(params: EvalParams) -> EvalParams:
    """The parameters with the test split or, where the data has none, with what the adapter's run held out."""
    trained = params.trained
    if has_split(params.data) or trained is None or trained.data != params.data.data:
        return params
    return replace(params, data=replace(params.data, split=HELDOUT))


def first_split(config: MUNIChusLoadConfig, splits: Sequence[str] = FOR_FORGETTING) -> MUNIChusLoadConfig:
    """The config with the first of the splits that the data set has, or as it is when it has none."""
    asked = (replace(config, split=split) for split in splits)
    return next((one for one in asked if has_split(one)), config)
