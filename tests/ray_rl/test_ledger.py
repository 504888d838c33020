"""Every prompt ends exactly once: under any order of draws, ends, undone steps, crashes and damage to the file."""

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_rl.config import RunConfig
from ray_rl.errors import NotWritten, RunError
from ray_rl.ledger import Ledger, LedgerLine, audit, read_ledger
from ray_rl.run_state import RunFolder, RunState
from tests.little_room import with_little_room

NEW = RunState.new(3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def drawn(path: Path, count: int, start: RunState = NEW) -> Ledger:
    ledger = Ledger(path, start)
    for position in range(start.position, start.position + count):
        ledger.draw(position)
    return ledger


def three_steps(path: Path) -> Ledger:
    """Step 1 trains 0 and 1, step 2 trains 3 after 2 was dropped, step 3 trains 5; 4 is pending, 6 dropped since."""
    ledger = drawn(path, 7)
    ledger.train(1, [1, 0])
    ledger.drop(2, "stale")
    ledger.train(2, [3])
    ledger.train(3, [5])
    ledger.drop(6, "failed")
    return ledger


def test_a_step_is_a_line_with_what_it_trained_and_what_was_dropped_before_it(path):
    three_steps(path)
    assert list(read_ledger(path)) == [
        LedgerLine(step=1, trained=(0, 1), dropped={}),
        LedgerLine(step=2, trained=(3,), dropped={"stale": (2,)}),
        LedgerLine(step=3, trained=(5,), dropped={}),
    ]


def test_the_totals_add_up_to_the_prompts_drawn(path):
    assert three_steps(path).totals() == {
        "ledger/trained": 4.0,
        "ledger/dropped": 2.0,
        "ledger/dropped_failed": 1.0,
        "ledger/dropped_stale": 1.0,
        "ledger/pending": 1.0,
    }


def test_what_was_dropped_after_the_last_step_is_pending_in_a_checkpoint(path):
    state = three_steps(path).state(3, 7, 3)
    assert (state.pending_positions, state.trained, state.dropped) == ((4, 6), 4, {"stale": 1})
    assert Ledger(path, state).pending == {4, 6}


def test_a_pending_prompt_may_be_sampled_again(path):
    ledger = three_steps(path)
    ledger.draw(4)
    assert ledger.pending == {4}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda book: book.drop(3, "stale"), r"position 3: dropped \(stale\), but it was trained in step 2"),
        (
            lambda book: book.train(4, [4, 2]),
            r"position 2: trained in step 4, but it was dropped \(stale\) before the end of step 2",
        ),
        (lambda book: book.draw(6), r"position 6: drawn, but it was dropped \(failed\) after step 3"),
        (lambda book: book.draw(8), r"position 8: drawn, but it was never handed out: the next position is 7"),
        (lambda book: book.drop(-1, "stale"), r"position -1: .* never handed out"),
        (lambda book: book.train(4, [4, 4]), r"position 4: trained in step 4, 2 times"),
        (lambda book: book.train(3, [4]), r"step 3: trained after step 3"),
        (lambda book: book.state(3, 8, 3), r"the stream is at position 8, the ledger at 7"),
    ],
)
def test_an_end_that_cannot_be_is_refused_with_both_ends_and_changes_nothing(path, act, message):
    ledger = three_steps(path)
    before = (path.read_bytes(), ledger.totals(), ledger.pending)
    with pytest.raises(ValueError, match=message):
        act(ledger)
    assert (path.read_bytes(), ledger.totals(), ledger.pending) == before


def test_a_step_that_is_not_written_down_cannot_be_saved(path):
    with pytest.raises(RunError, match="step 4 cannot be saved: the last one that is written down is 3"):
        three_steps(path).state(4, 7, 3)


def test_undone_steps_give_back_what_they_ended(path):
    ledger = three_steps(path)
    assert ledger.undo(1) == (2, 3, 5, 6)
    assert ledger.pending == {2, 3, 4, 5, 6}
    assert [line.step for line in read_ledger(path)] == [1]
    assert ledger.totals()["ledger/trained"] == 2.0
    ledger.train(2, [6, 2, 3])
    assert ledger.undo(0) == (0, 1, 2, 3, 6)


def test_going_back_to_the_last_step_gives_back_what_was_dropped_since(path):
    assert three_steps(path).undo(3) == (6,)


def test_steps_whose_lines_are_gone_cannot_be_undone(path):
    ledger = three_steps(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    with pytest.raises(RunError, match="cannot go back from step 3 to step 1, for lines between them are missing"):
        ledger.undo(1)


@pytest.mark.parametrize("tail", [b'{"step": 4, "tra', b"\x00\xff\xfe\n", b'{"step": 4}\n', b"[4]\n", b"\n"])
def test_what_an_accident_left_after_the_good_lines_is_cut(path, tail):
    state = three_steps(path).state(3, 7, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    ledger = Ledger(path, state)
    assert path.read_bytes() == whole
    assert ledger.note is None
    assert audit(path, state).lost == ()


@pytest.mark.parametrize(
    "left", [None, b"", b"\x89PNG\r\n\x1a\n\x00", b'{"step": 1, "trained": [0, 1], "dropped": {}}\n{']
)
def test_without_lines_of_earlier_steps_the_totals_are_the_checkpoints_and_that_is_said(path, left):
    state = three_steps(path).state(3, 7, 3)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    ledger = Ledger(path, state)
    assert ledger.note is not None
    assert "of the 5 prompts before step 3 ended" in ledger.note
    assert (ledger.totals()["ledger/trained"], ledger.totals()["ledger/dropped_stale"]) == (4.0, 1.0)
    ledger.train(4, [4])
    assert ledger.state(4, 7, 3).trained == 5


def test_a_checkpoint_of_an_older_version_has_its_totals_from_the_file(path):
    three_steps(path)
    ledger = Ledger(path, RunState(step=3, policy_version=3, position=7, pending_positions=(4, 6), seed=3))
    assert ledger.state(3, 7, 3).trained == 4
    assert ledger.note is None


def test_the_audit_finds_what_is_lost_and_what_is_there_twice(path):
    path.write_text(
        '{"step": 1, "trained": [0, 1], "dropped": {"stale": [1]}}\n{"step": 2, "trained": [9], "dropped": {}}\n'
        '{"step": 3, "trained": [4], "dropped": {}}\n'
    )
    found = audit(path, RunState(step=2, policy_version=2, position=5, pending_positions=(0, 3), seed=0))
    assert (found.lost, found.duplicated) == ((2, 4), (0, 1, 9))
    assert (found.trained, found.dropped, found.pending) == (3, {"stale": 1}, 2)


def test_a_line_that_finds_no_room_changes_nothing_and_can_be_written_later(tmp_path):
    said = with_little_room(
        tmp_path,
        """
        from ray_rl.ledger import Ledger
        from ray_rl.run_state import RunState
        book = Ledger(Path("ledger.jsonl"), RunState.new(0))
        for position in range(2000): book.draw(position)
        book.train(1, range(100))
        try: book.train(2, range(100, 2000))
        except NotWritten as error: print(error)
        assert len(book.pending) == 1900
        book.train(2, range(100, 110))
        """,
    )
    assert said.startswith("ledger.jsonl: could not be written: File too large")
    assert [len(line.trained) for line in read_ledger(tmp_path / "ledger.jsonl")] == [100, 10]


def test_a_ledger_that_cannot_be_cut_is_said(tmp_path):
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(NotWritten, match=r"ledger\.jsonl: could not be written: Is a directory"):
        Ledger(tmp_path / "ledger.jsonl", NEW)


class Books(RuleBasedStateMachine):
    """A ledger beside a model that remembers the end of every position."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger.jsonl"
        self.ledger = Ledger(self.path, NEW)
        self.step = self.position = 0
        self.ends: dict[int, tuple[int | None, str]] = {}
        """Position -> step of its line (None: there is none yet), and how it ended."""
        self.saved = [NEW]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @property
    def pending(self) -> set[int]:
        return set(range(self.position)) - self.ends.keys()

    @rule(count=st.integers(1, 6))
    def draw(self, count):
        for _ in range(count):
            self.ledger.draw(self.position)
            self.position += 1

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def draw_again(self, data):
        self.ledger.draw(data.draw(st.sampled_from(sorted(self.pending))))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), reason=st.sampled_from(["stale", "decided", "failed"]))
    def drop(self, data, reason):
        position = data.draw(st.sampled_from(sorted(self.pending)))
        self.ledger.drop(position, reason)
        self.ends[position] = (None, reason)

    @rule(data=st.data())
    def train(self, data):
        pending = sorted(self.pending)
        chosen = data.draw(st.lists(st.sampled_from(pending), unique=True)) if pending else []
        self.step += 1
        self.ledger.train(self.step, chosen)
        self.ends |= {position: (self.step, how) for position, (step, how) in self.ends.items() if step is None}
        self.ends |= dict.fromkeys(chosen, (self.step, "trained"))

    @rule()
    def save(self):
        state = self.ledger.state(self.step, self.position, 3)
        self.saved = [other for other in self.saved if other.step < self.step] + [state]

    @rule(data=st.data())
    def undo(self, data):
        step = data.draw(st.sampled_from(self.saved)).step
        before = self.pending
        again = self.ledger.undo(step)
        self._forget(step)
        assert again == tuple(sorted(self.pending - before))

    @rule(data=st.data(), tail=st.sampled_from([b"", b"{", b'{"step": 1, "trained": [', b"\xff\x00\n{}\n"]))
    def crash_and_resume(self, data, tail):
        state = data.draw(st.sampled_from(self.saved))
        with self.path.open("ab") as file:
            file.write(tail)
        self.ledger = Ledger(self.path, state)
        self.position = state.position
        self._forget(state.step)
        self.ends = {position: end for position, end in self.ends.items() if position < state.position}

    def _forget(self, step: int) -> None:
        self.step = step
        self.ends = {p: end for p, end in self.ends.items() if end[0] is not None and end[0] <= step}
        self.saved = [state for state in self.saved if state.step <= step]

    @invariant()
    def nothing_is_lost_or_there_twice(self):
        for state in (*self.saved, self.ledger.state(self.step, self.position, 3)):
            found = audit(self.path, state)
            assert (found.lost, found.duplicated) == ((), ())
            assert (found.trained, found.dropped) == (state.trained, state.dropped)

    @invariant()
    def the_ledger_says_what_happened(self):
        written = {
            position: (line.step, how)
            for line in read_ledger(self.path)
            for how, positions in {"trained": line.trained, **line.dropped}.items()
            for position in positions
        }
        assert written == {position: end for position, end in self.ends.items() if end[0] is not None}
        assert self.ledger.pending == self.pending
        assert self.ledger.note is None
        totals = self.ledger.totals()
        assert sum(totals[f"ledger/{place}"] for place in ("trained", "dropped", "pending")) == self.position


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

ENDLESS_RUN = """
import random, sys
from pathlib import Path
from ray_rl.ledger import Ledger
from ray_rl.run_state import RunFolder

folder = RunFolder.open(Path(sys.argv[1]))
start = folder.find_start().state
ledger, step, position, dice = Ledger(folder.ledger, start), start.step, start.position, random.Random(start.step)
while True:
    while len(ledger.pending) < 8:
        ledger.draw(position)
        position += 1
    if dice.random() < 0.5:
        ledger.drop(dice.choice(sorted(ledger.pending)), dice.choice(["stale", "decided"]))
    step += 1
    ledger.train(step, dice.sample(sorted(ledger.pending), 4))
    if step % 3 == 0:
        with folder.new_checkpoint(ledger.state(step, position, 0)) as new:
            (new.path / "weights").write_bytes(bytes(100_000))
        folder.prune(2, step)
        print(step, flush=True)
"""


def test_a_run_that_is_killed_again_and_again_loses_no_prompt(tmp_path):
    folder = RunFolder.create(tmp_path / "run", RunConfig())
    for checkpoints in (1, 4, 2):
        command = [sys.executable, "-c", ENDLESS_RUN, str(folder.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            for _ in range(checkpoints):
                step = int(run.stdout.readline())
            run.send_signal(signal.SIGKILL)
        start = folder.find_start()
        assert start.notes == ()
        assert start.state.step >= step
        found = audit(folder.ledger, start.state)
        assert (found.lost, found.duplicated) == ((), ())
        assert found.trained == start.state.trained == 4 * start.state.step
