"""How many documents were read, what became of them, and when too many of their rows cannot be read."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from params.errors import UserError

FEWEST_ROWS = 100  # that are judged before all are read
SHOWN = 5  # unreadable rows that are named


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many documents were read, and what became of those that are not trained on as they are."""

    documents: int = 0  # rows that were read
    split: int = 0  # longer than max_seq_length: became several pieces
    dropped: int = 0  # longer than max_seq_length: left out
    empty: int = 0  # without any token: left out
    bad: int = 0  # corrupt, or no text: left out

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + getattr(other, name) for name, value in self.asdict().items()})

    def asdict(self) -> dict[str, int]:
        """The five numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def words(self) -> str:
        """One line: "1,204 documents read: 60 split, 3 dropped, 1 empty, 2 unreadable"; zeros are left out."""
        numbers = {"split": self.split, "dropped": self.dropped, "empty": self.empty, "unreadable": self.bad}
        told = ", ".join(f"{number:,} {name}" for name, number in numbers.items() if number)
        return f"{self.documents:,} document{'' if self.documents == 1 else 's'} read{f': {told}' if told else ''}"


class Tally:
    """Counts as they grow, and the first of the rows that cannot be read."""

    def __init__(self, most: float, counts: Counts | None = None, bad_rows: Iterable[str] = ()) -> None:
        self.most = most  # share of the rows that may be unreadable
        self.counts = counts or Counts()
        self.bad_rows = tuple(bad_rows)  # where each is, and why

    def add(self, counts: Counts, bad_rows: Iterable[str]) -> None:
        """Count the rows of one block; its unreadable ones are looked up only while there is room to name them."""
        self.counts += counts
        if counts.bad and len(self.bad_rows) < SHOWN:
            self.bad_rows = tuple(dict.fromkeys((*self.bad_rows, *bad_rows)))[:SHOWN]

    def check(self, *, ended: bool = False) -> None:
        """Raise UserError when too many rows were unreadable; of fewer than 100, only when the data have ``ended``."""
        bad, read = self.counts.bad, self.counts.documents
        if bad <= self.most * read or (self.most and not ended and read < FEWEST_ROWS):
            return
        raise UserError(
            f"{self.bad_rows[0]}. It is the first: {bad:,} of {read:,} rows read so far are unreadable "
            f"({bad / read:.1%}), more than dataset.max_bad_fraction {self.most:g} allows. Mend them and start anew, "
            "or raise dataset.max_bad_fraction: unreadable rows are passed over, also when a run is resumed."
        )
