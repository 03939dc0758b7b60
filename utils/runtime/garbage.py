"""Collections of garbage that look only at what is new."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_aside() -> Iterator[None]:
    """Keep the objects that exist now out of collections inside the block.

    A notebook with transformers loaded holds half a million objects, and every full collection visits all of them, for
    about a third of a second. What was made inside the block is all that a measurement inside it has to let go.
    A caller who froze objects already keeps them frozen, and gets ordinary collections.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
