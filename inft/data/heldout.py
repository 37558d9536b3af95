"""Which rows are held out: whole articles, chosen by a hash so that new rows move no old ones."""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def unit_hash(seed: int, *parts: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the parts alone, in every process."""
    digest = hashlib.sha256("\x1f".join((str(seed), *parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def article_key(title: str) -> str:
    """Return the title as it is compared: composed (NFC), without case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", title).casefold().split())


def article_groups(keys: Sequence[tuple[str, str]]) -> list[int]:
    """Return the group number of each row's (title, image key): rows that share either are in one group.

    An empty key links nothing; a row with neither is a group of its own.
    """
    parents = list(range(len(keys)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    first: dict[Hashable, int] = {}
    for row, (title, image) in enumerate(keys):
        for key in (("title", article_key(title)), ("image", image)):
            if key[1]:
                parents[root(row)] = root(first.setdefault(key, row))
    return [root(row) for row in range(len(keys))]


def hold_out(keys: Sequence[tuple[str, str]], *, fraction: float, seed: int) -> list[bool]:
    """Return for each row's (title, image key) whether it is held out.

    A group is held out when the hash of its first title (of its image where it has no title) falls below ``fraction``:
    rows of other articles do not matter. Exceptions: a group of more rows than the whole share trains; when the share
    catches no group, the one with the smallest hash is held out; one group always trains.
    """
    groups = article_groups(keys)
    sizes = Counter(groups)
    if fraction <= 0 or len(sizes) < 2:
        return [False] * len(keys)
    names: defaultdict[int, set[tuple[str, str]]] = defaultdict(set)
    for row, (group, (title, image)) in enumerate(zip(groups, keys, strict=True)):
        title = article_key(title)
        names[group].add(("a", title) if title else ("b", image or f"row {row}"))  # titles sort before images
    luck = {group: unit_hash(seed, "held out", min(of_group)[1]) for group, of_group in names.items()}
    room = fraction * len(keys)
    chosen = {group for group in sizes if luck[group] < fraction and sizes[group] <= room}
    if not chosen:
        largest = max(sizes, key=lambda group: (sizes[group], luck[group]))
        chosen = {min((group for group in sizes if group != largest), key=luck.__getitem__)}
    if len(chosen) == len(sizes):
        chosen.discard(max(chosen, key=luck.__getitem__))
    return [group in chosen for group in groups]


def spread(languages: Sequence[str], ranks: Sequence[float], limit: int | None) -> list[int]:
    """Return the indices, ascending, of at most ``limit`` rows: as even over languages as they allow, lowest ranks."""
    if limit is None or len(languages) <= limit:
        return list(range(len(languages)))
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(languages)), key=lambda index: (ranks[index], index)):
        rows[languages[index]].append(index)
    # Round after round each language gives its next row, until the limit is met.
    turns = sorted((turn, language) for language, indices in rows.items() for turn in range(len(indices)))
    return sorted(rows[language][turn] for turn, language in turns[:limit])
