import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inft.data.batches import load_samples
from inft.data.heldout import article_key
from inft.data.images import pixel_digest
from inft.data.quarantine import write_quarantine
from inft.data.rows import BadRow
from inft.sample import Sample
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig

ROOT = Path(__file__).parents[2]


def config_of(directory: Path, **fields: object) -> MUNIChusLoadConfig:
    return MUNIChusLoadConfig(**{"data": str(directory), "languages": ("en", "ur"), **fields})  # type: ignore[arg-type]


def load(directory: Path, *, with_images: bool = True, quarantine_file: Path | None = None, **fields: object):  # type: ignore[no-untyped-def]
    return load_samples(config_of(directory, **fields), quarantine_file=quarantine_file, with_images=with_images)


def titles(samples: list[Sample]) -> set[str]:
    return {article_key(sample.meta["title"]) for sample in samples}


def test_a_row_becomes_a_sample(write_jsonl, news_rows) -> None:
    loaded = load(write_jsonl(news_rows()), eval_fraction=0.0)
    sample = loaded.train[1]
    assert sample.answer == "caption 0 in ur"
    assert sample.prompt.text == "Write a caption for this image in Urdu.\n\nNews text of article 0."
    assert (sample.language, sample.image.load().getpixel((0, 0))) == ("ur", (0, 0, 40))
    picture = pixel_digest(sample.image.load())
    where = "train.jsonl line 2"
    assert sample.meta == {"title": "Article 0", "where": where, "source": "jsonl", "picture": picture}
    assert loaded.rows_per_language == {"en": (20, 0), "ur": (20, 0)}
    assert (loaded.heldout, loaded.dropped_empty, loaded.bad, loaded.other_languages) == ([], 0, (), {})


def test_no_article_is_on_both_sides(write_jsonl, news_rows) -> None:
    loaded = load(write_jsonl(news_rows(articles=60)), eval_fraction=0.2)
    assert len(loaded.train) + len(loaded.heldout) == 120
    assert loaded.heldout
    assert not titles(loaded.train) & titles(loaded.heldout)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from(["A", "a ", "B", "C", ""]), st.integers(0, 5)), min_size=1, max_size=20),
    fraction=st.floats(0.0, 0.9),
)
def test_neither_title_nor_picture_leaks(write_jsonl, rows: list[tuple[str, int]], fraction: float) -> None:
    records = [{"image": n, "title": title, "caption": f"c{i}"} for i, (title, n) in enumerate(rows)]
    loaded = load(write_jsonl(records), languages=("en",), eval_fraction=fraction)
    sides = loaded.train, loaded.heldout
    pictures = [{sample.image.load().tobytes() for sample in side} for side in sides]
    assert not pictures[0] & pictures[1]
    assert not titles(sides[0]) & titles(sides[1]) - {""}
    assert loaded.train


def test_one_picture_under_two_titles_and_file_names_stays_on_one_side(write_jsonl, picture) -> None:
    rows = [{"image": f"images/{i}.png", "title": f"title {i}", "caption": f"c{i}"} for i in range(30)]
    directory = write_jsonl(rows)
    for i in range(30):
        (directory / "images" / f"{i}.png").write_bytes(picture(i // 2))
    loaded = load(directory, languages=("en",), eval_fraction=0.3)
    held = {int(sample.answer[1:]) for sample in loaded.heldout}
    assert held
    assert held == {i ^ 1 for i in held}


def test_captions_of_one_picture_stay_together_without_titles_and_without_images(write_jsonl) -> None:
    directory = write_jsonl([{"image": i, "captions": [f"{i} a", f"{i} b", f"{i} c"]} for i in range(20)])
    for with_images in (True, False):
        loaded = load(directory, languages=("en",), eval_fraction=0.2, with_images=with_images)
        held = Counter(sample.answer.split()[0] for sample in loaded.heldout)
        assert held
        assert set(held.values()) == {3}


def test_the_sources_own_validation_split_is_used(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows())
    write_jsonl(news_rows(articles=5, first=100), name="validation.jsonl")
    loaded = load(directory)
    assert loaded.rows_per_language == {"en": (20, 5), "ur": (20, 5)}
    assert {sample.meta["where"].split()[0] for sample in loaded.heldout} == {"validation.jsonl"}
    assert load(directory, eval_fraction=0.0).heldout == []


def test_a_validation_split_in_other_languages_counts_as_none(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows())
    write_jsonl(news_rows(("fr",), first=100), name="validation.jsonl")
    assert {sample.meta["where"].split()[0] for sample in load(directory).heldout} == {"train.jsonl"}


def test_held_out_rows_are_capped_and_spread_over_the_languages(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows())
    write_jsonl(news_rows(articles=15, first=100), name="validation.jsonl")
    loaded = load(directory, max_eval_rows=7)
    assert loaded.rows_per_language == {"en": (20, 4), "ur": (20, 3)}


def test_the_cap_holds_per_language_and_for_the_validation_split_in_proportion(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows(articles=40))
    write_jsonl(news_rows(articles=8, first=100), name="validation.jsonl")
    loaded = load(directory, max_rows_per_lang=10)
    assert loaded.rows_per_language == {"en": (10, 2), "ur": (10, 2)}


def test_the_cap_does_not_depend_on_the_process_or_on_the_order_of_the_rows(write_jsonl, news_rows) -> None:
    rows = news_rows(articles=50)
    directory = write_jsonl(rows)
    chosen = {sample.answer for sample in load(directory, max_rows_per_lang=5, eval_fraction=0.0).train}
    program = (
        "import sys; from params.munichus import MUNIChusLoadConfig as C; from inft.data.batches import load_samples;"
        "l = load_samples(C(data=sys.argv[1], languages=('en', 'ur'), max_rows_per_lang=5, eval_fraction=0.0),"
        "quarantine_file=None, with_images=True); print(l.fingerprint, sorted(s.answer for s in l.train))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, str(directory)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert str(sorted(chosen)) in printed.pop()
    write_jsonl(rows[::-1])
    assert {sample.answer for sample in load(directory, max_rows_per_lang=5, eval_fraction=0.0).train} == chosen
    assert {s.answer for s in load(directory, max_rows_per_lang=5, eval_fraction=0.0, seed=1).train} != chosen


def test_the_fingerprint_changes_with_the_rows_and_with_a_picture(write_jsonl, news_rows, picture) -> None:
    directory = write_jsonl(news_rows())
    prints = [load(directory).fingerprint, load(directory).fingerprint]
    (directory / "images" / "3.png").write_bytes(picture(99))
    prints.append(load(directory).fingerprint)
    write_jsonl([{**row, "caption": row["caption"] + "!"} for row in news_rows()])
    prints.append(load(directory).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_empty_captions_are_dropped_and_counted(write_jsonl, news_rows) -> None:
    rows = news_rows()
    for number, caption in enumerate(["", "  \n", None, "\x00", "\u200b", "\ufeff \u202e"]):
        rows[number]["caption"] = caption
    loaded = load(write_jsonl(rows), eval_fraction=0.0)
    assert (loaded.dropped_empty, loaded.quarantined, len(loaded.train)) == (6, 0, 34)


def test_empty_captions_are_bad_rows_when_they_are_not_to_be_removed(write_jsonl, news_rows) -> None:
    rows = news_rows()
    rows[0]["caption"] = ""
    with pytest.raises(UserError, match=r"1 bad rows.*\n  train.jsonl line 1: its caption is empty"):
        load(write_jsonl(rows), remove_empty=False)


def test_braces_and_control_characters_in_a_row_do_no_harm(write_jsonl, news_rows) -> None:
    rows = news_rows(articles=3)
    rows[0] |= {"content": "{language} \x00\x1b {0} }{", "title": "{title}\x07", "caption": "a {caption}\x00\nhere"}
    sample = load(write_jsonl(rows), eval_fraction=0.0).train[0]
    assert sample.prompt.news == "{language} {0} }{"
    assert sample.answer == "a {caption} here"
    assert sample.meta["title"] == "{title}"


def bad_directory(write_jsonl, news_rows) -> Path:  # type: ignore[no-untyped-def]
    rows = news_rows(("en",), articles=20)
    rows[3]["image"] = "../outside.png"
    rows[4]["image"] = "images/broken.png"
    rows[5]["caption"] = 7
    rows[6]["language"] = "ur"
    rows[6]["caption"] = 7
    directory = write_jsonl(rows)
    (directory / "images" / "broken.png").write_bytes(b"no image")
    return directory


def test_bad_rows_are_written_with_their_reasons(write_jsonl, news_rows, tmp_path: Path) -> None:
    file = tmp_path / "out" / "quarantine.jsonl"
    directory = bad_directory(write_jsonl, news_rows)
    loaded = load(directory, quarantine_file=file, languages=("en",), max_bad_fraction=0.2)
    assert not file.parent.exists()  # a run that is refused later must leave no trace
    write_quarantine(file, loaded.bad)
    records = {record["where"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert set(records) == {"train.jsonl line 4", "train.jsonl line 5", "train.jsonl line 6"}
    assert "lies outside" in records["train.jsonl line 4"]["reason"]
    assert "not an image" in records["train.jsonl line 5"]["reason"]
    assert records["train.jsonl line 6"] == {
        "where": "train.jsonl line 6",
        "reason": "its caption is int '7', not text",
        "language": "en",
        "title": "Article 5",
    }
    assert (loaded.quarantined, len(loaded.bad)) == (3, 3)
    assert "train.jsonl line 4: image '../outside.png' lies outside" in loaded.quarantine_reasons
    assert len(loaded.train) + len(loaded.heldout) == 16
    assert os.listdir(file.parent) == ["quarantine.jsonl"]


def test_too_many_bad_rows_stop_the_run_and_leave_the_list(write_jsonl, news_rows, tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    directory = bad_directory(write_jsonl, news_rows)
    message = r"(?s)3 bad rows, about 15\.8% of 19.*line 6: its caption.*quarantine\.jsonl.*--max-bad-fraction"
    with pytest.raises(UserError, match=message):
        load(directory, quarantine_file=file, languages=("en",))
    assert len(file.read_text().splitlines()) == 3


def test_the_allowed_share_of_bad_rows_is_allowed(write_jsonl, news_rows) -> None:
    rows = news_rows(("en",), articles=100)
    rows[0]["image"] = None
    assert load(write_jsonl(rows), languages=("en",)).quarantined == 1
    rows[1]["image"] = None
    with pytest.raises(UserError, match="2 bad rows"):
        load(write_jsonl(rows), languages=("en",))


def test_loading_leaves_the_list_of_an_earlier_run_alone(write_jsonl, news_rows, tmp_path: Path) -> None:
    file = tmp_path / "out" / "quarantine.jsonl"
    write_quarantine(file, [BadRow(where="old", reason="old")])
    before = file.read_bytes()
    load(write_jsonl(news_rows()), quarantine_file=file)
    load(bad_directory(write_jsonl, news_rows), quarantine_file=file, languages=("en",), max_bad_fraction=0.2)
    assert file.read_bytes() == before


def test_a_list_without_rows_removes_that_of_an_earlier_run(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    write_quarantine(file, [BadRow(where="\ud800", reason="old", title="\ud800")])  # what UTF-8 cannot encode
    write_quarantine(file, [BadRow(where="new", reason="new")])
    assert json.loads(file.read_text())["where"] == "new"
    write_quarantine(file, [])
    assert not file.exists()
    write_quarantine(file, [])


@pytest.mark.parametrize("content", [b'{"mine": 1}\n', b"notes\n", b"\xff\xfe", b'["where", "reason"]', b"\n{}"])
def test_a_file_of_someone_else_is_never_replaced(write_jsonl, news_rows, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "quarantine.jsonl"
    file.write_bytes(content)
    load(write_jsonl(news_rows()), quarantine_file=file)  # without a bad row it is not in the way
    write_quarantine(file, [])
    for share in (0.01, 0.2):  # refused before the model is loaded, whether the bad rows are too many or not
        with pytest.raises(UserError, match=r"quarantine\.jsonl.*not written by inft.*move it"):
            load(bad_directory(write_jsonl, news_rows), quarantine_file=file, languages=("en",), max_bad_fraction=share)
    with pytest.raises(UserError, match="not written by inft"):
        write_quarantine(file, [BadRow(where="a", reason="b")])
    assert file.read_bytes() == content


def test_a_quarantine_that_cannot_be_written_is_a_clear_error(write_jsonl, news_rows, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    directory = bad_directory(write_jsonl, news_rows)
    for file in (tmp_path / "file" / "q.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            load(directory, quarantine_file=file, languages=("en",))


def test_a_cap_does_not_make_the_share_of_bad_rows_seem_larger(write_jsonl, news_rows) -> None:
    rows = news_rows(("en",), articles=300)
    for number in range(2):
        rows[number]["caption"] = 5
    loaded = load(write_jsonl(rows), languages=("en",), max_rows_per_lang=10)
    assert loaded.quarantined == 2


def test_text_models_neither_read_nor_need_images(write_jsonl, news_rows) -> None:
    rows = news_rows()
    rows[0]["image"] = "images/missing.png"
    rows[1]["image"] = None
    loaded = load(write_jsonl(rows), with_images=False)
    assert loaded.quarantined == 0
    assert all(sample.image is None for sample in loaded.train + loaded.heldout)
    text_only = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    assert len(load(write_jsonl(text_only), with_images=False, eval_fraction=0.0).train) == 40


def test_rows_without_an_image_column_name_the_remedy(write_jsonl, news_rows) -> None:
    rows = [{**{k: v for k, v in row.items() if k != "image"}, "photo": 1} for row in news_rows()]
    with pytest.raises(UserError, match=r"among title, content, .*photo.*--set data\.columns\.image=NAME"):
        load(write_jsonl(rows))


def test_a_language_without_rows_is_named_with_those_of_the_data(write_jsonl, news_rows) -> None:
    with pytest.raises(UserError, match=r"no rows in language 'si': .* has en, ur\."):
        load(write_jsonl(news_rows()), languages=("en", "si"))


def test_rows_in_other_languages_are_counted(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows(("en", "si", "en-US"), articles=9))
    write_jsonl(news_rows(("en", "si"), articles=2, first=100), name="validation.jsonl")
    loaded = load(directory, languages=("en",))
    assert loaded.other_languages == {"si": 11, "en-US": 9}
    assert loaded.rows_per_language == {"en": (9, 2)}


def test_case_and_space_do_not_make_another_language(write_jsonl, news_rows) -> None:
    names = {"en": "English", "pt-BR": "Portuguese"}
    directory = write_jsonl(news_rows(("EN", " en\t", "pt-br"), articles=4))
    loaded = load(directory, languages=("en", "pt-BR"), language_names=names, eval_fraction=0.0)
    assert loaded.rows_per_language == {"en": (8, 0), "pt-BR": (4, 0)}
    assert loaded.train[0].prompt.instruction == "Write a caption for this image in English."
    rows = [{key: value for key, value in row.items() if key != "language"} for row in news_rows()]
    assert load(write_jsonl(rows), languages=("en",), default_language="EN").rows_per_language["en"]


@pytest.mark.parametrize("variant", ["en-US", "en_GB"])
def test_a_region_of_a_requested_language_is_suggested(write_jsonl, news_rows, variant: str) -> None:
    with pytest.raises(UserError, match=f"no rows in language 'en': .* has {variant}.*Did you mean '{variant}'"):
        load(write_jsonl(news_rows((variant,))), languages=("en",))


@pytest.mark.parametrize(("asked", "meant"), [("Urdu", "ur"), ("en-us", "en"), ("en_GB", "en"), ("UR", "ur")])
def test_an_unknown_language_gets_a_suggestion(write_jsonl, news_rows, asked: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"{asked}.*Did you mean '{meant}'"):
        load(write_jsonl(news_rows()), languages=(asked,))


def test_the_default_languages_may_be_a_part_of_the_data(write_jsonl, news_rows) -> None:
    directory = write_jsonl(news_rows())
    loaded = load_samples(MUNIChusLoadConfig(data=str(directory)), quarantine_file=None, with_images=True)
    assert list(loaded.rows_per_language) == ["en", "ur"]


def test_a_language_whose_rows_are_all_empty_is_named(write_jsonl, news_rows) -> None:
    rows = [{**row, "caption": "" if row["language"] == "ur" else "c"} for row in news_rows()]
    with pytest.raises(UserError, match=r"language 'ur' is left to train on: of 20 .* 20 are without a caption"):
        load(write_jsonl(rows))


def test_no_rows_left_says_which_filter_removed_them(write_jsonl, news_rows) -> None:
    rows = [{**row, "caption": ""} for row in news_rows()]
    with pytest.raises(UserError, match=r"no rows left of .*: 40 read, 40 without a caption, 0 bad"):
        load(write_jsonl(rows))


def test_only_bad_rows_left_gives_their_reasons(write_jsonl, news_rows) -> None:
    rows = [{**row, "image": "https://x.org/a.png"} for row in news_rows()]
    with pytest.raises(UserError, match=r"(?s)0 without a caption, 40 bad\..*line 1: .*is a URL"):
        load(write_jsonl(rows), max_bad_fraction=1.0)


def test_an_empty_file_is_a_clear_error(write_jsonl) -> None:
    with pytest.raises(UserError, match=r"no rows left of .*: 0 read"):
        load(write_jsonl([]))


def test_progress_counts_the_images(write_jsonl, news_rows) -> None:
    heard: list[int] = []
    config = config_of(write_jsonl(news_rows(articles=300)))
    load_samples(config, quarantine_file=None, with_images=True, on_progress=heard.append)
    assert heard == [256, 300]


@pytest.mark.parametrize(("folder", "languages"), [("emoji10", ("en", "si", "ur")), ("coco_ccby", ("en",))])
def test_the_shared_data_sets_load(folder: str, languages: tuple[str, ...]) -> None:
    directory = ROOT / "../shared/data" / folder
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    config = MUNIChusLoadConfig(data=str(directory), max_rows_per_lang=40)
    loaded = load_samples(config, quarantine_file=None, with_images=True)
    assert set(languages) <= set(loaded.rows_per_language)
    assert loaded.heldout
    assert loaded.quarantined == 0
