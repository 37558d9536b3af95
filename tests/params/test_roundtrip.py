import dataclasses
import tempfile
from pathlib import Path
from typing import get_args, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st

from params import TrainParams
from params.check import SECTIONS, TRAIN
from params.resolve import dump_yaml, load_params

TEXT = st.text(max_size=20)


def values(hint):
    """A strategy for one field from its annotation and bounds."""
    if get_origin(hint) is not None and type(None) in get_args(hint):
        return st.one_of(*(st.none() if arm is type(None) else values(arm) for arm in get_args(hint)))
    if hasattr(hint, "__metadata__"):
        low, high = hint.__metadata__[0].low, min(hint.__metadata__[0].high, 1e6)
        if hint.__origin__ is int:
            return st.integers(int(low), int(high))
        return st.floats(low, high, exclude_min=not hint.__metadata__[0].low_included, exclude_max=high == 1).filter(
            hint.__metadata__[0].holds
        )
    if str(hint).startswith("typing.Literal"):
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_args(hint):
        return st.dictionaries(*(values(arm) for arm in get_args(hint)), max_size=3)
    return {bool: st.booleans(), str: TEXT, float: st.floats(allow_nan=False)}[hint]


def section(name):
    return st.builds(
        SECTIONS[name],
        **{f.name: values(TRAIN.field_types[f"{name}.{f.name}"]) for f in dataclasses.fields(SECTIONS[name])},
    )


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        TrainParams,
        **{name: values(hint) for name, hint in TRAIN.field_types.items() if "." not in name},
        **{name: section(name) for name in SECTIONS},
    )
)
def test_parameters_survive_yaml(params):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "params.yaml"
        path.write_text(dump_yaml(params), encoding="utf-8")
        assert load_params(path) == params
