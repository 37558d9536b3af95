"""The sample source: drawn scenes captioned in ten languages, for the demo and for tests.

No row is stored: a scene is drawn from its split and index when its image is asked for. Held-out scenes show
combinations of attributes that no training scene shows, so a right caption of one cannot have been memorised.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from random import Random

from inft.data.languages import available_languages
from inft.data.rows import MissingSplit, Row, RowKind
from inft.data.scene_captions import GRAMMARS, caption
from inft.data.scenes import (
    COLOURS,
    COMBINATIONS,
    FIGURES,
    PLACES,
    SIZES,
    Attributes,
    DrawnImage,
    differing,
    near_misses,
)
from params.errors import UserError
from params.munichus import MUNIChusLoadConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One drawn scene: its name, what it shows and its picture."""

    name: str
    attributes: Attributes
    image: DrawnImage


# Rounds over the split's combinations: 288 to train on, 36 to validate on and 36 to test on.
ROUNDS: Mapping[str, int] = {"train": 4, "validation": 2, "test": 2}


def rows(config: MUNIChusLoadConfig, *, location: str, split: str, kind: RowKind = "captions") -> Iterator[Row]:
    """Yield a row for each scene of the split and each of the configured languages that the sample set has.

    As a preference, a scene's caption is chosen and one that is wrong in one attribute is rejected.

    Errors: MissingSplit for a split other than train, validation and test; UserError for a language that it lacks and
    for a location, which drawn scenes do not have.
    """
    if location:
        raise UserError(f"the sample data set is drawn by code and has no location {location!r}: use --data sample.")
    if split not in ROUNDS:
        raise MissingSplit(f"the sample data set has no split {split!r}. It has {', '.join(ROUNDS)}.")
    languages = available_languages(config, GRAMMARS, source="the sample data set")
    for scene in scenes(split, rounds=ROUNDS[split]):
        for language in languages:
            yield Row(
                image=scene.image,
                title=scene.name,
                content=keywords(scene.attributes),
                caption=caption(scene.attributes, language),
                language=language,
                where=f"sample {scene.name} in {language}",
                rejected=wrong_caption(scene, language, seed=config.seed) if kind == "preferences" else None,
                extra={"scene": asdict(scene.attributes)},
            )


def wrong_caption(scene: Scene, language: str, *, seed: int) -> str:
    """Return a caption with one wrong attribute: the same one for the same seed, scene and language.

    It is the right caption of other training scenes: no held-out sentence is trained on, and whether a sentence is
    right shows in the scene alone.
    """
    rng = Random(f"{seed} wrong caption of {scene.name} in {language}")
    wrong: defaultdict[str, list[Attributes]] = defaultdict(list)
    for other in near_misses(scene.attributes):
        if split_of(other) == "train":
            wrong[differing(scene.attributes, other)[0]].append(other)
    return caption(rng.choice(wrong[rng.choice(sorted(wrong))]), language)


def scenes(split: str, *, rounds: int, first_round: int = 0) -> Iterator[Scene]:
    """Yield the scenes of a split: every round shows each of its combinations once, in an order of its own."""
    for number in range(first_round, first_round + rounds):
        for attributes in Random(f"{split} order {number}").sample(combinations(split), k=len(combinations(split))):
            name = f"{split} scene {number}-{COMBINATIONS.index(attributes):03d}"
            yield Scene(name=name, attributes=attributes, image=DrawnImage(attributes=attributes, seed=name))


def combinations(split: str) -> list[Attributes]:
    """The attribute combinations that only this split shows.

    Each pair of figure and colour has ten combinations of size and place: one is validated on, one is tested on
    and eight are trained on.
    """
    return [attributes for attributes in COMBINATIONS if split_of(attributes) == split]


def split_of(attributes: Attributes) -> str:
    """The split that shows a combination."""
    # 5 * size + 2 * place takes each value modulo 10 exactly once, whatever figure and colour add to it.
    rank = (
        FIGURES.index(attributes.figure)
        + 3 * COLOURS.index(attributes.colour)
        + 5 * SIZES.index(attributes.size)
        + 2 * PLACES.index(attributes.place)
    ) % 10
    return {0: "validation", 5: "test"}.get(rank, "train")


def keywords(attributes: Attributes) -> str:
    """What the scene shows as English keywords: the news text of a model that takes no images."""
    return ", ".join((attributes.figure, attributes.colour, attributes.size, attributes.place))
