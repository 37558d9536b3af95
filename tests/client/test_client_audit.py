import hashlib
import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inft.client import audit

ENTRIES = 6


def filled(*tenants: str) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(audit.SCHEMA)
    for number in range(ENTRIES):
        for tenant in tenants:
            audit.append(
                db,
                tenant=tenant,
                action="optim_step",
                target=f"tc-{number}",
                outcome="accepted",
                details={"payload": f"{number:064x}", "ü": [1.5, None]},
                at=f"2026-01-01T00:00:0{number}Z",
                request_id=None if number % 2 else f"r{number}",
            )
    return db


def only(db: sqlite3.Connection, tenant: str = "a") -> audit.ChainReport:
    [report] = audit.verify(db, tenant=tenant)
    return report


def test_a_log_that_nobody_touched_is_whole():
    with closing(filled("a", "b")) as db:
        reports = audit.verify(db)
        assert [(report.tenant, report.entries, report.whole) for report in reports] == [
            ("a", ENTRIES, True),
            ("b", ENTRIES, True),
        ]
        assert reports[0].head != reports[1].head


@given(
    number=st.integers(1, ENTRIES),
    change=st.sampled_from(
        [
            ("tenant", "c"),
            ("at", "2027"),
            ("action", "sample"),
            ("target", "x"),
            ("outcome", "refused"),
            ("details", "{}"),
            ("details", '{"a": 1}'),
            ("details", "no JSON"),
            ("details", b"\xff"),
            ("request_id", "other"),
            ("previous", "f" * 64),
            ("hash", "f" * 64),
        ]
    ),
)
def test_any_changed_field_of_any_entry_is_found_and_named(number, change):
    with closing(filled("a")) as db:
        column, value = change
        db.execute(f"UPDATE audit SET {column} = ? WHERE number = ?", (value, number))
        reports = audit.verify(db)
        problems = " ".join(problem for report in reports for problem in report.problems)
        assert f"entry {number} " in problems


@pytest.mark.parametrize("number", range(1, ENTRIES))
def test_a_removed_entry_is_found_and_named(number):
    with closing(filled("a")) as db:
        db.execute("DELETE FROM audit WHERE number = ?", (number,))
        assert f"entry {number} is missing" in only(db).problems[0]


def test_several_removed_entries_are_named_together():
    with closing(filled("a")) as db:
        db.execute("DELETE FROM audit WHERE number IN (2, 3, 4)")
        assert only(db).problems[0].startswith("entries 2 to 4 are missing before entry 5 (")


def test_swapped_entries_are_found():
    with closing(filled("a")) as db:
        for old, new in [(2, -1), (4, 2), (-1, 4)]:
            db.execute("UPDATE audit SET number = ? WHERE number = ?", (new, old))
        assert [problem.split(" (")[0] for problem in only(db).problems[:2]] == ["entry 2", "entry 3"]


def test_an_entry_with_a_right_hash_of_its_own_does_not_fit_into_the_chain():
    with closing(filled("a")) as db:
        entry = audit.entries(db, "a", after=2, limit=1)[0]
        entry["target"], previous = "tc-forged", entry.pop("previous")
        del entry["hash"]
        found = audit.entry_hash(previous, entry)
        db.execute("UPDATE audit SET target = 'tc-forged', hash = ? WHERE number = 3", (found,))
        assert "entry 4" in only(db).problems[0]
        assert "does not follow entry 3" in only(db).problems[0]


def test_an_inserted_entry_is_found():
    with closing(filled("a")) as db:
        db.execute("UPDATE audit SET number = number + 100 WHERE number > 3")
        db.execute("UPDATE audit SET number = number - 99 WHERE number > 100")
        db.execute("INSERT INTO audit SELECT 'a', 4, at, action, target, outcome, details, request_id, previous, hash "
                   "FROM audit WHERE number = 3")  # fmt: skip
        assert "entry 4" in only(db).problems[0]


def test_an_end_that_was_cut_off_is_found_by_a_head_noted_before():
    with closing(filled("a", "b")) as db:
        early = audit.entries(db, "a")[2]["hash"]
        head = only(db).head
        assert audit.holds(db, early)
        assert audit.holds(db, head.upper(), tenant="a")
        assert not audit.holds(db, head, tenant="b")
        db.execute("DELETE FROM audit WHERE tenant = 'a' AND number > 4")
        assert only(db).whole
        assert audit.holds(db, early)
        assert not audit.holds(db, head)


def test_the_chain_can_be_checked_from_the_entries_alone():
    with closing(filled("a")) as db:
        previous = "0" * 64
        for entry in audit.entries(db, "a"):
            plain = {name: value for name, value in entry.items() if name not in ("previous", "hash")}
            text = previous + json.dumps(plain, sort_keys=True, separators=(",", ":"))
            previous = hashlib.sha256(text.encode()).hexdigest()
            assert entry["hash"] == previous
        assert previous == only(db).head


def test_entries_are_paged_by_number_and_per_tenant():
    with closing(filled("a", "b")) as db:
        page = audit.entries(db, "b", after=2, limit=3)
        assert [(entry["tenant"], entry["number"]) for entry in page] == [("b", 3), ("b", 4), ("b", 5)]
        assert page[0]["details"] == {"payload": f"{2:064x}", "ü": [1.5, None]}
        assert audit.entries(db, "nobody") == []


def test_an_entry_belongs_to_the_transaction_of_its_caller():
    with closing(filled("a")) as db:
        head = only(db).head
        db.execute("BEGIN")
        audit.append(db, tenant="a", action="x", target="", outcome="accepted", at="2026")
        db.execute("ROLLBACK")
        assert only(db).head == head


def test_a_detail_that_json_has_no_word_for_is_refused():
    with closing(filled("a")) as db:
        with pytest.raises(ValueError, match="JSON"):
            audit.append(db, tenant="a", action="x", target="", outcome="y", details={"e": float("nan")}, at="2026")
        assert only(db).entries == ENTRIES


def test_a_check_leaves_the_connection_reading_texts_as_before():
    with closing(filled("a")) as db:
        db.execute("UPDATE audit SET action = CAST(x'ff' AS TEXT) WHERE number = 2")
        assert not only(db).whole
        assert audit.tenants(db) == ["a"]
        with pytest.raises(sqlite3.OperationalError, match="UTF-8"):
            audit.entries(db, "a")
