import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.data.sample import scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.rewards.functions import chrf, exact, language, length, valid_json
from params.errors import UserError

ATTRIBUTES = [scene.attributes for scene in scenes("train", rounds=1)][:6]
TEXT = st.text(max_size=20)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_rewards_lie_between_0_and_1_and_do_not_depend_on_the_batch(rows):
    completions, references = [row[0] for row in rows], [row[1] for row in rows]
    codes = ["en"] * len(rows)
    for function in (chrf, exact, length, language, valid_json):
        together = function(completions, references=references, languages=codes)
        alone = [function([c], references=[r], languages=["en"])[0] for c, r in rows]
        assert together == alone
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in together)


@pytest.mark.parametrize("code", sorted(GRAMMARS))
def test_the_reference_itself_is_worth_most_and_a_near_miss_nearly_as_much(code):
    texts = [caption(attributes, code) for attributes in ATTRIBUTES]
    for function in (chrf, exact, length, language):
        assert function(texts, references=texts, languages=[code] * len(texts)) == [1.0] * len(texts)
    other = chrf(texts[1:], references=texts[:-1])
    assert all(0 < value < 1 for value in other)


def test_chrf_is_sacrebleu_s():
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = [("a red fish", "a red fish on the left"), ("", "a"), ("නිල් තරුවක්", "නිල් හදවතක්")]
    for completion, reference in pairs:
        (found,) = chrf([completion], references=[reference])
        assert found == sacrebleu.sentence_chrf(completion, [reference]).score / 100


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [("abcd", "ab", 0.5), ("ab", "abcd", 0.5), (" ab\n", "ab", 1.0), ("", "", 1.0), ("", "a", 0.0)],
)
def test_length_is_the_ratio_of_the_shorter_to_the_longer(completion, reference, value):
    assert length([completion], references=[reference]) == [value]


def test_the_language_is_the_share_of_letters_in_its_script():
    texts = ["abc", "abක", "12 !", "", "ABC é"]
    assert language(texts, languages=["en"] * 5) == [1.0, 2 / 3, 0.0, 0.0, 1.0]
    assert language(["маленький", "small"], languages=["ru", "ru"], references=["рыба", "рыба"]) == [1.0, 0.0]
    with pytest.raises(UserError, match="script of the language 'ru' is not known"):
        language(["рыба"], languages=["ru"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, null]}', 1.0),
        (' "text" \n', 1.0),
        ("3", 1.0),
        ("", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1', 0.0),
        ('{"a": 1} then', 0.0),
        ("NaN", 0.0),
        ("[-Infinity]", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_only_a_whole_json_text_is_valid(text, value):
    assert valid_json([text]) == [value]


@given(
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), TEXT), lambda inner: st.lists(inner, max_size=3))
)
def test_what_json_writes_is_valid(value):
    assert valid_json([json.dumps(value)]) == [1.0]


def test_naming_rewards_imports_no_heavy_library():
    program = (
        "import sys\nfrom inft.rewards.load import load_rewards\nimport inft.rewards.score\n"
        "load_rewards(['chrf', 'exact', 'length', 'language', 'json'])\n"
        "print([name for name in ('torch', 'sacrebleu', 'transformers', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
