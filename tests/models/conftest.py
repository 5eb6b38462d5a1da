import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """One thread: these tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
