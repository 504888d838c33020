"""Scorers with real grader processes."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from actors.grader_process import GraderStartError
from actors.scoring import InPlaceScorer, ProcessPoolScorer
from ray_rl.config.reward import ExactRewardConfig, MathRewardConfig, PythonRewardConfig, ReasoningGymRewardConfig
from ray_rl.types import Problem, Reward, ScoringItem

pytestmark = pytest.mark.integration

GRADER = """
import os, signal, subprocess, sys, time
NEVER_ENDING_C_CODE = "9" * 2_000_000

def score(prompt, completion, answer, metadata):
    given = {**globals(), "answer": answer}
    exec(completion, given)
    return float(given["answer"])
"""
TIMEOUT = 0.8
CLOSED = "killed by SIGKILL (by the system when memory is short, or because it had closed its connection)"


def item(code: str, answer: str = "1") -> ScoringItem:
    return ScoringItem(problem=Problem(problem_id="test:0", prompt="?", answer=answer), completion_text=code)


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def is_alive(pid: int) -> bool:
    """A zombie is not, even where nobody reaps it."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def grader_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("grader") / "grader.py"
    file.write_text(GRADER)
    return file


@pytest.fixture(scope="module")
def pool(grader_file):
    """One for all tests, so that each finds it as the failures of the others have left it."""
    config = PythonRewardConfig(function=f"{grader_file}:score", failure=-1.0, timeout=TIMEOUT, memory_gib=1.0)
    scorer = ProcessPoolScorer(config)
    yield scorer
    scorer.close()


async def test_the_in_place_scorer_keeps_the_order_and_counts():
    scorer = InPlaceScorer(ExactRewardConfig())
    rewards = await scorer.score([item("#1"), item("#2"), item("#1", answer=" ")])
    assert [reward.value for reward in rewards] == [1.0, 0.0, 0.0]
    assert scorer.counters() == {"graded": 3, "failed/no reference answer": 1}
    assert await scorer.final_answers(["# 07.50", "none"]) == ["7.5", ""]


FAILING = {
    "an endless loop": ("while True: pass", "timeout: no verdict after 0.8 s"),
    "an endless loop that ignores SIGTERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "timeout: no verdict after 0.8 s",
    ),
    "C code that never looks at signals": ("int.__pow__(7, 10**9)", "timeout: no verdict after 0.8 s"),
    "an exit without a word": ("os._exit(3)", "grader process died: exit code 3"),
    "an exit that looks like success": ("os._exit(0)", "grader process died: exit code 0"),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "grader process died: killed by SIGSEGV"),
    "an exception": ("raise KeyError('x')", "KeyError: 'x' (<string>, line 1)"),
    "sys.exit": ("sys.exit('enough')", "SystemExit: enough (<string>, line 1)"),
    "an error of its own": ("class Odd(BaseException): pass\nraise Odd('x')", "Odd: x (<string>, line 2)"),
    "an error that can't be told": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
        "Odd: without a message (ValueError) (<string>, line 3)",
    ),
    "an error of several lines": (
        "raise ValueError('one' + chr(10) + 'two')",
        "ValueError: one two (<string>, line 1)",
    ),
    "a stopped process": ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout: no verdict after 0.8 s"),
    "more memory than there may be": (
        "bytearray(2**33)",
        "out of memory: no room (reward.memory_gib is 1; <string>, line 1)",
    ),
    "memory bit by bit": (
        "hoard = []\nwhile True: hoard.append(bytes(2**25))",
        "out of memory: no room (reward.memory_gib is 1; <string>, line 2)",
    ),
    "closed files and a loop": ("os.closerange(0, 256)\nwhile True: pass", f"grader process died: {CLOSED}"),
    "text in every file": (
        "for file in range(3, 64):\n    try: os.write(file, b'a line of some log' * 9)\n    except OSError: pass",
        f"grader process died: {CLOSED}",
    ),
    "nan": ("answer = 'nan'", "not a finite number: the function's result is nan"),
}


@pytest.mark.parametrize(("code", "reason"), FAILING.values(), ids=FAILING)
async def test_a_failed_grading_has_a_name_and_costs_nobody_else_a_reward(pool, caplog, code, reason):
    before = pool.counters()
    with caplog.at_level(logging.WARNING):
        rewards = await pool.score([item("", "0.25"), item(code), item("", "0.75")])
    assert rewards == [Reward(value=0.25), Reward(value=-1.0, failure=reason), Reward(value=0.75)]
    counted = {name: count - before.get(name, 0) for name, count in pool.counters().items()}
    counted = {name: count for name, count in counted.items() if count}
    assert counted == {"graded": 3, f"failed/{reason.partition(':')[0]}": 1}
    assert reason in caplog.text
    assert code.split("\n")[0] in caplog.text


async def test_a_result_that_is_no_number_is_a_failure_by_name(pool):
    nan, word = await pool.score([item("", "nan"), item("", "word")])
    assert nan.failure == "not a finite number: the function's result is nan"
    assert word.failure == "ValueError: could not convert string to float: 'word' (grader.py, line 8)"


async def test_the_item_after_one_that_ate_all_memory_has_all_of_it_again(pool):
    hoarding = "import builtins\nbuiltins.hoard = []\nwhile True: builtins.hoard.append(bytes(2**25))"
    hoarded, after = await pool.score([item(hoarding), item("bytes(2**29)")])
    assert hoarded.failure is not None
    assert after == Reward(value=1.0)


async def test_a_forked_copy_of_the_grader_answers_nothing_and_holds_nobody_up(pool, tmp_path):
    mark = tmp_path / "copies"
    fork = f"if os.fork() == 0: answer = '77'; open({str(mark)!r}, 'a').write(f'{{os.getpid()}} ')"
    rewards = await pool.score([item(fork, "1"), item("time.sleep(0.2)", "2"), item(fork, "3"), item("", "4")])
    assert [reward.value for reward in rewards] == [1.0, 2.0, 3.0, 4.0]
    await asyncio.sleep(0.2)
    copies = [int(pid) for pid in mark.read_text().split()]
    assert len(copies) == 2
    for copy in copies:
        await asyncio.to_thread(wait_for_end, copy)


async def test_a_grader_that_dies_is_noticed_although_its_copy_lives_and_the_copy_dies_too(pool, tmp_path):
    mark = tmp_path / "copy"
    code = (
        f"copy = os.fork()\nif copy == 0: time.sleep(600)\n"
        f"with open({str(mark)!r}, 'w') as file: file.write(str(copy))\nos._exit(5)"
    )
    [reward] = await pool.score([item(code)])
    assert reward.failure == "grader process died: exit code 5"
    await asyncio.to_thread(wait_for_end, int(mark.read_text()))


async def test_what_a_grader_started_in_a_group_of_its_own_is_killed_with_it(pool, tmp_path):
    mark = tmp_path / "child"
    code = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"with open({str(mark)!r}, 'w') as file: file.write(str(child.pid))\nwhile True: pass"
    )
    [reward] = await pool.score([item(code)])
    assert reward.failure == f"timeout: no verdict after {TIMEOUT:g} s"
    await asyncio.to_thread(wait_for_end, int(mark.read_text()))


async def test_an_alarm_that_a_grader_forgot_rings_in_nobody_elses_time(pool):
    alarm = "signal.signal(signal.SIGALRM, lambda *_: sys.exit('too late')); signal.setitimer(signal.ITIMER_REAL, 0.2)"
    rewards = await pool.score([item(alarm, "0.25"), item("time.sleep(0.4)", "0.75")])
    assert rewards == [Reward(value=0.25), Reward(value=0.75)]


async def test_a_grader_that_prints_megabytes_is_graded_like_any_other(pool):
    assert await pool.score([item("for _ in range(8): print('x' * 2**20)", "0.5")]) == [Reward(value=0.5)]


async def test_imports_that_take_more_memory_than_allowed_are_an_error_at_the_start(grader_file):
    scorer = ProcessPoolScorer(PythonRewardConfig(function=f"{grader_file}:score", memory_gib=0.01))
    with pytest.raises(GraderStartError, match=r"imports take .* GiB of address space \(reward\.memory_gib is 0\.01; "):
        await scorer.start()
    scorer.close()


async def test_an_item_that_waits_in_the_queue_does_not_use_up_its_time(pool):
    rewards = await pool.score([item(f"time.sleep({0.6 * TIMEOUT})")] * 3)
    assert [reward.failure for reward in rewards] == [None] * 3


async def test_starting_the_process_does_not_use_up_the_items_time(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(f"import time; time.sleep(1.5)\n{GRADER}")
    scorer = ProcessPoolScorer(PythonRewardConfig(function=f"{file}:score", timeout=TIMEOUT))
    assert await scorer.score([item("")]) == [Reward(value=1.0)]
    scorer.close()


async def test_an_idle_process_that_was_killed_is_replaced(pool):
    await pool.score([item("")])
    [idle] = psutil.Process().children()
    idle.kill()
    await asyncio.to_thread(wait_for_end, idle.pid)
    assert await pool.score([item("")]) == [Reward(value=1.0)]


async def test_processes_work_side_by_side_and_rewards_keep_their_order(grader_file):
    scorer = ProcessPoolScorer(PythonRewardConfig(function=f"{grader_file}:score", processes=3))
    await scorer.start()
    started = time.monotonic()
    rewards = await scorer.score([item(f"time.sleep({0.6 - 0.1 * i})", str(i)) for i in range(6)])
    assert time.monotonic() - started < 1.8  # 2.1 s one after another
    assert [reward.value for reward in rewards] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    scorer.close()


async def test_callers_do_not_disturb_each_other(pool):
    looping, quick = await asyncio.gather(pool.score([item("while True: pass")]), pool.score([item("", "0.5")]))
    assert looping[0].failure is not None
    assert quick == [Reward(value=0.5)]


async def test_a_caller_that_gives_up_takes_its_waiting_items_along(pool, tmp_path):
    call = asyncio.create_task(pool.score([item("time.sleep(0.5)"), item(f"open({str(tmp_path / 'ran')!r}, 'w')")]))
    await asyncio.sleep(0.1)
    call.cancel()
    assert await pool.score([item("", "0.5")]) == [Reward(value=0.5)]
    assert not (tmp_path / "ran").exists()


async def test_a_file_that_cannot_be_imported_is_an_error_at_the_start_with_its_reason(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\ndef score(a, b, c, d): return 1\n")
    scorer = ProcessPoolScorer(PythonRewardConfig(function=f"{file}:score"))
    with pytest.raises(GraderStartError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        await scorer.start()
    [reward] = await scorer.score([item("")])
    assert reward.failure is not None
    assert reward.failure.startswith("grader did not start: ModuleNotFoundError")
    scorer.close()


async def test_close_leaves_no_process_behind_not_even_what_a_grader_started(grader_file):
    before = descendants()
    scorer = ProcessPoolScorer(PythonRewardConfig(function=f"{grader_file}:score", processes=2, timeout=60))
    await scorer.start()
    stuck = "signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.Popen(['sleep', '600'])\nwhile True: pass"
    call = asyncio.create_task(scorer.score([item(stuck), item("time.sleep(600)"), item("")]))
    await asyncio.sleep(0.5)
    ours = descendants() - before
    assert len(ours) == 3  # two graders and a sleep
    scorer.close()
    scorer.close()
    assert all(reward.failure for reward in await call)
    assert descendants() == before
    # A grandchild whose parent died is nobody's descendant: look for it by number.
    assert not [pid for pid in ours if is_alive(pid)]
    with pytest.raises(RuntimeError, match="closed"):
        await scorer.score([item("")])


PARENT = """
import asyncio, psutil, signal, sys
from actors.scoring import ProcessPoolScorer
from ray_rl.config.reward import PythonRewardConfig
from ray_rl.types import Problem, ScoringItem

async def main():
    scorer = ProcessPoolScorer(PythonRewardConfig(function=sys.argv[1] + ":score", timeout=600))
    await scorer.start()
    problem = Problem(problem_id="p", prompt="", answer="1")
    loop = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: pass"
    call = asyncio.create_task(scorer.score([ScoringItem(problem=problem, completion_text=loop)]))
    await asyncio.sleep(0.3)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    if sys.argv[2] != "exit":
        await call

# Who was started in the background of a shell inherits that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "exit"])
def test_a_looping_grader_dies_with_its_parent_however_that_ends(grader_file, end):
    command = [sys.executable, "-c", PARENT, str(grader_file), end]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        grader = int(parent.stdout.readline())
        if end != "exit":
            parent.send_signal(signal.Signals[end])
        parent.wait(timeout=10)
    wait_for_end(grader)


@pytest.mark.parametrize(
    ("config", "text", "answer"),
    [
        (MathRewardConfig(), r"\boxed{\frac{1}{2}}", "1/2"),
        (ReasoningGymRewardConfig(), "<answer>12</answer>", "12"),
    ],
    ids=["math", "reasoning_gym"],
)
async def test_library_verifiers_run_in_the_processes(config, text, answer):
    scorer = ProcessPoolScorer(config)
    await scorer.start()
    entry = {"question": "5 + 7 =", "answer": "12", "metadata": {}}
    problem = Problem(problem_id="p", prompt="", answer="0.5", metadata={"entry": entry, "dataset": "chain_sum"})
    rewards = await scorer.score([ScoringItem(problem=problem, completion_text=text)])
    assert rewards == [Reward(value=1.0, parts={config.kind: 1.0})]
    assert await scorer.final_answers([text]) == [answer]
    scorer.close()


async def test_mathematics_that_would_never_end_is_a_timeout_and_the_next_item_is_graded():
    scorer = ProcessPoolScorer(MathRewardConfig(timeout=2.0))
    await scorer.start()
    endless, fine = await scorer.score([item(r"\boxed{9^{9^{9^{9}}}}"), item(r"\boxed{1}")])
    assert endless.failure == "timeout: no verdict after 2 s"
    assert fine.value == 1.0
    scorer.close()
