import asyncio
import subprocess
import sys

import psutil

from ray_rl.startup import Startup, processor_seconds

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('busy', flush=True)\ninput()"


def test_time_counts_from_the_beginning_of_the_process_and_only_once():
    startup = Startup()
    startup.reached("ray")
    first = startup.metrics["startup/ray_seconds"]
    startup.reached("ray")
    assert startup.metrics == {"startup/ray_seconds": first}
    assert 0 < first < 3600


def test_a_milestone_is_reached_when_its_work_ends():
    startup = Startup()

    async def work() -> str:
        assert not startup.metrics
        return "done"

    assert asyncio.run(startup.reached_by(work(), "learner")) == "done"
    assert list(startup.metrics) == ["startup/learner_seconds"]


def test_the_first_group_tells_the_processor_time_of_all_processes():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        own = psutil.Process().cpu_times()
        startup = Startup()
        startup.reached("first_group")
        assert startup.metrics["startup/cpu_seconds"] >= own.user + own.system + 0.25
        assert processor_seconds() >= startup.metrics["startup/cpu_seconds"]
        child.communicate(b"\n", timeout=30)
