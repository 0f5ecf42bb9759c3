"""The examples: what they show is so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

from relu_information_loss import DIMENSIONS, loss, spiral, through_relu  # noqa: E402


def test_relu_loses_less_in_more_dimensions():
    """The paper's Figure 1: in two or three dimensions most of the spiral is gone, in 15 and 30 it comes back."""
    x = spiral(200)
    found = [loss(x, n, matrices=40) for n in DIMENSIONS]
    errors = [f.error for f in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    assert found[0].collapsed > 0.5 and found[-1].collapsed == 0


def test_without_loss_the_spiral_comes_back():
    """Where every dimension lets every point through, and where ReLU keeps z and -z apart."""
    x = spiral(50) + 3  # all coordinates are positive
    back, passed = through_relu(x, torch.eye(2, dtype=torch.float64))
    assert passed.all()
    torch.testing.assert_close(back, x)
    both = torch.cat([torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)])
    torch.testing.assert_close(through_relu(spiral(50), both)[0] * 2, spiral(50))


def test_it_runs_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    command = [sys.executable, str(EXAMPLES / "relu_information_loss.py"), "--output", str(picture)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and output.count("%") == len(DIMENSIONS)
