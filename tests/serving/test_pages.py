"""The page allocator: all or nothing, exact counts, and assertions for our own bugs."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.memory.pages import OutOfPages, PageAllocator


def test_allocates_each_page_once() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(3) + allocator.allocate(2)) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0


def test_fresh_pages_come_in_order() -> None:
    assert PageAllocator(4).allocate(3) == [0, 1, 2]


def test_short_allocation_takes_nothing() -> None:
    allocator = PageAllocator(3)
    allocator.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 free"):
        allocator.allocate(2)
    assert allocator.num_free == 1


def test_zero_pages_are_an_empty_list() -> None:
    assert PageAllocator(0).allocate(0) == []


@pytest.mark.parametrize("page", [-1, 3])
def test_foreign_page_is_refused(page: int) -> None:
    with pytest.raises(AssertionError, match="not a page of this arena"):
        PageAllocator(3).free([page])


def test_double_free_is_refused() -> None:
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages[:1])


@pytest.mark.parametrize("owned", [[[0]], [[0, 1], [1]], [[0, 1], [2]]], ids=["lost", "two owners", "held and free"])
def test_integrity_check_sees_wrong_owners(owned: list[list[int]]) -> None:
    allocator = PageAllocator(3)
    allocator.allocate(2)
    with pytest.raises(AssertionError):
        allocator.check_integrity(owned)


class AllocatorMachine(RuleBasedStateMachine):
    """Random owners allocate and free pages; the allocator must agree with a plain count."""

    NUM_PAGES = 17

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(self.NUM_PAGES)
        self.owners: list[list[int]] = []

    @rule(num_pages=st.integers(0, 8))
    def allocate(self, num_pages: int) -> None:
        if num_pages <= self.NUM_PAGES - sum(map(len, self.owners)):
            self.owners.append(self.allocator.allocate(num_pages))
            assert len(self.owners[-1]) == num_pages
        else:
            with pytest.raises(OutOfPages):
                self.allocator.allocate(num_pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([owner for owner in self.owners if owner]))
        self.allocator.free([owner.pop()])

    @invariant()
    def counts_are_exact(self) -> None:
        self.allocator.check_integrity(self.owners)
        assert self.allocator.num_free == self.NUM_PAGES - sum(map(len, self.owners))


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
