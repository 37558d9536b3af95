"""Whatever is given, the answer is parameters or a UserError."""

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from params import TrainParams, UserError
from params.check import TRAIN
from params.resolve import dump_yaml, load_params, resolve_train

NAMES = st.one_of(st.sampled_from(sorted(TRAIN.field_types)), st.text(max_size=8))
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "none", "true", "no", "[", "[1]", "{a: 1}", "{1: 2}", "nan", "-inf", "1e999", "0x10", "a,b", "!!x 1"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
LINES = st.tuples(NAMES, WORDS).map(lambda pair: ": ".join([pair[0].replace(".", ":\n  "), pair[1]]) + "\n")
YAML = st.one_of(st.text(max_size=60), st.lists(LINES, max_size=4).map("".join))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES, WORDS), max_size=3), st.text(max_size=6), st.booleans())
def test_any_overrides_give_parameters_or_a_user_error(pairs, mode, demo):
    with suppress(UserError):
        resolve_train(
            "aya", training_mode=mode or None, demo=demo, overrides=[f"{key}={value}" for key, value in pairs]
        )


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, LEAVES, max_size=3))
def test_any_flags_give_parameters_or_a_user_error(flags):
    with suppress(UserError):
        assert isinstance(resolve_train("text", flags=flags), TrainParams)


@settings(max_examples=200, deadline=None)
@given(YAML)
def test_any_file_gives_parameters_that_can_be_saved_or_a_user_error(text):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        with suppress(UserError):
            params = resolve_train("llama32", config_file=path)
            path.write_text(dump_yaml(params), encoding="utf-8", newline="")
            assert load_params(path) == params
