import gc

from ray_rl.garbage import uncollected


def test_nothing_is_collected_inside():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_whoever_had_it_off_finds_it_off():
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
