from hypothesis import given
from hypothesis import strategies as st

from utils.growth.certificate import Certificate
from utils.growth.edits import InsertBlock, KeepBlocks, Plan
from utils.growth.lineage import GrowthEvent
from utils.growth.lineage_course import MOST_BLOCKS, Bar, course

KEPT = Certificate(True, True, 0.0, None, 1e-5, 2.0, 2.0, 4)


def event(step, plan, certificate=KEPT):
    return GrowthEvent(step, 0, plan, certificate, "asked", 0, 0, 0.0)


def deeper(step, before, source, added=1, container="blocks"):
    edits = tuple(InsertBlock(container, source + 1, source, ()) for _ in range(added))
    where = tuple(f"{container}.{source + 1 + number}" for number in range(added))
    return event(step, Plan("depth", where, edits, before, before + added, "exact"))


def wider(step, before, after, *where, operator="feed_forward"):
    return event(step, Plan(operator, where, (), before, after))


def beginning(before, after, container="blocks", first=None):
    first = after if first is None else first
    cut = KeepBlocks(container, first, first + before - after)
    return event(0, Plan("depth", (container,), (cut,), before, after, "anew"), None)


def seen(rows):
    return {row.label: [(bar.begin, bar.end, bar.event, bar.size) for bar in row.bars] for row in rows}


def test_blocks_begin_when_they_were_inserted_and_are_in_the_order_of_the_model():
    rows = course([deeper(10, 2, 1), deeper(20, 3, 0, added=2)], 0, 100.0)
    assert [row.label for row in rows] == [f"blocks.{number}" for number in range(5)]
    assert [(row.bars[0].begin, row.bars[0].event) for row in rows] == [(0, None), (20, 2), (20, 2), (0, None), (10, 1)]
    assert all(row.bars[0].end == 100 and row.operator == "depth" for row in rows)


def test_a_beginning_with_fewer_blocks_shows_those_that_stayed():
    rows = course([beginning(4, 1), deeper(5, 1, 0, added=3)], 1, 50.0)
    assert [row.bars[0].begin for row in rows] == [0, 5, 5, 5]
    assert [row.bars[0].event for row in rows] == [None, 2, 2, 2]


def test_blocks_behind_other_modules_of_a_sequence_keep_their_numbers():
    rows = course([deeper(5, 2, 2, container="net")], 0, 50.0)
    assert [row.label for row in rows] == ["net.1", "net.2", "net.3"]
    rows = course([beginning(3, 1, "net", first=2), deeper(5, 1, 1, container="net")], 1, 50.0)
    assert [row.label for row in rows] == ["net.1", "net.2"]


def test_widths_are_followed_through_insertions_and_inherited_by_copies():
    events = [
        wider(10, 128, 160, "blocks.0.mlp", "blocks.1.mlp"),
        deeper(20, 2, 0),
        wider(30, 160, 192, "blocks.2.mlp"),
    ]
    found = seen(row for row in course(events, 0, 100.0) if row.operator == "feed_forward")
    assert found == {
        "blocks.0-1": [(0, 10, None, 128), (10, 100, 1, 160)],
        "blocks.2": [(0, 10, None, 128), (10, 30, 1, 160), (30, 100, 3, 192)],
    }


def test_a_part_of_a_new_block_begins_with_it():
    events = [deeper(20, 1, 0), wider(30, 8, 16, "blocks.1.mlp")]
    found = seen(row for row in course(events, 0, 100.0) if row.operator == "feed_forward")
    assert found == {"blocks.1": [(20, 30, None, 8), (30, 100, 2, 16)]}


def test_parts_outside_of_blocks_keep_their_names_and_operators_stand_together():
    events = [
        wider(5, 300, 320, "embed", "head", operator="vocabulary"),
        wider(10, 8, 16, "layer.mlp"),
        wider(20, 320, 340, "embed", "head", operator="vocabulary"),
        wider(30, 4, 6, "", operator="residual"),
    ]
    rows = course(events, 0, 40.0)
    assert [(row.operator, row.label) for row in rows] == [
        ("vocabulary", "embed +1"), ("feed_forward", "layer.mlp"), ("residual", "the model")
    ]  # fmt: skip
    assert [bar.size for bar in rows[0].bars] == [300, 320, 340]


def test_what_happened_before_the_run_is_there_at_its_beginning():
    events = [deeper(500, 1, 0), wider(800, 8, 16, "blocks.0.mlp"), wider(5, 16, 32, "blocks.0.mlp")]
    rows = course(events, 2, 40.0)
    assert [row.bars for row in rows[:2]] == [(Bar(0.0, 40.0, None),)] * 2
    assert rows[2].bars == (Bar(0.0, 5.0, None, 16), Bar(5.0, 40.0, 3, 32))


def test_many_blocks_of_one_age_share_a_row():
    count = MOST_BLOCKS + 6
    rows = course([deeper(10, count, 3)], 0, 20.0)
    assert [row.label for row in rows] == ["blocks.0-3", "blocks.4", f"blocks.5-{count}"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3), st.booleans()), max_size=12))
def test_bars_have_no_gaps_and_there_are_as_many_blocks_as_the_lineage_says(wishes):
    events, blocks, width = [], 2, 8
    for number, (place, amount, depth) in enumerate(wishes):
        if depth:
            events.append(deeper(number, blocks, place % blocks, amount))
            blocks += amount
        else:
            events.append(wider(number, width, width + amount, *(f"blocks.{n}.mlp" for n in range(blocks))))
            width += amount
    rows = course(events, 0, 60.0)
    if any(event.plan.operator == "depth" for event in events) and blocks <= MOST_BLOCKS:
        assert sum(row.operator == "depth" for row in rows) == blocks
    for row in rows:
        assert row.bars[-1].end == 60
        assert all(one.end == next_.begin for one, next_ in zip(row.bars, row.bars[1:], strict=False))
        assert all(bar.begin <= bar.end for bar in row.bars)
