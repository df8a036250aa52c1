import pytest


@pytest.fixture
def everywhere(device):
    """Runs the test on each device, which is where its tensors are made."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield
