"""torch's threads are kept out of the native kernels' way, and come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybridkv.kernels.threads import native_threads, torch_on_one_thread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_has_one_thread_and_native_calls_have_as_many_as_before() -> None:
    with torch_on_one_thread():
        assert (torch.get_num_threads(), native_threads()) == (1, 3)
        with torch_on_one_thread():
            assert (torch.get_num_threads(), native_threads()) == (1, 3)
        assert (torch.get_num_threads(), native_threads()) == (1, 3)
    assert (torch.get_num_threads(), native_threads()) == (3, 3)


def test_they_come_back_after_an_error() -> None:
    with pytest.raises(KeyError), torch_on_one_thread():
        raise KeyError
    assert (torch.get_num_threads(), native_threads()) == (3, 3)


def test_a_function_is_decorated() -> None:
    @torch_on_one_thread()
    def threads() -> tuple[int, int]:
        return torch.get_num_threads(), native_threads()

    assert [threads(), threads()] == [(1, 3), (1, 3)]
    assert torch.get_num_threads() == 3
