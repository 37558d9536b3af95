"""Rows of an evaluation: all that have a reference, several references of one image together, the same keys again."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from inft.data.batches import held_out_entries, load_samples
from inft.evaluation.rows import load_rows
from inft.evaluation.shuffle import with_shuffled_images
from inft.training.methods.grpo import row_kind
from params import MUNIChusLoadConfig, UserError
from params.evaluation import HELDOUT
from params.resolve import resolve_train


@pytest.fixture
def captions(tmp_path):
    """test.jsonl with two images: one with two English captions and one Urdu one, one with an unreadable image."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    rows = [
        {"image": "a.png", "title": "one", "captions": ["a red field", "red"], "language": "en"},
        {"image": "a.png", "title": "one", "caption": "سرخ", "language": "ur"},
        {"image": "b.png", "title": "two", "caption": "nobody can see it", "language": "en"},
        {"image": "a.png", "title": "three", "caption": "", "language": "en"},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "{no json\n"
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def config(path, **changes):
    return MUNIChusLoadConfig(data=str(path), split="test", context="none", **changes)


def test_captions_of_one_image_are_references_of_one_row(captions):
    rows = load_rows(config(captions), limit=None, with_images=True)
    assert [row.references for row in rows.rows] == [("a red field", "red"), ("nobody can see it",), ("سرخ",)]
    assert rows.languages == ("en", "ur")


def test_rows_without_a_reference_and_lines_that_are_none_are_counted(captions):
    rows = load_rows(config(captions), limit=None, with_images=True)
    assert rows.without_reference == 1
    assert [(bad.where, bad.reason[:8]) for bad in rows.bad] == [("test.jsonl line 5", "not JSON")]


def test_keys_and_fingerprint_are_the_same_again_and_change_with_the_rows(captions):
    first, again = (load_rows(config(captions), limit=None, with_images=True) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert len({row.key for row in first.rows}) == len(first.rows)
    text = (captions / "test.jsonl").read_text(encoding="utf-8")
    (captions / "test.jsonl").write_text(text.replace("a red field", "a blue field"), encoding="utf-8")
    changed = load_rows(config(captions), limit=None, with_images=True)
    assert changed.fingerprint != first.fingerprint
    assert {row.key for row in changed.rows} & {row.key for row in first.rows} == {row.key for row in first.rows[1:]}


def test_text_rows_with_the_same_prompt_stay_apart(captions):
    rows = load_rows(config(captions), limit=None, with_images=False)
    assert [row.sample.image for row in rows.rows] == [None] * 3


def test_a_limit_is_spread_over_the_languages():
    sample = MUNIChusLoadConfig(data="sample", split="test", context="none")
    rows = load_rows(sample, limit=23, with_images=True)
    counts = [sum(row.sample.language == code for row in rows.rows) for code in sample.languages]
    assert sum(counts) == 23
    assert set(counts) == {2, 3}


def test_rows_of_a_language_stand_together_in_the_order_that_was_asked_for():
    sample = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("ur", "en"))
    languages = [row.sample.language for row in load_rows(sample, limit=None, with_images=True).rows]
    assert languages == sorted(languages, reverse=True)


def test_no_reference_at_all_is_an_error_that_names_the_column(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"image": "a.png", "caption": "", "language": "en"}\n')
    with pytest.raises(UserError, match=r"no row of split 'test' has a reference.*data\.columns\.caption"):
        load_rows(config(tmp_path), limit=None, with_images=True)


def test_a_language_that_the_data_lacks_is_an_error(captions):
    with pytest.raises(UserError, match="no rows in language 'si'"):
        load_rows(config(captions, languages=("en", "si")), limit=None, with_images=True)


def test_the_split_heldout_is_what_the_run_held_out(tmp_path):
    rows = [{"title": f"t{i}", "content": f"news {i}", "caption": f"caption {i}", "language": "en"} for i in range(60)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = MUNIChusLoadConfig(data=str(tmp_path), eval_fraction=0.2, seed=3)
    asked = MUNIChusLoadConfig(data=str(tmp_path), split="heldout")
    expected = {s.answer for s in load_samples(trained, quarantine_file=None, with_images=False).heldout}
    found = load_rows(asked, limit=None, with_images=False, trained=trained)
    assert {row.references[0] for row in found.rows} == expected
    assert 5 <= len(expected) <= 20


def test_a_held_out_row_whose_image_broke_since_is_still_there(tmp_path):
    rows = []
    for i in range(30):
        Image.new("RGB", (20, 20), (i * 8, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "title": f"t{i}", "caption": f"caption {i}", "language": "en"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = MUNIChusLoadConfig(data=str(tmp_path), eval_fraction=0.3, seed=3)
    asked = MUNIChusLoadConfig(data=str(tmp_path), split="heldout")
    before = load_rows(asked, limit=None, with_images=True, trained=trained)
    broken = before.rows[0].sample.image.path
    broken.write_bytes(b"")
    after = load_rows(asked, limit=None, with_images=True, trained=trained)
    assert after.fingerprint == before.fingerprint


def test_the_split_heldout_needs_a_run():
    with pytest.raises(UserError, match="--split heldout means the rows that an adapter's run held out"):
        load_rows(MUNIChusLoadConfig(data="sample", split="heldout"), limit=None, with_images=True)


def test_shuffling_keeps_references_and_changes_images():
    sample = MUNIChusLoadConfig(data="sample", split="test", context="none", languages=("en",))
    rows = load_rows(sample, limit=9, with_images=True).rows
    mixed = with_shuffled_images([row.sample for row in rows], seed=0)
    assert [a.answer for a in mixed] == [row.sample.answer for row in rows]
    assert all(a.image != row.sample.image for a, row in zip(mixed, rows, strict=True))


def test_rows_of_a_run_on_preferences_have_its_prompts_and_chosen_answers(tmp_path):
    rows = [
        {"prompt": f"What is in picture {n}?", "chosen": f"A star, {n}.", "rejected": "No.", "language": "en"}
        for n in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    trained = MUNIChusLoadConfig(data=str(tmp_path), languages=("en",), eval_fraction=0.5, context="none")
    held = replace(trained, split=HELDOUT)
    found = load_rows(held, limit=None, with_images=False, trained=trained, method="dpo").rows
    again = held_out_entries(trained, with_images=False, kind="preferences")[0]
    assert 0 < len(found) < 20
    assert {row.sample.answer for row in found} == {entry.sample.answer for entry in again}
    assert all(row.references == (row.sample.answer,) and row.sample.answer.startswith("A star") for row in found)
    assert all(row.sample.prompt.text.startswith("What is in picture") for row in found)


def prompted_rows(tmp_path):
    """A data set of prompts, most of them without a caption."""
    rows = [
        {"prompt": f"Question {n}", "caption": "" if n % 3 else f"answer {n}", "language": "en"} for n in range(120)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return MUNIChusLoadConfig(data=str(tmp_path), languages=("en",), eval_fraction=0.3, max_rows_per_lang=90)


@pytest.mark.parametrize("rewards", [("length",), ("chrf",), ("length", "exact")])
def test_no_row_that_a_run_with_rewards_trained_on_is_held_out(tmp_path, rewards):
    trained = replace(prompted_rows(tmp_path), remove_empty=True)
    run = resolve_train("text", method="grpo", overrides=[f"rl.rewards={','.join(rewards)}"])
    loaded = load_samples(trained, quarantine_file=None, with_images=False, kind=row_kind(run))
    held = replace(trained, split=HELDOUT)
    found = load_rows(held, limit=None, with_images=False, trained=trained, method="grpo", rewards=rewards)
    evaluated = {row.sample.prompt.text for row in found.rows}
    assert evaluated
    assert not evaluated & {sample.prompt.text for sample in loaded.train}
    answered = {sample.prompt.text for sample in loaded.heldout if sample.answer}
    assert evaluated == answered
    if row_kind(run) == "prompts":
        assert found.without_reference == len(loaded.heldout) - len(answered) > 0


def test_a_reward_that_is_gone_is_told_with_what_it_is_needed_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = prompted_rows(tmp_path)
    held = replace(trained, split=HELDOUT)
    with pytest.raises(UserError, match=r"no module no_such_rewards.*depends on its rewards.*--split"):
        load_rows(held, limit=None, with_images=False, trained=trained, method="ppo", rewards=("no_such_rewards:f",))
    trained = replace(trained, remove_empty=True)
    needed = ("no_such_rewards:f", "chrf")  # with chrf the answer is known
    assert load_rows(held, limit=None, with_images=False, trained=trained, method="ppo", rewards=needed).rows


@pytest.mark.parametrize("columns", [{}, {"chosen": "best", "rejected": "worst"}])
def test_a_test_file_of_captions_is_enough_after_a_run_on_preferences(tmp_path, columns):
    best, worst = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
    train = [{"prompt": f"q {n}", best: f"yes {n}", worst: f"no {n}", "language": "en"} for n in range(20)]
    test = [{"prompt": f"t {n}", "caption": f"caption {n}", "language": "en"} for n in range(5)]
    for name, rows in {"train": train, "test": test, "validation": train[:3]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    trained = MUNIChusLoadConfig(data=str(tmp_path), languages=("en",), columns=columns)

    def references(split: str) -> list[tuple[str, ...]]:
        asked = replace(trained, split=split)
        rows = load_rows(asked, limit=None, with_images=False, trained=trained, method="dpo").rows
        return [row.references for row in rows]

    assert references("test") == [(f"caption {n}",) for n in range(5)]
    assert references("validation") == references(HELDOUT) == [(f"yes {n}",) for n in range(3)]
