"""Which block gives way."""

import pytest

from pyggml_repkv.memory.slots import Slots


def test_free_slots_are_filled_lowest_first():
    slots = Slots(3)
    assert slots.take([7, 5]) == [(7, 0), (5, 1)]
    assert slots.take([5, 9]) == [(9, 2)]
    assert slots.resident == {7: 0, 5: 1, 9: 2}
    assert (slots.slot_of(9), slots.slot_of(8)) == (2, None)


def test_a_stable_selection_loads_nothing():
    slots = Slots(4)
    slots.take([1, 2, 3])
    for _ in range(5):
        assert slots.take([3, 1, 2]) == []


def test_the_lowest_score_gives_way():
    slots = Slots(2)
    for _ in range(3):
        slots.take([1])
    slots.take([2])
    assert slots.take([3]) == [(3, 1)]


def test_a_score_decays():
    slots = Slots(2, decay=0.5)
    for _ in range(3):
        slots.take([1])
    slots.take([2])
    assert slots.take([3]) == [(3, 0)]


def test_of_equal_scores_the_least_recently_used_gives_way():
    slots = Slots(2, decay=1)
    slots.take([1, 2])
    slots.take([2])
    slots.take([1])
    assert slots.take([3]) == [(3, 1)]


def test_of_equal_uses_the_lowest_slot_gives_way():
    slots = Slots(3)
    slots.take([5, 4, 3])
    assert slots.take([9]) == [(9, 0)]


def test_a_wanted_block_never_gives_way():
    slots = Slots(2)
    slots.take([1])
    for _ in range(9):
        slots.take([2])
    assert slots.take([1, 3]) == [(3, 1)]
    assert slots.resident == {1: 0, 3: 1}


def test_a_block_that_comes_back_starts_anew():
    slots = Slots(2)
    for _ in range(9):
        slots.take([1])
    slots.take([2, 3])
    slots.take([3])
    slots.take([1])
    assert slots.resident == {3: 1, 1: 0}
    assert slots.take([4]) == [(4, 0)]


def test_a_block_wanted_twice_at_once_counts_once():
    slots = Slots(2)
    assert slots.take([1, 1, 1]) == [(1, 0)]
    slots.take([2])
    assert slots.take([3]) == [(3, 0)]


def test_a_forgotten_block_frees_its_slot():
    slots = Slots(2)
    slots.take([1, 2])
    slots.forget(1)
    slots.forget(1)
    assert slots.resident == {2: 1}
    assert slots.take([3]) == [(3, 0)]
    assert slots.take([1, 3]) == [(1, 1)]


def test_scores_stay_apart_after_millions_of_calls():
    slots = Slots(3)
    for _ in range(9):
        slots.take([1])
    slots.take([2])
    slots._now += 5_000_000
    slots.take([3])
    slots._now += 5_000_000
    assert slots.take([4]) == [(4, 1)]
    assert slots.take([1, 5]) == [(5, 2)]
    assert slots.slot_of(1) == 0


def test_more_blocks_than_slots_are_an_error_that_changes_nothing():
    slots = Slots(2)
    slots.take([1, 2])
    with pytest.raises(ValueError, match="3 blocks wanted at once in 2 slots"):
        slots.take([3, 4, 5, 5])
    assert slots.resident == {1: 0, 2: 1}
    assert slots.take([1, 2]) == []


def test_no_slots_take_no_blocks():
    assert Slots(0).take([]) == []
    with pytest.raises(ValueError, match="1 blocks wanted"):
        Slots(0).take([1])


@pytest.mark.parametrize(("n_slots", "decay"), [(-1, 0.9), (1, 0), (1, 1.1), (1, float("nan"))])
def test_impossible_settings_are_an_error(n_slots, decay):
    with pytest.raises(ValueError, match="slots with decay"):
        Slots(n_slots, decay)


def test_resident_is_a_copy():
    slots = Slots(1)
    slots.take([1])
    slots.resident.clear()
    assert slots.slot_of(1) == 0
