"""The page arena: all or nothing, exact books, loud about our own bugs."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.memory.pages import OutOfPages, PageAllocator


def test_allocates_each_page_once() -> None:
    arena = PageAllocator(5)
    assert sorted(arena.allocate(3) + arena.allocate(2)) == [0, 1, 2, 3, 4]
    assert arena.num_free == 0


def test_fresh_pages_come_in_order() -> None:
    assert PageAllocator(4).allocate(3) == [0, 1, 2]


def test_short_allocation_takes_nothing() -> None:
    arena = PageAllocator(3)
    arena.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 free"):
        arena.allocate(2)
    assert arena.num_free == 1


def test_zero_pages_is_an_empty_list() -> None:
    assert PageAllocator(0).allocate(0) == []


@pytest.mark.parametrize("page", [-1, 3])
def test_foreign_page_is_refused(page: int) -> None:
    with pytest.raises(AssertionError, match="not of this arena"):
        PageAllocator(3).free([page])


def test_double_free_is_refused() -> None:
    arena = PageAllocator(3)
    pages = arena.allocate(2)
    arena.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        arena.free(pages[:1])


@pytest.mark.parametrize("owned", [[[0]], [[0, 1], [1]], [[0, 1], [2]]], ids=["lost", "two owners", "held and free"])
def test_integrity_check_sees_wrong_books(owned: list[list[int]]) -> None:
    arena = PageAllocator(3)
    arena.allocate(2)
    with pytest.raises(AssertionError):
        arena.check_integrity(owned)


class ArenaMachine(RuleBasedStateMachine):
    """Random owners taking and returning pages, against a plain count."""

    NUM_PAGES = 17

    def __init__(self) -> None:
        super().__init__()
        self.arena = PageAllocator(self.NUM_PAGES)
        self.owners: list[list[int]] = []

    @rule(num_pages=st.integers(0, 8))
    def allocate(self, num_pages: int) -> None:
        if num_pages <= self.NUM_PAGES - sum(map(len, self.owners)):
            self.owners.append(self.arena.allocate(num_pages))
            assert len(self.owners[-1]) == num_pages
        else:
            with pytest.raises(OutOfPages):
                self.arena.allocate(num_pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.arena.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([owner for owner in self.owners if owner]))
        self.arena.free([owner.pop()])

    @invariant()
    def books_are_exact(self) -> None:
        self.arena.check_integrity(self.owners)
        assert self.arena.num_free == self.NUM_PAGES - sum(map(len, self.owners))


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
