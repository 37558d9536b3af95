import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.data.batches import load_samples
from inft.data.images import BadImage
from inft.data.preferences import Preference, Unusable, read_preference, read_prompt
from inft.data.prompts import keep_spacing
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3),
    ),
    max_leaves=12,
)
WORDS = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=12)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@given(JSON, JSON, JSON)
def test_any_values_are_a_preference_or_a_reason(prompt, chosen, rejected):
    try:
        found = read_preference({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except Unusable:
        return
    assert found.prompt.strip()
    assert found.chosen.strip()
    assert found.rejected.strip()
    assert found.chosen != found.rejected
    assert all(text == keep_spacing(text) for text in (found.prompt, found.chosen, found.rejected))


@given(WORDS, WORDS, WORDS)
def test_every_form_of_a_preference_says_the_same(prompt, chosen, rejected):
    forms = [
        {"prompt": prompt, "chosen": chosen, "rejected": f" {rejected}\n"},
        {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        {"chosen": [user(prompt), assistant(chosen)], "rejected": [user(prompt), assistant(rejected)]},
        {
            "prompt": prompt,
            "chosen": [user(prompt), assistant(chosen)],
            "rejected": [user(prompt), assistant(rejected)],
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
            "rejected": rejected,
        },
    ]
    for form in forms:
        if chosen == rejected:
            with pytest.raises(Unusable, match="equal"):
                read_preference(form)
        else:
            assert read_preference(form) == Preference(prompt=prompt, chosen=chosen, rejected=rejected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chosen": "a", "rejected": " a "}, "its chosen and its rejected are equal: 'a'"),
        ({"chosen": "", "rejected": "b"}, "its chosen is empty"),
        ({"chosen": "a", "rejected": "\u200b "}, "its rejected is empty"),
        ({"chosen": "a", "rejected": None}, "its rejected is empty"),
        ({"chosen": "a"}, "its rejected is empty"),
        ({"chosen": "a", "rejected": 3}, "its rejected is int '3', not text"),
        ({"chosen": {"text": "a"}, "rejected": "b"}, "its chosen is dict"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "its prompt is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "its prompt is empty"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "its prompt has the turns none"),
        ({"prompt": [{"role": "system", "content": "s"}, user("p")], "chosen": "a", "rejected": "b"}, "system, user"),
        ({"chosen": [user("p"), assistant("a"), user("q")], "rejected": "b"}, "has the turns user, assistant, user"),
        ({"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "they are no pair"),
        ({"chosen": [user("p"), assistant("a")], "rejected": "b"}, "they are no pair"),
        ({"prompt": "r", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}, "are to 'p'"),
        ({"chosen": ["a"], "rejected": "b"}, "no object with a role"),
        ({"chosen": [assistant("")], "rejected": "b"}, "its chosen is empty"),
    ],
)
def test_a_row_that_teaches_nothing_says_why(values, reason):
    with pytest.raises(Unusable) as caught:
        read_preference(values)
    assert reason in str(caught.value)


def test_an_answer_keeps_its_lines_and_a_prompt_its_own():
    found = read_preference({"prompt": "one\n\ntwo", "chosen": "a\nb", "rejected": "a  b"})
    assert found == Preference(prompt="one\n\ntwo", chosen="a\nb", rejected="a  b")
    assert read_prompt([user("one\ntwo")]) == "one\ntwo"


CODE = "def f(x):\n    if x:\n\treturn  x\n\n\n    return 0"


def test_answers_and_prompts_keep_their_indentation_and_lose_control_characters_alone():
    flat = CODE.replace("    return", "  return")
    given = {"prompt": f"  Mend this:\r\n{CODE} ", "chosen": f"{CODE}\n\x00", "rejected": flat.replace("x", "x\x1b")}
    found = read_preference(given)
    assert found == Preference(prompt=f"Mend this:\n{CODE}", chosen=CODE, rejected=flat)
    turns = {"chosen": [user("a  b"), assistant(CODE)], "rejected": [user("a b"), assistant(flat)]}
    assert read_preference(turns) == Preference(prompt="a  b", chosen=CODE, rejected=flat)


def test_an_indented_answer_reaches_the_sample_as_it_is(write_jsonl):
    rows = [{**row, "prompt": f"{row['prompt']}\n{CODE}", "chosen": f"{CODE}  # {row['image']}"} for row in ROWS]
    loaded = load(write_jsonl(rows))
    samples = [*loaded.train, *loaded.heldout]
    assert {s.answer for s in samples} == {row["chosen"] for row in rows}
    assert {s.prompt.text for s in samples} == {row["prompt"] for row in rows}


ROWS = [
    {"image": n, "prompt": f"What is it, {n}?", "chosen": f"it is {n}", "rejected": f"it is not {n}", "language": "en"}
    for n in range(12)
]


def load(place: Path, *, kind="preferences", images=True, file: Path | None = None, **fields):
    config = MUNIChusLoadConfig(data=str(place), languages=("en",), eval_fraction=0.2, **fields)
    return load_samples(config, quarantine_file=file, with_images=images, kind=kind)


def test_preference_rows_become_samples_with_their_own_prompt(write_jsonl):
    loaded = load(write_jsonl(ROWS))
    samples = [*loaded.train, *loaded.heldout]
    assert loaded.heldout
    assert len(samples) == len(ROWS)
    said = {(s.prompt.text, s.answer, s.rejected) for s in samples}
    assert said == {(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS}
    assert all(sample.image is not None for sample in samples)


def test_without_a_prompt_column_the_usual_instruction_asks_and_a_text_model_needs_no_images(write_jsonl):
    rows = [{key: row[key] for key in ("chosen", "rejected")} for row in ROWS]
    loaded = load(write_jsonl(rows), images=False)
    assert {sample.prompt.text for sample in loaded.train} == {"Write a caption for this image in English."}
    assert all(sample.image is None for sample in loaded.train)
    with pytest.raises(UserError, match="no column 'image'"):
        load(write_jsonl(rows))


def test_the_chosen_answer_may_stand_under_any_name(write_jsonl):
    rows = [{"image": row["image"], "best": row["chosen"], "worst": row["rejected"]} for row in ROWS]
    for ours in ("chosen", "caption"):
        loaded = load(write_jsonl(rows), columns={ours: "best", "rejected": "worst"})
        assert {sample.answer for sample in [*loaded.train, *loaded.heldout]} == {row["chosen"] for row in ROWS}
    rows = [{"image": row["image"], "caption": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
    assert load(write_jsonl(rows)).train[0].rejected is not None


def test_bad_preferences_are_listed_with_their_lines_and_stop_a_run_that_has_too_many(write_jsonl, tmp_path):
    rows = [*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}, {**ROWS[1], "prompt": ""}]
    place, file = write_jsonl(rows), tmp_path / "bad.jsonl"
    loaded = load(place, file=file, max_bad_fraction=0.2)
    assert [(row.where, row.language) for row in loaded.bad] == [
        ("train.jsonl line 13", "en"),
        ("train.jsonl line 14", "en"),
    ]
    assert [row.reason for row in loaded.bad] == [
        "its chosen and its rejected are equal: 'it is 0'",
        "its prompt is empty",
    ]
    with pytest.raises(UserError, match=r"(?s)2 bad rows.*line 13: its chosen and its rejected are equal"):
        load(place, file=file)
    assert [json.loads(line)["where"] for line in file.read_text().splitlines()] == [row.where for row in loaded.bad]


def test_a_row_without_the_column_of_the_others_is_bad(write_jsonl):
    loaded = load(write_jsonl([*ROWS, {"image": 1, "chosen": "a", "language": "en"}]), max_bad_fraction=0.2)
    assert [row.reason for row in loaded.bad] == ["no rejected column among image, chosen, language"]


def test_a_data_set_without_preferences_says_which_columns_are_needed(write_jsonl):
    with pytest.raises(UserError) as caught:
        load(write_jsonl([{"image": 1, "caption": "a cat", "language": "en"}] * 3))
    for part in (
        "no column 'rejected'",
        "image, caption, language",
        "--method dpo",
        "--set data.columns.rejected=NAME",
    ):
        assert part in str(caught.value)


def test_captions_are_read_as_ever_whatever_columns_stand_beside_them(write_jsonl):
    rows = [{"image": n, "caption": f"caption {n}", "prompt": "Say.", "language": "en"} for n in range(12)]
    plain = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    place = write_jsonl(rows)
    loaded = load(place, kind="captions")
    assert {sample.prompt.text for sample in loaded.train} == {"Write a caption for this image in English."}
    assert all(sample.rejected is None for sample in loaded.train)
    assert loaded.fingerprint == load(write_jsonl(plain), kind="captions").fingerprint
    prompted = load(write_jsonl(rows), kind="references")
    assert {sample.prompt.text for sample in prompted.train} == {"Say."}
    assert prompted.fingerprint != loaded.fingerprint


def test_prompts_need_no_caption_where_nothing_is_compared_with_it(write_jsonl):
    rows = [{"prompt": f"Say {n}.", "language": "en"} for n in range(12)]
    loaded = load(write_jsonl(rows), kind="prompts", images=False)
    assert {sample.answer for sample in [*loaded.train, *loaded.heldout]} == {""}
    with pytest.raises(UserError, match="no column 'caption'"):
        load(write_jsonl(rows), kind="references", images=False)
    bad = load(write_jsonl([*rows, {"prompt": 7}]), kind="prompts", images=False, max_bad_fraction=0.2).bad
    assert [row.reason for row in bad] == ["its prompt is int '7', not text"]


def test_a_prompt_is_never_both_trained_on_and_held_out(write_jsonl):
    rows = [
        {"prompt": f"Question {n // 4}", "chosen": f"yes {n}", "rejected": f"no {n}", "language": "en"}
        for n in range(80)
    ]
    loaded = load(write_jsonl(rows), images=False)
    trained, heldout = ({sample.prompt.text for sample in part} for part in (loaded.train, loaded.heldout))
    assert heldout
    assert not trained & heldout


@pytest.mark.parametrize("kind", ["preferences", "references"])
def test_nor_is_it_where_rows_have_titles_too(write_jsonl, kind):
    rows = [
        {
            "prompt": f"Question {n // 4}",
            **({"title": f"title {n}"} if n % 4 else {}),
            "chosen": f"yes {n}",
            "caption": f"yes {n}",
            "rejected": f"no {n}",
        }
        for n in range(80)
    ]
    loaded = load(write_jsonl(rows), images=False, kind=kind, default_language="en")
    trained, heldout = ({sample.prompt.text for sample in part} for part in (loaded.train, loaded.heldout))
    assert heldout
    assert not trained & heldout


def test_one_instruction_for_different_news_makes_no_group(write_jsonl):
    rows = [
        {"prompt": "Write a title.", "content": f"news {n}", "chosen": f"yes {n}", "rejected": "no", "language": "en"}
        for n in range(40)
    ]
    assert 2 <= len(load(write_jsonl(rows), images=False, context="content").heldout) <= 20


def test_a_list_of_one_image_is_that_image(write_jsonl):
    place = write_jsonl(ROWS)
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    listed = [{**{k: v for k, v in line.items() if k != "image"}, "images": [line["image"]]} for line in lines]
    plain = load(place)
    loaded = load(write_jsonl(listed))
    assert loaded.fingerprint == plain.fingerprint
    twice = load(write_jsonl([*listed, {**listed[0], "images": [lines[0]["image"], lines[1]["image"]]}]), **LENIENT)
    assert [row.reason for row in twice.bad] == ["it has 2 images: a row has one"]


LENIENT = {"max_bad_fraction": 0.2}


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("typed", [True, False])
def test_a_table_may_list_a_row_s_image(tmp_path, picture, typed):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"images": [{"bytes": picture(n), "path": None}], "prompt": f"{n}?", "chosen": f"{n}", "rejected": f"not {n}"}
        for n in range(11)
    ]
    table = datasets.Dataset.from_list(rows)
    if typed:
        table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(str(tmp_path / "train.parquet"))
    loaded = load(tmp_path)
    samples = [*loaded.train, *loaded.heldout]
    assert len({sample.meta["picture"] for sample in samples}) == 11
    assert all(sample.image.load().getpixel((0, 0))[0] == int(sample.answer) for sample in samples)


def test_where_rows_are_preferences_the_chosen_answer_is_the_reference(write_jsonl):
    loaded = load(write_jsonl(ROWS), kind="references")
    assert {sample.answer for sample in loaded.train} <= {row["chosen"] for row in ROWS}
    assert all(sample.rejected is None for sample in loaded.train)
    turns = [
        {
            "image": row["image"],
            "best": [user(row["prompt"]), assistant(row["chosen"])],
            "rejected": [user(row["prompt"]), assistant(row["rejected"])],
        }
        for row in ROWS
    ]
    told = load(write_jsonl(turns), kind="references", columns={"chosen": "best", "rejected": "worst"})
    said = {(sample.prompt.text, sample.answer) for sample in [*told.train, *told.heldout]}
    assert said == {(row["prompt"], row["chosen"]) for row in ROWS}
    both = [{**row, "caption": f"caption {row['image']}"} for row in ROWS]
    assert load(write_jsonl(both), kind="references").train[0].answer.startswith("caption")


def test_the_fingerprint_covers_the_rejected_answers(write_jsonl):
    before = load(write_jsonl(ROWS)).fingerprint
    assert load(write_jsonl([{**ROWS[0], "rejected": "something else"}, *ROWS[1:]])).fingerprint != before
    assert load(write_jsonl(ROWS)).fingerprint == before


def test_a_csv_beside_images_holds_preferences(tmp_path, picture):
    lines = ["file_name,prompt,chosen,rejected"]
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        lines.append(f"{n}.png,What?,it is {n},it is not {n}")
    (tmp_path / "metadata.csv").write_text("\n".join([*lines, "0.png,What?,same,same"]) + "\n", encoding="utf-8")
    loaded = load(tmp_path, max_bad_fraction=0.2)
    assert len(loaded.train) + len(loaded.heldout) == 10
    assert [row.where for row in loaded.bad] == ["metadata.csv line 12"]


@pytest.mark.usefixtures("own_cache")
def test_tables_hold_preferences_as_conversations(tmp_path, picture):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [
            {
                "image": {"bytes": picture(n), "path": None},
                "prompt": [{"role": "user", "content": f"What is {n}?"}],
                "chosen": [{"role": "assistant", "content": f"it is {n}"}],
                "rejected": [{"role": "assistant", "content": "same" if n == 11 else f"it is not {n}"}],
                "score": n,
            }
            for n in range(11)
        ],
    ).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "train.parquet"))
    loaded = load(tmp_path)
    said = {(s.prompt.text, s.answer, s.rejected) for s in [*loaded.train, *loaded.heldout]}
    assert said == {(f"What is {n}?", f"it is {n}", f"it is not {n}") for n in range(11)}
    assert not any(isinstance(sample.image, BadImage) for sample in loaded.train)
    table.remove_columns("rejected").to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match=r"no column 'rejected'.*image, prompt, chosen, score"):
        load(tmp_path)
