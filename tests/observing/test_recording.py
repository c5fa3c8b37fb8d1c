from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from reap2gguf.observing.recording import Recorded, Recorder, unshared


class Layer(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, extra: Any = None, mask: Any = None) -> torch.Tensor:
        return hidden


def test_arguments_are_recorded_by_their_names() -> None:
    hidden, mask = torch.zeros(1), torch.ones(1)
    recorder = Recorder(Layer(), is_last=False)
    assert recorder(hidden, None, mask=mask) is hidden
    assert recorder.hidden is hidden
    assert recorder.arguments == {"extra": None, "mask": mask}


def test_the_last_one_ends_the_forward() -> None:
    recorder = Recorder(Layer(), is_last=True)
    with pytest.raises(Recorded):
        recorder(torch.zeros(1), 3)
    assert recorder.arguments == {"extra": 3}


def test_what_a_layer_writes_to_is_new_for_each_call() -> None:
    """Some models hand keys and values from layer to layer in a mapping."""
    mask, written = torch.ones(1), UserDict({"full_attention": 1})
    found = unshared({"mask": mask, "shared": written, "none": None})
    assert found["mask"] is mask
    assert found["shared"] is not written
    assert type(found["shared"]) is UserDict
    assert not found["shared"]
    assert unshared({"shared": written})["shared"] is not found["shared"]
