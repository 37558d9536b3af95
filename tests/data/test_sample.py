"""The sample source: drawn scenes, their captions in ten languages, and which split shows what."""

import random
import re
import unicodedata
from collections import Counter

import pytest

from inft.data.batches import MissingSplit
from inft.data.sample import ROUNDS, combinations, keywords, rows, scenes
from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import COLOURS, COMBINATIONS, FIGURES, IMAGE_SIZE, PLACES, SIZES, Attributes, draw
from params import MUNIChusLoadConfig, UserError
from params.munichus import LANGUAGE_NAMES

SCRIPTS = {
    "ar": "ARABIC",
    "en": "LATIN",
    "fr": "LATIN",
    "hi": "DEVANAGARI",
    "id": "LATIN",
    "ja": "CJK|HIRAGANA|KATAKANA",
    "si": "SINHALA",
    "ur": "ARABIC",
    "yue": "CJK",
    "zh": "CJK",
}


def attributes(words: str) -> Attributes:
    size, colour, figure, place = words.split()
    return Attributes(figure=figure, colour=colour, size=size, place=place)


def test_every_combination_has_its_own_caption_in_every_language():
    assert set(GRAMMARS) == set(LANGUAGE_NAMES)
    for language in GRAMMARS:
        captions = {caption(combination, language) for combination in COMBINATIONS}
        assert len(captions) == len(COMBINATIONS) == 360


@pytest.mark.parametrize("language", sorted(GRAMMARS))
def test_captions_are_clean_text_in_the_language_s_own_script(language):
    for combination in COMBINATIONS:
        text = caption(combination, language)
        assert text == unicodedata.normalize("NFC", text).strip()
        assert "  " not in text
        assert text[-1] in ".।۔。"
        letters = [unicodedata.name(c) for c in text if c.isalpha()]
        assert all(re.match(SCRIPTS[language], name) for name in letters), text


# Written by hand, not by the tables: agreement, counters and word order where languages differ.
GOLDEN = {
    "small red circle left": {
        "ar": "دائرة حمراء صغيرة على اليسار.",
        "en": "A small red circle on the left.",
        "fr": "Un petit cercle rouge à gauche.",
        "hi": "बाईं ओर एक छोटा लाल वृत्त है।",
        "id": "Sebuah lingkaran merah kecil di sebelah kiri.",
        "ja": "左に小さな赤い円が一つあります。",
        "si": "වම් පැත්තේ කුඩා රතු පාට රවුමක් තිබේ.",
        "ur": "بائیں طرف ایک چھوٹا سرخ دائرہ ہے۔",
        "yue": "左邊有一個紅色嘅細圓形。",
        "zh": "左边有一个红色的小圆形。",
    },
    "large green fish top": {  # feminine in ar, hi and ur; an animal in id, ja and si; a long thing in zh and yue
        "ar": "سمكة خضراء كبيرة في الأعلى.",
        "en": "A large green fish at the top.",
        "fr": "Un grand poisson vert en haut.",
        "hi": "ऊपर एक बड़ी हरी मछली है।",
        "id": "Seekor ikan hijau besar di bagian atas.",
        "ja": "上に大きな緑の魚が一匹います。",
        "si": "ඉහළින් විශාල කොළ පාට මාළුවෙක් සිටී.",
        "ur": "اوپر ایک بڑی سبز مچھلی ہے۔",
        "yue": "上面有一條綠色嘅大魚。",
        "zh": "上面有一条绿色的大鱼。",
    },
    "small purple star bottom": {  # feminine in ar and fr
        "ar": "نجمة بنفسجية صغيرة في الأسفل.",
        "en": "A small purple star at the bottom.",
        "fr": "Une petite étoile violette en bas.",
        "hi": "नीचे एक छोटा बैंगनी तारा है।",
        "id": "Sebuah bintang ungu kecil di bagian bawah.",
        "ja": "下に小さな紫の星が一つあります。",
        "si": "පහළින් කුඩා දම් පාට තරුවක් තිබේ.",
        "ur": "نیچے ایک چھوٹا جامنی ستارہ ہے۔",
        "yue": "下面有一粒紫色嘅細星星。",
        "zh": "下面有一颗紫色的小星星。",
    },
    "large blue tree right": {  # feminine in ar; its own counter in id, ja, yue and zh
        "ar": "شجرة زرقاء كبيرة على اليمين.",
        "en": "A large blue tree on the right.",
        "fr": "Un grand arbre bleu à droite.",
        "hi": "दाईं ओर एक बड़ा नीला पेड़ है।",
        "id": "Sebatang pohon biru besar di sebelah kanan.",
        "ja": "右に大きな青い木が一本あります。",
        "si": "දකුණු පැත්තේ විශාල නිල් පාට ගසක් තිබේ.",
        "ur": "دائیں طرف ایک بڑا نیلا درخت ہے۔",
        "yue": "右邊有一棵藍色嘅大樹。",
        "zh": "右边有一棵蓝色的大树。",
    },
    "small yellow heart middle": {
        "ar": "قلب أصفر صغير في الوسط.",
        "en": "A small yellow heart in the middle.",
        "fr": "Un petit cœur jaune au milieu.",
        "hi": "बीच में एक छोटा पीला दिल है।",
        "id": "Sebuah hati kuning kecil di tengah.",
        "ja": "真ん中に小さな黄色いハートが一つあります。",
        "si": "මැද කුඩා කහ පාට හදවතක් තිබේ.",
        "ur": "درمیان میں ایک چھوٹا پیلا دل ہے۔",
        "yue": "中間有一個黃色嘅細心心。",
        "zh": "中间有一颗黄色的小爱心。",
    },
    "large black square left": {
        "ar": "مربع أسود كبير على اليسار.",
        "en": "A large black square on the left.",
        "fr": "Un grand carré noir à gauche.",
        "hi": "बाईं ओर एक बड़ा काला वर्ग है।",
        "id": "Sebuah persegi hitam besar di sebelah kiri.",
        "ja": "左に大きな黒い正方形が一つあります。",
        "si": "වම් පැත්තේ විශාල කළු පාට සමචතුරස්‍රයක් තිබේ.",
        "ur": "بائیں طرف ایک بڑا کالا مربع ہے۔",
        "yue": "左邊有一個黑色嘅大正方形。",
        "zh": "左边有一个黑色的大正方形。",
    },
}


@pytest.mark.parametrize("words", GOLDEN)
def test_captions_equal_those_written_by_hand(words):
    assert {language: caption(attributes(words), language) for language in GRAMMARS} == GOLDEN[words]


def test_splits_show_different_combinations_that_cover_all_of_them():
    shown = {split: combinations(split) for split in ROUNDS}
    assert {split: len(each) for split, each in shown.items()} == {"train": 288, "validation": 36, "test": 36}
    assert set(COMBINATIONS) == {combination for each in shown.values() for combination in each}


def test_every_attribute_value_is_held_out_as_often_as_any_other():
    for split in ("validation", "test"):
        for name, values in (("figure", FIGURES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            counts = Counter(getattr(combination, name) for combination in combinations(split))
            assert set(counts) == set(values)
            assert max(counts.values()) - min(counts.values()) <= 1


def test_scenes_have_names_and_pictures_of_their_own():
    every = [scene for split, rounds in ROUNDS.items() for scene in scenes(split, rounds=rounds)]
    assert len({scene.name for scene in every}) == len(every) == 4 * 288 + 2 * 36 + 2 * 36
    some = every[::40] + every[1:3]
    assert len({scene.image.load().tobytes() for scene in some}) == len(some)


def test_drawing_is_deterministic_and_varies_with_the_seed():
    scene = next(scenes("train", rounds=1))
    first, again = scene.image.load(), scene.image.load()
    assert first.mode == "RGB"
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert first.tobytes() == again.tobytes()
    assert draw(scene.attributes, random.Random(1)).tobytes() != draw(scene.attributes, random.Random(2)).tobytes()


@pytest.mark.parametrize("place", PLACES)
def test_the_figure_stands_where_the_caption_says(place):
    image = draw(attributes(f"large black circle {place}"), random.Random(3)).convert("L")
    left, top, right, bottom = image.point(lambda grey: 255 * (grey < 80)).getbbox()
    x, y = (left + right) / 2 / IMAGE_SIZE, (top + bottom) / 2 / IMAGE_SIZE
    expected = {
        "left": (0.27, 0.5),
        "right": (0.73, 0.5),
        "top": (0.5, 0.27),
        "bottom": (0.5, 0.73),
        "middle": (0.5, 0.5),
    }
    assert (x, y) == pytest.approx(expected[place], abs=0.05)


def test_rows_hold_each_scene_in_each_language_asked_for():
    found = list(rows(MUNIChusLoadConfig(languages=("si", "en")), location="", split="validation"))
    assert len(found) == 2 * 72
    assert {row.language for row in found} == {"si", "en"}
    assert all(row.caption == caption(Attributes(**row.extra["scene"]), row.language) for row in found)
    assert all(row.content == keywords(Attributes(**row.extra["scene"])) for row in found)
    titles = {split: {row.title for row in rows(MUNIChusLoadConfig(), location="", split=split)} for split in ROUNDS}
    assert not titles["train"] & titles["validation"]
    assert not titles["train"] & titles["test"]


def test_an_unknown_split_and_a_location_are_errors():
    with pytest.raises(MissingSplit, match="no split 'dev'"):
        list(rows(MUNIChusLoadConfig(), location="", split="dev"))
    with pytest.raises(UserError, match="--data sample"):
        list(rows(MUNIChusLoadConfig(), location="somewhere", split="train"))


def test_a_language_that_the_sample_set_lacks_is_named_with_those_it_has():
    with pytest.raises(UserError, match=r"no rows in language 'de': the sample data set has ar, en, fr.*--languages"):
        list(rows(MUNIChusLoadConfig(languages=("de",)), location="", split="train"))
    with pytest.raises(UserError, match=r"'Hindi'.*Did you mean 'hi'\?"):
        list(rows(MUNIChusLoadConfig(languages=("en", "Hindi")), location="", split="train"))
