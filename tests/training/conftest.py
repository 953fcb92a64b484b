"""Every test of training begins without what accelerate remembers of an earlier run in the same process."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision, but for this."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
