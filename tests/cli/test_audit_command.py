import sqlite3
from contextlib import closing

import pytest

from inft.client import audit


@pytest.fixture
def state(tmp_path):
    """A state directory whose log, in WAL mode as the service has it, holds two tenants."""
    with closing(sqlite3.connect(tmp_path / "client.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(audit.SCHEMA)
        for tenant in ("ada", "bob", "ada", "ada"):
            audit.append(db, tenant=tenant, action="create_client", target="tc-1", outcome="accepted", at="2026")
    return tmp_path


def changed(state, sql):
    with closing(sqlite3.connect(state / "client.sqlite", isolation_level=None)) as db:
        db.execute(sql)


def test_a_whole_log_ends_with_0_and_prints_each_head(inft, state):
    found = inft("audit", "verify", str(state))
    assert found.status == 0
    ada, bob = found.out.splitlines()
    assert ada.startswith("'ada': whole, 3 entries, head ")
    assert bob.startswith("'bob': whole, 1 entries, head ")


def test_a_changed_log_ends_with_1_and_names_the_entry(inft, state):
    changed(state, "UPDATE audit SET outcome = 'refused' WHERE tenant = 'ada' AND number = 2")
    found = inft("audit", "verify", str(state))
    assert found.status == 1
    assert "'ada': NOT WHOLE" in found.out
    assert "entry 2 ('create_client' of '2026') was changed" in found.out
    assert inft("audit", "verify", str(state), "--tenant", "bob").status == 0


def test_a_cut_end_is_found_with_the_head_noted_before(inft, state):
    head = inft("audit", "verify", str(state), "--tenant", "ada").out.split()[-1]
    assert inft("audit", "verify", str(state), "--head", head).status == 0
    changed(state, "DELETE FROM audit WHERE tenant = 'ada' AND number = 3")
    assert inft("audit", "verify", str(state)).status == 0
    found = inft("audit", "verify", str(state), "--head", head)
    assert found.status == 1
    assert f"head {head} is not in the log" in found.out


def test_the_log_is_read_while_a_service_holds_it_and_is_not_written(inft, state):
    with closing(sqlite3.connect(state / "client.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        audit.append(db, tenant="ada", action="x", target="", outcome="accepted", at="2026")
        found = inft("audit", "verify", str(state))
        db.execute("COMMIT")
    assert found.status == 0
    assert "3 entries" in found.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--head", "abc"), "is not a hash"),
        (("nowhere",), "does not exist: give the directory that inft serve was given"),
    ],
)
def test_what_cannot_be_checked_is_a_users_mistake(inft, state, monkeypatch, args, words):
    monkeypatch.chdir(state)
    found = inft("audit", "verify", *args)
    assert found.status == 2
    assert words in found.err


def test_a_tenant_that_is_not_in_the_log_is_no_whole_chain(inft, state):
    found = inft("audit", "verify", str(state), "--tenant", "nobody")
    assert (found.status, found.out) == (2, "")
    assert "--tenant 'nobody': there is no such tenant in the log; it has 'ada', 'bob'" in found.err


def test_a_file_that_is_no_database_is_named(inft, tmp_path):
    (tmp_path / "client.sqlite").write_text("not a database, but long enough to have a header of one" * 50)
    found = inft("audit", "verify", str(tmp_path))
    assert found.status == 2
    assert "could not be read" in found.err


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("number", "'x'"),
        ("number", "3.5"),
        ("number", "-7"),
        ("number", "9223372036854775807"),
        ("tenant", "x'ff00'"),
        ("tenant", "CAST(x'ff' AS TEXT)"),
        ("action", "CAST(x'ff' AS TEXT)"),
        ("details", "CAST(x'7b22ff227d' AS TEXT)"),
        ("hash", "x'00'"),
        ("previous", "5"),
    ],
)
def test_whatever_stands_in_an_entry_the_log_is_not_whole_and_all_of_it_is_read(inft, state, column, value):
    changed(state, f"UPDATE audit SET {column} = {value} WHERE tenant = 'ada' AND number = 3")
    found = inft("audit", "verify", str(state))
    assert (found.status, found.err) == (1, "")
    assert "NOT WHOLE" in found.out
    assert "'bob': whole, 1 entries" in found.out


def test_a_text_of_an_entry_cannot_look_like_a_line_of_the_report(inft, state):
    forged = "char(27) || '[2K' || char(10) || '''eve'': whole, 24 entries, head ' || hex(zeroblob(500))"
    for column in ("action", "hash"):
        changed(state, f"UPDATE audit SET {column} = {forged} WHERE tenant = 'ada' AND number = 3")
    changed(state, f"UPDATE audit SET tenant = {forged} WHERE tenant = 'bob'")
    found = inft("audit", "verify", str(state))
    assert found.status == 1
    assert "\x1b" not in found.out
    assert not any(line.startswith("'eve'") for line in found.out.splitlines())
    assert max(map(len, found.out.splitlines())) < 300


def test_a_head_of_a_tenant_whose_chain_is_gone_is_not_found(inft, state):
    head = inft("audit", "verify", str(state), "--tenant", "bob").out.split()[-1]
    changed(state, "DELETE FROM audit WHERE tenant = 'bob'")
    found = inft("audit", "verify", str(state), "--tenant", "bob", "--head", head)
    assert found.status == 1
    assert found.out.startswith(f"head {head} is not in the log")
