"""Captions of drawn scenes in ten languages, built from tables with the features each grammar asks for.

How each language is built (size, colour, noun and place words agree with the figure):

- ar  noun, colour, size; both adjectives take the noun's gender (colours of the pattern afʿal have feminine faʿlāʾ).
- en  size before colour before noun, always after "A".
- fr  size before the noun, colour after it; article and adjectives take the noun's gender.
- hi  place first, verb last; adjectives in -ā turn to -ī before a feminine noun; लाल and बैंगनी do not change.
- id  classifier (seekor for animals, sebatang for trees, else sebuah), noun, colour, size.
- ja  place with に; the counter is the noun's (つ, 匹, 本); います for animals, あります for things.
- si  place first, verb last; the noun is indefinite, -ක් for things and -ෙක් for animals, with තිබේ and සිටී.
- ur  as Hindi; سرخ, سبز and جامنی do not change.
- yue the noun's classifier (個, 粒, 條, 棵); 嘅 before size and noun; 細 is "small".
- zh  the noun's classifier (个, 颗, 条, 棵); 的 before size and noun.
"""

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from inft.data.scenes import Attributes

Forms = tuple[str, str]  # masculine, feminine


@dataclass(frozen=True, slots=True)
class Noun:
    """A figure's word with the features that other words agree with."""

    word: str
    feminine: bool = False
    counter: str = ""  # classifier or counter
    animate: bool = False


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words of one language; an adjective that does not inflect has two equal forms."""

    nouns: Mapping[str, Noun]
    colours: Mapping[str, Forms]
    sizes: Mapping[str, Forms]
    places: Mapping[str, str]


def _same(**words: str) -> dict[str, Forms]:
    return {name: (word, word) for name, word in words.items()}


_AR = Lexicon(
    nouns={
        "circle": Noun("دائرة", feminine=True),
        "square": Noun("مربع"),
        "star": Noun("نجمة", feminine=True),
        "heart": Noun("قلب"),
        "fish": Noun("سمكة", feminine=True),
        "tree": Noun("شجرة", feminine=True),
    },
    colours={
        "red": ("أحمر", "حمراء"),
        "green": ("أخضر", "خضراء"),
        "blue": ("أزرق", "زرقاء"),
        "yellow": ("أصفر", "صفراء"),
        "black": ("أسود", "سوداء"),
        "purple": ("بنفسجي", "بنفسجية"),
    },
    sizes={"small": ("صغير", "صغيرة"), "large": ("كبير", "كبيرة")},
    places={
        "left": "على اليسار",
        "right": "على اليمين",
        "top": "في الأعلى",
        "bottom": "في الأسفل",
        "middle": "في الوسط",
    },
)

_EN = Lexicon(
    nouns={name: Noun(name) for name in ("circle", "square", "star", "heart", "fish", "tree")},
    colours=_same(red="red", green="green", blue="blue", yellow="yellow", black="black", purple="purple"),
    sizes=_same(small="small", large="large"),
    places={
        "left": "on the left",
        "right": "on the right",
        "top": "at the top",
        "bottom": "at the bottom",
        "middle": "in the middle",
    },
)

_FR = Lexicon(
    nouns={
        "circle": Noun("cercle"),
        "square": Noun("carré"),
        "star": Noun("étoile", feminine=True),
        "heart": Noun("cœur"),
        "fish": Noun("poisson"),
        "tree": Noun("arbre"),
    },
    colours={
        "red": ("rouge", "rouge"),
        "green": ("vert", "verte"),
        "blue": ("bleu", "bleue"),
        "yellow": ("jaune", "jaune"),
        "black": ("noir", "noire"),
        "purple": ("violet", "violette"),
    },
    sizes={"small": ("petit", "petite"), "large": ("grand", "grande")},
    places={"left": "à gauche", "right": "à droite", "top": "en haut", "bottom": "en bas", "middle": "au milieu"},
)

_HI = Lexicon(
    nouns={
        "circle": Noun("वृत्त"),
        "square": Noun("वर्ग"),
        "star": Noun("तारा"),
        "heart": Noun("दिल"),
        "fish": Noun("मछली", feminine=True),
        "tree": Noun("पेड़"),
    },
    colours={
        "red": ("लाल", "लाल"),
        "green": ("हरा", "हरी"),
        "blue": ("नीला", "नीली"),
        "yellow": ("पीला", "पीली"),
        "black": ("काला", "काली"),
        "purple": ("बैंगनी", "बैंगनी"),
    },
    sizes={"small": ("छोटा", "छोटी"), "large": ("बड़ा", "बड़ी")},
    places={"left": "बाईं ओर", "right": "दाईं ओर", "top": "ऊपर", "bottom": "नीचे", "middle": "बीच में"},
)

_ID = Lexicon(
    nouns={
        "circle": Noun("lingkaran", counter="Sebuah"),
        "square": Noun("persegi", counter="Sebuah"),
        "star": Noun("bintang", counter="Sebuah"),
        "heart": Noun("hati", counter="Sebuah"),
        "fish": Noun("ikan", counter="Seekor"),
        "tree": Noun("pohon", counter="Sebatang"),
    },
    colours=_same(red="merah", green="hijau", blue="biru", yellow="kuning", black="hitam", purple="ungu"),
    sizes=_same(small="kecil", large="besar"),
    places={
        "left": "di sebelah kiri",
        "right": "di sebelah kanan",
        "top": "di bagian atas",
        "bottom": "di bagian bawah",
        "middle": "di tengah",
    },
)

_JA = Lexicon(
    nouns={
        "circle": Noun("円", counter="一つ"),
        "square": Noun("正方形", counter="一つ"),
        "star": Noun("星", counter="一つ"),
        "heart": Noun("ハート", counter="一つ"),
        "fish": Noun("魚", counter="一匹", animate=True),
        "tree": Noun("木", counter="一本"),
    },
    colours=_same(red="赤い", green="緑の", blue="青い", yellow="黄色い", black="黒い", purple="紫の"),
    sizes=_same(small="小さな", large="大きな"),
    places={"left": "左", "right": "右", "top": "上", "bottom": "下", "middle": "真ん中"},
)

_SI = Lexicon(
    nouns={
        "circle": Noun("රවුමක්"),
        "square": Noun("සමචතුරස්‍රයක්"),
        "star": Noun("තරුවක්"),
        "heart": Noun("හදවතක්"),
        "fish": Noun("මාළුවෙක්", animate=True),
        "tree": Noun("ගසක්"),
    },
    colours=_same(red="රතු", green="කොළ", blue="නිල්", yellow="කහ", black="කළු", purple="දම්"),
    sizes=_same(small="කුඩා", large="විශාල"),
    places={"left": "වම් පැත්තේ", "right": "දකුණු පැත්තේ", "top": "ඉහළින්", "bottom": "පහළින්", "middle": "මැද"},
)

_UR = Lexicon(
    nouns={
        "circle": Noun("دائرہ"),
        "square": Noun("مربع"),
        "star": Noun("ستارہ"),
        "heart": Noun("دل"),
        "fish": Noun("مچھلی", feminine=True),
        "tree": Noun("درخت"),
    },
    colours={
        "red": ("سرخ", "سرخ"),
        "green": ("سبز", "سبز"),
        "blue": ("نیلا", "نیلی"),
        "yellow": ("پیلا", "پیلی"),
        "black": ("کالا", "کالی"),
        "purple": ("جامنی", "جامنی"),
    },
    sizes={"small": ("چھوٹا", "چھوٹی"), "large": ("بڑا", "بڑی")},
    places={
        "left": "بائیں طرف",
        "right": "دائیں طرف",
        "top": "اوپر",
        "bottom": "نیچے",
        "middle": "درمیان میں",
    },
)

_YUE = Lexicon(
    nouns={
        "circle": Noun("圓形", counter="個"),
        "square": Noun("正方形", counter="個"),
        "star": Noun("星星", counter="粒"),
        "heart": Noun("心心", counter="個"),
        "fish": Noun("魚", counter="條"),
        "tree": Noun("樹", counter="棵"),
    },
    colours=_same(red="紅色", green="綠色", blue="藍色", yellow="黃色", black="黑色", purple="紫色"),
    sizes=_same(small="細", large="大"),
    places={"left": "左邊", "right": "右邊", "top": "上面", "bottom": "下面", "middle": "中間"},
)

_ZH = Lexicon(
    nouns={
        "circle": Noun("圆形", counter="个"),
        "square": Noun("正方形", counter="个"),
        "star": Noun("星星", counter="颗"),
        "heart": Noun("爱心", counter="颗"),
        "fish": Noun("鱼", counter="条"),
        "tree": Noun("树", counter="棵"),
    },
    colours=_same(red="红色", green="绿色", blue="蓝色", yellow="黄色", black="黑色", purple="紫色"),
    sizes=_same(small="小", large="大"),
    places={"left": "左边", "right": "右边", "top": "上面", "bottom": "下面", "middle": "中间"},
)

Pattern = Callable[[Noun, str, str, str], str]  # noun, colour, size (both agreeing), place -> sentence

GRAMMARS: Mapping[str, tuple[Lexicon, Pattern]] = {
    "ar": (_AR, lambda noun, colour, size, place: f"{noun.word} {colour} {size} {place}."),
    "en": (_EN, lambda noun, colour, size, place: f"A {size} {colour} {noun.word} {place}."),
    "fr": (
        _FR,
        lambda noun, colour, size, place: f"{'Une' if noun.feminine else 'Un'} {size} {noun.word} {colour} {place}.",
    ),
    "hi": (_HI, lambda noun, colour, size, place: f"{place} एक {size} {colour} {noun.word} है।"),
    "id": (_ID, lambda noun, colour, size, place: f"{noun.counter} {noun.word} {colour} {size} {place}."),
    "ja": (
        _JA,
        lambda noun, colour, size, place: (
            f"{place}に{size}{colour}{noun.word}が{noun.counter}{'います' if noun.animate else 'あります'}。"
        ),
    ),
    "si": (
        _SI,
        lambda noun, colour, size, place: f"{place} {size} {colour} පාට {noun.word} {'සිටී' if noun.animate else 'තිබේ'}.",
    ),
    "ur": (_UR, lambda noun, colour, size, place: f"{place} ایک {size} {colour} {noun.word} ہے۔"),
    "yue": (_YUE, lambda noun, colour, size, place: f"{place}有一{noun.counter}{colour}嘅{size}{noun.word}。"),
    "zh": (_ZH, lambda noun, colour, size, place: f"{place}有一{noun.counter}{colour}的{size}{noun.word}。"),
}


def caption(attributes: Attributes, language: str) -> str:
    """The sentence that describes a scene in a language of GRAMMARS, in Unicode's NFC form."""
    lexicon, pattern = GRAMMARS[language]
    noun = lexicon.nouns[attributes.figure]
    colour = lexicon.colours[attributes.colour][noun.feminine]
    size = lexicon.sizes[attributes.size][noun.feminine]
    return unicodedata.normalize("NFC", pattern(noun, colour, size, lexicon.places[attributes.place]))


def words(language: str) -> list[str]:
    """Every word form of a language's table, as the tokenizer of the embedded models is trained on them."""
    lexicon, _ = GRAMMARS[language]
    forms = [form for table in (lexicon.colours, lexicon.sizes) for pair in table.values() for form in pair]
    nouns = [word for noun in lexicon.nouns.values() for word in (noun.word, noun.counter) if word]
    return sorted({unicodedata.normalize("NFC", w) for w in [*forms, *nouns, *lexicon.places.values()]})
