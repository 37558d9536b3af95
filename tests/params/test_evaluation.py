"""resolve_eval: an adapter's own record first, then what the command line says; everything wrong at once."""

from dataclasses import asdict

import pytest

from params import MUNIChusLoadConfig, UserError
from params.evaluation import evaluation_name, resolve_eval
from params.presets import MODEL_NAMES
from params.resolve import resolve_train


def trained(model="llama32", **flags):
    return asdict(resolve_train(model, demo=True, flags=flags))


def test_without_an_adapter_the_defaults_hold_and_captions_are_greedy():
    params = resolve_eval("aya")
    assert params.model_name == "CohereLabs/aya-vision-8b"
    assert params.data.split == "test"
    assert not params.basic.gen_do_sample
    assert params.qlora.load_in_4bit


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_a_demo_is_the_embedded_model_in_every_language(model):
    params = resolve_eval(model, demo=True)
    assert params.model_name == params.processor_name == ""
    assert params.basic.dtype == "float32"
    assert not params.qlora.load_in_4bit
    assert params.data.languages == MUNIChusLoadConfig().languages
    assert params.data.context == ("content" if model == "text" else "none")


def test_an_adapters_run_says_model_prompt_and_data():
    run = trained(languages="si", **{"data.instruction": "Say it in {language}.", "basic.max_length": 300})
    params = resolve_eval("llama32", adapter="best", trained=run)
    assert params.demo
    assert params.model_name == ""
    assert params.data.languages == ("si",)
    assert params.data.instruction == "Say it in {language}."
    assert params.basic.max_length == 300
    assert params.data.split == "test"
    assert params.trained.languages == ("si",)


def test_on_other_data_all_languages_and_its_own_columns_are_read():
    run = trained(data="train_dir", languages="si", **{"data.columns": {"caption": "text"}})
    same = resolve_eval("llama32", trained=run, flags={"data": "train_dir"})
    other = resolve_eval("llama32", trained=run, flags={"data": "elsewhere"})
    assert (same.data.languages, dict(same.data.columns)) == (("si",), {"caption": "text"})
    assert (other.data.languages, dict(other.data.columns)) == (MUNIChusLoadConfig().languages, {})


def test_the_prompt_of_the_run_is_kept_on_other_data_but_scenes_hide_what_they_show():
    run = trained(data="news", **{"data.context": "title"})
    assert resolve_eval("llama32", trained=run, flags={"data": "other_news"}).data.context == "title"
    assert resolve_eval("llama32", trained=run, flags={"data": "sample"}).data.context == "none"


def test_all_means_every_language_that_has_a_name():
    run = trained(languages="si")
    assert resolve_eval("llama32", trained=run, flags={"languages": "all"}).data.languages == tuple(
        MUNIChusLoadConfig().language_names
    )
    assert resolve_eval("llama32", trained=run, flags={"languages": "ur,en"}).data.languages == ("ur", "en")


def test_set_and_flags_win_over_the_record():
    params = resolve_eval(
        "llama32",
        trained=trained(),
        overrides=["basic.gen_num_beams=3", "data.language_names.ta=Tamil"],
        flags={"max_new_tokens": "7", "quantize": False, "split": "validation"},
    )
    assert (params.basic.gen_num_beams, params.basic.gen_max_new_tokens) == (3, 7)
    assert (params.data.split, params.qlora.load_in_4bit) == ("validation", False)
    assert params.data.language_names["ta"] == "Tamil"


def test_another_place_of_the_base_is_no_demo():
    params = resolve_eval("llama32", trained=trained(), model_name="local/copy")
    assert (params.model_name, params.processor_name, params.demo) == ("local/copy", "local/copy", False)


def test_the_runs_own_model_name_is_read_not_the_default():
    run = asdict(resolve_train("aya", flags={"model": "someone/aya"}))
    assert resolve_eval("aya", trained=run).model_name == "someone/aya"


@pytest.mark.parametrize(
    ("overrides", "flags", "said"),
    [
        (["sft.lr=1"], {}, r"--set sft\.lr: it is a parameter of training and has no effect here"),
        (["nonsense=1"], {}, r"--set nonsense: not a parameter; the sections are basic, data, qlora"),
        (["basic.max_lenght=9"], {}, r"did you mean basic\.max_length"),
        ([], {"max_new_tokens": "many"}, "--max-new-tokens: basic.gen_max_new_tokens"),
        ([], {"temperature": "0"}, "must be above 0"),
        ([], {"languages": "xx"}, "xx has no name for the prompt"),
    ],
)
def test_what_is_wrong_is_said(overrides, flags, said):
    with pytest.raises(UserError, match=said):
        resolve_eval("llama32", demo=True, overrides=overrides, flags=flags)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(UserError, match=r"(?s)2 errors.*sft\.lr.*gen_top_p"):
        resolve_eval("llama32", overrides=["sft.lr=1", "basic.gen_top_p=2"])


def test_an_unknown_family_is_told_with_the_nearest():
    with pytest.raises(UserError, match="unknown model 'lama32'; did you mean llama32"):
        resolve_eval("lama32")


def test_a_field_of_another_version_is_no_traceback():
    run = trained()
    run["basic"]["from_the_future"] = 1
    with pytest.raises(UserError, match=r"best\.json: basic\.from_the_future is not a parameter"):
        resolve_eval("llama32", trained=run)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"flags": {"data": "sample"}}, "llama32_base_demo-sample-test"),
        ({"flags": {"data": "/data/emoji10"}, "adapter": "outputs/urdu run/best"}, "urdu_run-emoji10-test"),
        ({"flags": {"data": "hub:me/news", "split": "dev"}}, "llama32_base_demo-me_news-dev"),
        ({"flags": {"data": "x.jsonl"}, "shots": 3, "shot_choice": "similar"}, "llama32_base_demo-x-test-similar3"),
        ({"flags": {"data": "sample"}, "adapter": "a/adapters"}, "adapters-sample-test"),
    ],
)
def test_an_evaluations_directory_is_named_by_what_is_in_it(changes, name):
    assert evaluation_name(resolve_eval("llama32", demo=True, **changes)) == name
