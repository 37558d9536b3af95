import re
from pathlib import Path

import pytest

from params import UserError
from params.munichus import LANGUAGE_NAMES
from params.presets import MODEL_NAMES, TRAINING_MODES
from params.resolve import dump_yaml, load_params, resolve_train


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        resolve_train(*args, **kwargs)
    return str(caught.value)


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_the_defaults_are_those_of_the_guide():
    params = resolve_train("llama32")
    assert params.training_mode == "basic"
    assert params.model_name == params.processor_name == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert params.output_dir == params.sft.llama_32_output_dir
    assert params.best_model_dir == params.sft.llama32_best_model_dir
    assert (params.sft.lr, params.sft.gradient_accumulation_steps, params.lora.r) == (1.5e-4, 16, 64)


def test_flags_win_over_set_over_yaml_over_preset_over_default(tmp_path):
    config = yaml_file(tmp_path, "sft:\n  lr: 1.0e-2\n  max_steps: 11\n  logging_steps: 3\n")
    params = resolve_train(
        "aya", demo=True, config_file=config, overrides=["sft.lr=2e-2", "sft.max_steps=12"], flags={"max_steps": 13}
    )
    assert params.sft.max_steps == 13  # flag
    assert params.sft.lr == 2e-2  # --set
    assert params.sft.logging_steps == 3  # YAML
    assert params.basic.dtype == "float32"  # preset
    assert params.sft.weight_decay == 1e-6  # default


def test_every_model_and_mode_resolves_and_writes_to_a_directory_of_its_own():
    runs = [
        resolve_train(m, training_mode=t, demo=d) for m in MODEL_NAMES for t in TRAINING_MODES for d in (False, True)
    ]
    assert len({run.output_dir for run in runs}) == len({run.task for run in runs}) == len(runs)


def test_every_error_is_listed_at_once_with_its_place_and_a_suggestion(tmp_path):
    config = yaml_file(tmp_path, "sft:\n  lrr: 3\n  warmup_ratio: 7\nlora:\n  dropout: no\n")
    text = message(
        "lama32",
        training_mode="advancd",
        config_file=config,
        overrides=["lr=3", "sft.lr=-1", "nonsense", "data.columns={foo: a}", "data.eval_fraction=nan"],
        flags={"max_steps": "soon"},
    )
    lines = text.splitlines()
    assert lines[0] == "11 errors in the parameters:"
    assert len(lines) == 12
    assert "unknown model 'lama32'; did you mean llama32?" in text
    assert "unknown training mode 'advancd'; did you mean advanced?" in text
    assert f"{config} line 2: sft.lrr is not a parameter; did you mean sft.lr?" in text
    assert f"{config} line 3: sft.warmup_ratio must be at least 0 and at most 1, got 7." in text
    assert f"{config} line 5: lora.dropout must not be true or false" in text
    assert "--set: lr is not a parameter; did you mean sft.lr?" in text
    assert "--set: sft.lr must be above 0, got -1." in text
    assert "--set nonsense: expected section.field=value" in text
    assert "data.eval_fraction must be at least 0 and below 1, got nan." in text
    assert "--max-steps: sft.max_steps should be a valid integer" in text


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lora.r=0", "at least 1"),
        ("basic.max_length=31", "at least 32"),
        ("lora.dropout=1", "below 1"),
        ("data.max_bad_fraction=1.5", "at most 1"),
        ("sft.lr=inf", "above 0"),
        ("sft.max_steps=1.5", "valid integer"),
        ("lora.bias=some", "'none', 'all' or 'lora_only', got 'some'"),
        ("sft.report_to=wandb,mail", "got 'mail'"),
        ("lora=3", "lora is a section"),
        ("sft.dropout=0.1", "did you mean lora.dropout?"),
        ("foo.bar=1", "the sections are basic, data, qlora, lora, sft"),
        ("data.columns=[", "not valid YAML"),
        ("data.languages=", "name at least one language"),
        ("data.languages=en,en", "twice"),
        ("data.languages=en,de", "--set data.language_names.de=NAME"),
        ("basic.gen_num_beams=4", "basic.gen_num_beams has no effect in inft train"),
        ("basic.gen_do_sample=no", "basic.gen_do_sample has no effect in inft train"),
        ("basic.gen_top_p=0.5", "basic.gen_top_p has no effect in inft train"),
        ("basic.gen_temperature=0.5", "basic.gen_temperature has no effect in inft train"),
        ("basic.gen_max_new_tokens=9", "only a demo on the sample set and --eval-captions generate captions"),
        ("sft.best_metric=chrf", "add --eval-captions N, such as 64, or leave --best-metric out"),
        ("sft.best_metric=meteor", "'loss', 'chrf', 'bleu4', 'cider', 'exact' or 'reward', got 'meteor'"),
        ("sft.eval_captions=-1", "at least 0"),
        ("basic.metric_dir=tables", "basic.metric_dir has no effect in inft train"),
        ("data.cjk_tokens=ja", "data.cjk_tokens has no effect in inft train without captions to score"),
        ("qlora.bnb_4bit_compute_dtype=float16", "--set basic.dtype=float16"),
        ("basic.dtype=float16", "--set qlora.bnb_4bit_compute_dtype=float16"),
        ("task=../a", "--task"),
        ("data.batch_size=4", "sft.per_device_train_batch_size"),
        ("lora.init=pissa", "--no-quantize"),
        ("basic.llama_model_name=", "--demo"),
        ("demo=true", "say it on the command line instead"),
    ],
)
def test_a_wrong_value_is_refused_with_its_remedy(override, complaint):
    assert complaint in message("llama32", overrides=[override])


def test_vision_in_4_bit_without_4_bit_is_refused():
    assert "quantize_vision" in message("aya", overrides=["qlora.quantize_vision=yes"], flags={"quantize": False})


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("sft.lr=2e-4", "sft", "lr", 2e-4),
        ("data.languages=en, si", "data", "languages", ("en", "si")),
        (
            "lora.target_modules=.*q{0,1},[qk,v]_proj,.*(a,b)\\(",
            "lora",
            "target_modules",
            (".*q{0,1}", "[qk,v]_proj", ".*(a,b)\\("),
        ),
        ("lora.target_modules=[qk]_proj", "lora", "target_modules", ("[qk]_proj",)),
        ("lora.target_modules=[a, b]", "lora", "target_modules", ("a", "b")),
        ("data.languages=[en, si]", "data", "languages", ("en", "si")),
        ("sft.max_steps=none", "sft", "max_steps", None),
        ("data.columns={caption: text}", "data", "columns", {"caption": "text"}),
        ("lora.use_dora=true", "lora", "use_dora", True),
        ("data.instruction=Say = what {language}", "data", "instruction", "Say = what {language}"),
        ('lora.target_modules=["a{1,2}"]', "lora", "target_modules", ("a{1,2}",)),
    ],
)
def test_text_becomes_the_type_of_its_field(override, section, field, value):
    assert getattr(getattr(resolve_train("aya", overrides=[override]), section), field) == value


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    assert resolve_train("aya", config_file=yaml_file(tmp_path, "sft: {lr: 2e-4}")).sft.lr == 2e-4


def test_a_new_language_name_joins_the_known_ones():
    params = resolve_train("text", overrides=["data.language_names={de: German}", "data.languages=de,en"])
    assert params.data.language_names["de"] == "German"
    assert params.data.language_names["en"] == "English"


def test_entries_of_a_mapping_are_set_one_by_one_and_add_up(tmp_path):
    config = yaml_file(tmp_path, "data:\n  columns: {title: headline, image: photo}\n")
    overrides = ["data.columns={content: body, image: file}", "data.columns.caption=text", "data.columns.content=story"]
    params = resolve_train("aya", config_file=config, overrides=overrides)
    assert params.data.columns == {"title": "headline", "image": "file", "caption": "text", "content": "story"}
    named = resolve_train("text", overrides=["data.language_names.de=German", "data.languages=de,en"])
    assert (named.data.language_names["de"], named.data.language_names["en"]) == ("German", "English")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "data.columns.captoin=text",
            "should be 'image', 'title', 'content', 'caption', 'language', 'prompt', 'chosen' or 'rejected', got",
        ),
        ("data.columns.=text", "data.columns. is not a parameter"),
        ("data.languages.en=English", "data.languages.en is not a parameter"),
        ("sft.lr.max=1", "sft.lr.max is not a parameter"),
    ],
)
def test_only_a_mapping_has_entries(override, complaint):
    assert complaint in message("aya", overrides=[override])


def test_every_set_that_the_readme_and_the_messages_tell_users_to_type_resolves():
    root = Path(__file__).parents[2]
    texts = [
        path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted((root / "inft/data").glob("*.py")))
    ]
    told = [found for text in texts for found in re.findall(r"--set ([a-z]\w*\.[\w.{}]+=[\w.]+)", text)]
    assert len(told) >= 4
    for override in told:
        if override != "section.field=value":
            needed = {"craft_pairs": "translations", "craft": True} if override.startswith("craft.") else {}
            method = "grpo" if override.startswith("rl.") else None
            resolve_train("aya", method=method, overrides=[re.sub(r"\{\w+\}", "title", override)], flags=needed)


def test_a_model_brings_its_processor_unless_one_is_named():
    assert resolve_train("aya", flags={"model": "/m"}).processor_name == "/m"
    named = resolve_train("aya", flags={"model": "/m"}, overrides=["basic.aya_processor_name=/p"])
    assert named.processor_name == "/m"  # of the higher layer
    both = resolve_train("aya", overrides=["basic.aya_model_name=/m", "basic.aya_processor_name=/p"])
    assert (both.model_name, both.processor_name) == ("/m", "/p")


def test_the_demo_generates_captions_and_takes_their_length():
    assert resolve_train("aya", demo=True, overrides=["basic.gen_max_new_tokens=9"]).basic.gen_max_new_tokens == 9


def test_captions_at_each_evaluation_take_their_length_and_languages_and_stay_greedy():
    overrides = ["basic.gen_max_new_tokens=9", "data.cjk_tokens=ja"]
    params = resolve_train("aya", overrides=overrides, flags={"eval_captions": "8", "best_metric": "chrf"})
    assert (params.sft.eval_captions, params.sft.best_metric, params.basic.gen_max_new_tokens) == (8, "chrf", 9)
    sampled = message("aya", overrides=["basic.gen_do_sample=no"], flags={"eval_captions": 8})
    assert "basic.gen_do_sample has no effect in inft train, whose captions are greedy" in sampled


def test_a_metric_that_would_choose_nothing_is_refused():
    unused = ["sft.load_best_model_at_end=no", "sft.early_stopping_patience=0"]
    flags = {"eval_captions": 8, "best_metric": "cider"}
    assert "sft.best_metric=cider has no effect" in message("aya", overrides=unused, flags=flags)
    for override in unused:  # the other one uses it
        assert resolve_train("aya", overrides=[override], flags=flags).sft.best_metric == "cider"
    assert resolve_train("aya", overrides=unused, flags={"eval_captions": 8}).sft.best_metric == "loss"


def test_half_precision_is_switched_in_both_places():
    overrides = ["qlora.bnb_4bit_compute_dtype=float16", "basic.dtype=float16"]
    assert resolve_train("aya", overrides=overrides).basic.dtype == "float16"
    assert resolve_train("aya", overrides=overrides[:1], flags={"quantize": False}).basic.dtype == "bfloat16"
    assert resolve_train("aya", demo=True, overrides=["basic.dtype=float16"]).basic.dtype == "float16"


def test_a_run_may_have_a_log_of_its_own_name():
    assert resolve_train("aya", flags={"task": "aya_lr3"}).task == "aya_lr3"


def test_an_output_directory_holds_its_best_adapter():
    params = resolve_train("aya", flags={"output_dir": "/runs/a"})
    assert (params.output_dir, params.best_model_dir) == ("/runs/a", "/runs/a/best")
    moved = resolve_train("aya", training_mode="advanced", overrides=["basic.output_dir=/big"])
    assert (moved.output_dir, moved.best_model_dir) == ("/big/aya_advanced", "/big/aya_advanced/best")


def test_a_demo_uses_the_embedded_model_and_teaches_it_languages_it_does_not_know():
    params = resolve_train("llama32", training_mode="advanced", demo=True)
    assert params.model_name == params.processor_name == ""
    assert params.data.data == "sample"
    assert params.data.languages == ("ur", "si", "yue")
    assert params.data.context == "none"
    assert not params.qlora.load_in_4bit
    assert params.task == "llama32_advanced_demo"
    assert resolve_train("text", demo=True).data.context == "content"


def test_a_demo_on_other_data_keeps_that_datas_languages_and_context():
    params = resolve_train("llama32", demo=True, flags={"data": "captions.jsonl"})
    assert params.model_name == ""
    assert len(params.data.languages) == 10
    assert params.data.context == "content"


def test_epochs_replace_the_steps_of_a_preset_and_contradict_steps():
    params = resolve_train("aya", demo=True, flags={"epochs": 2})
    assert (params.sft.num_epochs, params.sft.max_steps) == (2, None)
    assert "--epochs and --max-steps" in message("aya", flags={"epochs": 2, "max_steps": 3})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sft:\n  lr: [1\n", "line 3, column 1: not valid YAML"),
        ("sft:\n\tlr: 1\n", "line 2, column 1: not valid YAML"),
        ("- 1\n", "expected sections"),
        ("sft:\n  lr: 1\n  lr: 2\n", "line 3: sft.lr is given twice"),
        ("sft: 3\n", "line 1: sft is a section"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("sft:\n  lr: \x01\n", "not valid YAML"),
        ("model: aya\n", "model is aya, but the command line says llama32"),
        (
            "output_dir: a\nsft: {llama_32_output_dir: b}\n",
            "output_dir and sft.llama_32_output_dir differ",
        ),
    ],
)
def test_a_bad_yaml_file_is_named_with_its_line(tmp_path, text, complaint):
    path = yaml_file(tmp_path, text)
    found = message("llama32", config_file=path)
    assert str(path) in found
    assert complaint in found


def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path):
    assert "cannot be read" in message("aya", config_file=tmp_path / "absent.yaml")
    assert "cannot be read" in message("aya", config_file=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"sft: \xff\n")
    assert "not UTF-8" in message("aya", config_file=tmp_path / "latin.yaml")


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path):
    assert resolve_train("aya", config_file=yaml_file(tmp_path, "# nothing\n")) == resolve_train("aya")
    assert resolve_train("aya", config_file=yaml_file(tmp_path, "sft: {}\nlora:\n")) == resolve_train("aya")


@pytest.mark.parametrize("demo", [False, True])
def test_the_parameters_saved_beside_a_run_start_the_same_run(tmp_path, demo):
    params = resolve_train("aya", training_mode="advanced", demo=demo, flags={"output_dir": str(tmp_path / "out")})
    path = yaml_file(tmp_path, dump_yaml(params))
    assert load_params(path) == params
    assert resolve_train("aya", config_file=path) == params


def test_a_saved_file_without_its_own_fields_is_refused(tmp_path):
    with pytest.raises(UserError, match="output_dir is missing"):
        load_params(yaml_file(tmp_path, "model: aya\n"))


def test_a_tilde_in_a_directory_is_the_home_directory_also_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "c.yaml"
    config.write_text("output_dir: ~/runs/x\nbasic:\n  logs_dir: ~/logs\n")
    params = resolve_train("text", demo=True, config_file=config)
    assert (params.output_dir, params.best_model_dir, params.basic.logs_dir) == (
        f"{tmp_path}/runs/x",
        f"{tmp_path}/runs/x/best",
        f"{tmp_path}/logs",
    )


def test_an_empty_output_directory_is_refused() -> None:
    assert "output_dir is empty" in message("text", demo=True, flags={"output_dir": ""})


@pytest.mark.parametrize(("word", "code"), [("urdu", "ur"), ("EN", "en"), ("Cantonses", "yue")])
def test_a_language_written_out_is_told_its_code(word: str, code: str) -> None:
    assert f"did you mean {code}?" in message("text", demo=True, flags={"languages": word})


def test_all_languages_are_those_that_have_a_name():
    params = resolve_train("aya", flags={"languages": "all"}, overrides=["data.language_names.ta=Tamil"])
    assert params.data.languages == (*LANGUAGE_NAMES, "ta")
    assert resolve_train("aya", flags={"languages": "all"}).data.languages == tuple(LANGUAGE_NAMES)
