"""The order in which operations run: each client's by number, clients in turn, cancelled numbers passed."""

from hypothesis import given
from hypothesis import strategies as st

from inft.client.schedule import OpenOperation, Schedule
from inft.client.store import OperationRow


def operation(client, seq, tenant="local"):
    row = OperationRow(
        id=f"{client}-{seq}",
        client_id=client,
        seq=seq,
        kind="sample",
        payload={},
        digest="",
        volatile=False,
        created_at="",
    )
    return OpenOperation(row=row, tenant=tenant)


def run_all(schedule):
    order = []
    while (taken := schedule.take()) is not None:
        order.append((taken.row.client_id, taken.row.seq))
        schedule.done(taken)
    return order


@given(st.permutations(range(1, 9)), st.sets(st.integers(1, 8)))
def test_numbers_run_in_order_whatever_the_order_of_arrival(arrival, cancelled):
    schedule = Schedule()
    for seq in arrival:
        schedule.add(operation("a", seq))
    for seq in cancelled:
        schedule.cancelled(schedule.get(f"a-{seq}"))
    assert run_all(schedule) == [("a", seq) for seq in range(1, 9) if seq not in cancelled]
    assert len(schedule) == 0
    assert schedule.pending("local") == 0


@given(st.permutations(range(1, 7)), st.data())
def test_runs_interleaved_with_arrivals_keep_the_order(arrival, data):
    schedule, order = Schedule(), []
    for seq in arrival:
        schedule.add(operation("a", seq))
        if data.draw(st.booleans()):
            order += run_all(schedule)
    assert order + run_all(schedule) == [("a", seq) for seq in range(1, 7)]


def test_a_number_whose_predecessor_is_missing_waits():
    schedule = Schedule()
    late = operation("a", 3)
    schedule.add(operation("a", 1))
    schedule.add(late)
    assert schedule.waits_for(late) == 2
    assert run_all(schedule) == [("a", 1)]
    schedule.add(operation("a", 2))
    assert schedule.waits_for(late) is None
    assert run_all(schedule) == [("a", 2), ("a", 3)]


def test_clients_take_turns_so_that_a_long_line_does_not_keep_others_waiting():
    schedule = Schedule()
    for seq in range(1, 4):
        schedule.add(operation("a", seq))
    schedule.add(operation("b", 1, tenant="other"))
    assert run_all(schedule) == [("a", 1), ("b", 1), ("a", 2), ("a", 3)]


def test_an_operation_given_back_runs_again_before_its_successors():
    schedule = Schedule()
    schedule.add(operation("a", 1))
    schedule.add(operation("a", 2))
    taken = schedule.take()
    assert schedule.take() is None  # the next of the same client waits for it
    schedule.give_back(taken)
    assert run_all(schedule) == [("a", 1), ("a", 2)]


def test_pending_operations_are_counted_by_tenant():
    schedule = Schedule()
    schedule.add(operation("a", 1, tenant="one"))
    schedule.add(operation("b", 1, tenant="two"))
    schedule.add(operation("b", 2, tenant="two"))
    assert (schedule.pending("one"), schedule.pending("two"), schedule.pending("three"), len(schedule)) == (1, 2, 0, 3)
