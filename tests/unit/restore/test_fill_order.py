# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who inherits whose memory, checked by a model of what fork and exec leave in an address space."""

from ckptd.image.reader import Memory
from ckptd.image.records import ANON, FILE_PRIVATE, PAGE, Mm, PageRun, Vma
from ckptd.kernel.clone import CLONE_PARENT, CLONE_THREAD, CLONE_VM
from ckptd.restore.cow_sharing import CowSharing, between, remaining
from ckptd.restore.creation_steps import Clear, CreateTask, Dismiss, Fill, NewSession, Step
from ckptd.restore.fill_order import with_fills

HEAP = 0x10000000


def model(steps: list[Step], mms: dict[int, int], origins: dict[int, int]) -> None:
    """What each process has in memory: pages of these address spaces. An heir is born with its origin's, all others end
    with nothing that is not theirs."""
    has: dict[int, set[int]] = {0: set()}
    owner: dict[int, int] = {}
    for step in steps:
        match step:
            case CreateTask(vpid, maker, flags, _) if flags & CLONE_VM:
                owner[vpid] = owner.get(maker, maker)
            case CreateTask(vpid, maker, _, _):
                has[vpid or -1] = set(has[owner.get(maker, maker)])
            case Fill(mm_id, vpid):
                assert mms[vpid] == mm_id
                assert mm_id not in has[owner.get(vpid, vpid)], 'filled twice'
                has[owner.get(vpid, vpid)] = {mm_id}        # what differs it has given back
            case Clear(vpid):
                has[vpid].clear()
            case Dismiss(vpid, _):
                del has[vpid]
    for vpid, mm in mms.items():
        if vpid not in owner and has[vpid] != {mm}:         # those that were filled have their own already
            assert has[vpid] == ({origins[mm]} if mm in origins else set())


def planned(steps: list[Step], mms: dict[int, int], *pairs: tuple[int, int]) -> tuple[list[Step], dict[int, int]]:
    result, origins = with_fills(steps, mms, lambda theirs, mine: (theirs, mine) in pairs)
    model(result, mms, origins)
    assert [step for step in result if not isinstance(step, Fill | Clear)] == steps
    return result, origins


def test_nobody_shares() -> None:
    steps: list[Step] = [CreateTask(10, 0), CreateTask(11, 10), CreateTask(12, 11)]
    assert planned(steps, {10: 1, 11: 2, 12: 3}) == (steps, {})


def test_a_maker_is_filled_before_its_first_heir_and_others_drop_it() -> None:
    result, origins = planned([CreateTask(10, 0), CreateTask(11, 10), CreateTask(12, 10), CreateTask(13, 10),
                               CreateTask(14, 10)],
                              {10: 1, 11: 2, 12: 3, 13: 4, 14: 5}, (1, 3), (1, 5))
    assert result == [CreateTask(10, 0), CreateTask(11, 10), Fill(1, 10), CreateTask(12, 10), CreateTask(13, 10),
                      Clear(13), CreateTask(14, 10)]
    assert origins == {3: 1, 5: 1}


def test_heirs_of_heirs() -> None:
    result, origins = planned([CreateTask(10, 0), CreateTask(11, 10), NewSession(11), CreateTask(12, 11)],
                              {10: 1, 11: 2, 12: 3},
                              (1, 2), (2, 3))
    assert result.index(Fill(2, 11)) < result.index(CreateTask(12, 11))
    assert origins == {2: 1, 3: 2}


def test_who_is_no_heir_of_an_heir() -> None:
    """A shell's subshell that has started a program."""
    steps: list[Step] = [CreateTask(10, 0), CreateTask(11, 10), CreateTask(12, 11)]
    result, origins = planned(steps, {10: 1, 11: 2, 12: 3}, (1, 2))
    assert result == [CreateTask(10, 0), Fill(1, 10), CreateTask(11, 10), CreateTask(12, 11), Clear(12)]
    assert origins == {2: 1}


def test_threads_and_those_with_shared_memory_drop_nothing() -> None:
    thread, cousin = CreateTask(11, 10, CLONE_VM | CLONE_THREAD), CreateTask(12, 10, CLONE_VM)
    result, origins = planned([CreateTask(10, 0), CreateTask(13, 10), thread, cousin, CreateTask(14, 11)],
                              {10: 1, 11: 1, 12: 1, 13: 2, 14: 3}, (1, 2), (1, 3))
    assert not any(isinstance(step, Clear) for step in result)
    assert origins == {2: 1, 3: 1}


def test_an_orphan_inherits_through_the_one_that_dies() -> None:
    """The maker is filled before the one between them is forked."""
    steps: list[Step] = [CreateTask(10, 0), CreateTask(0, 10), CreateTask(11, -1), Dismiss(-1, 10)]
    result, origins = planned(steps, {10: 1, 11: 2}, (1, 2))
    assert result[:2] == [CreateTask(10, 0), Fill(1, 10)]
    assert origins == {2: 1}


def test_the_dead_and_siblings_that_are_no_heirs() -> None:
    """A ghost or a zombie has no memory; a sibling may make its sibling."""
    result, origins = planned([CreateTask(10, 0), CreateTask(11, 10), CreateTask(12, 10),
                               CreateTask(13, 11, CLONE_PARENT)],
                              {10: 1, 11: 2, 13: 3}, (1, 2), (2, 3))
    assert Clear(12) in result
    assert origins == {2: 1, 3: 2}


# ---------------------------------------------------------------- two address spaces

def vma(start: int, pages: int, *, protection: int = 3, kind: int = ANON, offset: int = 0, number: int = 0) -> Vma:
    flags = 0x22 if kind == ANON else 2
    return Vma(1, start, start + pages * PAGE, protection, flags, kind, offset, number, 0, 'ac', '')


def memory(vmas: list[Vma], runs: list[PageRun]) -> Memory:
    return Memory(Mm(1, (), b'', 0, 1, 0), tuple(vmas), tuple(runs), ())


def test_what_is_kept_dropped_and_read() -> None:
    theirs = memory([vma(HEAP, 20)], [PageRun(HEAP, 20, 0, 0)])
    # the same but for page 3; pages 5 and 6 given back; it ends earlier
    mine = [PageRun(HEAP, 3, 0, 0), PageRun(HEAP + 3 * PAGE, 1, 0, 77 * PAGE), PageRun(HEAP + 4 * PAGE, 1, 0, 4 * PAGE),
            PageRun(HEAP + 7 * PAGE, 3, 0, 7 * PAGE)]
    cow_sharing = CowSharing(theirs, memory([vma(HEAP, 10)], mine))
    assert cow_sharing.kept == [(HEAP, HEAP + 10 * PAGE)]
    assert list(cow_sharing.dropped()) == [(HEAP + 3 * PAGE, HEAP + 4 * PAGE), (HEAP + 5 * PAGE, HEAP + 7 * PAGE)]
    assert list(remaining(mine, cow_sharing.same)) == [mine[1]]


def test_mappings_that_are_not_alike_are_not_kept() -> None:
    pages = [PageRun(HEAP, 10, 0, 0)]
    theirs = memory([vma(HEAP, 10)], pages)
    others = [vma(HEAP, 11), vma(HEAP, 10, protection=7), vma(HEAP, 10, kind=FILE_PRIVATE, number=1)]
    assert [CowSharing(theirs, memory([other], pages)).kept for other in others] == [[], [], []]
    assert CowSharing(theirs, memory([vma(HEAP, 10)], [PageRun(HEAP, 10, 0, 50 * PAGE)])).kept == []
    # only another protection, of memory that was written once: it is set when all are born
    assert CowSharing(theirs, memory([vma(HEAP, 10, protection=1)], pages)).kept == [(HEAP, HEAP + 10 * PAGE)]


def test_a_file_is_kept_at_the_same_offset_only() -> None:
    pages = [PageRun(HEAP + 2 * PAGE, 2, 0, 0)]
    theirs = memory([vma(HEAP, 10, kind=FILE_PRIVATE, number=1, offset=3 * PAGE)], pages)
    for offset, expected in ((5 * PAGE, [(HEAP + 2 * PAGE, HEAP + 4 * PAGE)]), (3 * PAGE, [])):
        mine = memory([vma(HEAP + 2 * PAGE, 2, kind=FILE_PRIVATE, number=1, offset=offset)], pages)
        assert CowSharing(theirs, mine).kept == expected


def test_gaps() -> None:
    assert list(between([(2, 4), (6, 8)], 0, 10)) == [(0, 2), (4, 6), (8, 10)]
    assert list(between([(0, 4), (4, 10)], 0, 10)) == []
