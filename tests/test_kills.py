"""Runs that are killed at any moment: nothing is lost, nothing is left, and no bit differs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc

pytestmark = pytest.mark.slow


def test_a_collection_killed_again_and_again_ends_with_the_same_file(tmp_path: Path) -> None:
    """SIGKILL at eight moments between start and end; the last run goes on and cleans up."""
    made = config(vocabulary=20)
    rc.save(rc.Model(made, random_parameters(made, 0)), tmp_path / "w.h5")
    tokens = np.random.default_rng(0).integers(0, 20, (5000, 64))  # three blocks
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    command = [sys.executable, "-m", "refcurv", "collect", "w.h5", "c.h5", "--layers", "**", "-o"]
    begin = time.monotonic()
    subprocess.run([*command, "whole.h5"], cwd=tmp_path, check=True, capture_output=True)
    takes = time.monotonic() - begin
    killed = 0
    for moment in np.random.default_rng(1).uniform(0.2, 1.0, 8):
        running = subprocess.Popen([*command, "f.h5"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            running.wait(timeout=takes * moment)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            killed += 1
        assert running.returncode in (0, -9)
        if (tmp_path / "f.h5").exists():
            assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
            (tmp_path / "f.h5").unlink()
    subprocess.run([*command, "f.h5"], cwd=tmp_path, check=True, capture_output=True)
    assert killed
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f.h5", "w.h5", "whole.h5"]
