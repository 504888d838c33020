import pytest

from ray_rl.machine import Machine, visible_gpus

TWO = "0, GPU-aaaa, 81920\n1, GPU-bbbb, 40960\n"
BIG, SMALL = 80 * 2**30, 40 * 2**30


def test_this_machine_has_a_processor_and_memory():
    machine = Machine.look()
    assert machine.cpus >= 1
    assert 0 < machine.available <= machine.memory


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, (BIG, SMALL)),
        ("1", (SMALL,)),
        ("1,0", (SMALL, BIG)),
        ("GPU-bbbb", (SMALL,)),
        ("GPU-b", (SMALL,)),
        ("MIG-1234", None),
    ],
)
def test_a_process_sees_the_gpus_that_its_environment_names(visible, found):
    assert visible_gpus(TWO, visible) == found


@pytest.mark.parametrize("told", ["No devices were found", "0, GPU-aaaa, [N/A]"])
def test_what_nvidia_smi_does_not_tell_is_not_guessed(told):
    assert visible_gpus(told, None) is None


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_none(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert Machine.look().gpus == ()
