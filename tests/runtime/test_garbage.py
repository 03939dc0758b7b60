"""Tests of `utils.runtime.garbage`."""

import gc
import weakref

import pytest

from utils.runtime.garbage import old_objects_aside


class Ring:
    def __init__(self):
        self.me = self


def test_only_what_is_new_is_collected_and_the_rest_afterwards():
    old = Ring()
    old_ref = weakref.ref(old)
    with old_objects_aside():
        new = Ring()
        new_ref = weakref.ref(new)
        del old, new
        gc.collect()
        assert new_ref() is None
        assert old_ref() is not None
    gc.collect()
    assert old_ref() is None
    assert gc.get_freeze_count() == 0


def test_objects_come_back_after_an_error_and_blocks_may_be_nested():
    with pytest.raises(ValueError, match="inside"), old_objects_aside(), old_objects_aside():
        raise ValueError("inside")
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen():
    gc.freeze()
    try:
        new = Ring()
        ref = weakref.ref(new)
        with old_objects_aside():
            del new
            gc.collect()
            assert ref() is None
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
