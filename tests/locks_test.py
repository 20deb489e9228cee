"""Locks on folders."""

import os
import subprocess
import sys

import pytest

from etfzoo import locks
from etfzoo.errors import EtfzooError
from testing import held_by_another_process


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    with held_by_another_process(tmp_path / "run") as process:
        with pytest.raises(EtfzooError) as caught:
            with locks.lock(tmp_path / "run", "a run"):
                pass
        text = str(caught.value)
        assert f"a run is at work in {tmp_path / 'run'} (process {process.pid} on " in text
        process.kill()
        process.wait()
        with locks.lock(tmp_path / "run", "a run") as held:
            assert isinstance(held, int)


def test_a_process_may_ask_again(tmp_path):
    with locks.lock(tmp_path, "a run") as outer:
        with locks.lock(tmp_path / ".", "a run") as inner:
            assert outer is not None and inner is None
        assert "process" in (tmp_path / locks.NAME).read_text()
    with locks.lock(tmp_path, "a run") as again:
        assert again is not None


def test_a_folder_into_which_nothing_came_is_not_left(tmp_path):
    for error in (None, KeyboardInterrupt):
        try:
            with locks.lock(tmp_path / "a" / "b", "a run"):
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert not (tmp_path / "a").exists()
    with locks.lock(tmp_path / "b", "a run"):
        (tmp_path / "b" / "file").touch()
    assert (tmp_path / "b" / "file").exists()
    (tmp_path / "c").mkdir()
    with locks.lock(tmp_path / "c", "a run"):
        pass
    assert (tmp_path / "c").exists()


def test_children_of_a_killed_process_are_waited_for(tmp_path, capsys):
    code = (
        "import subprocess, sys, os, signal; from etfzoo import locks\n"
        "with locks.lock(sys.argv[1], 'it') as held:\n"
        "    subprocess.Popen(['sleep', '1.5'], pass_fds=(held,), stdout=-3, stderr=-3)\n"
        "    print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    with pytest.raises(EtfzooError, match=f"process {int(dead.stdout)} on"):
        with locks.lock(tmp_path, "a sweep"):
            pass
    with locks.lock(tmp_path, "a sweep", patience=60) as held:
        assert held is not None
    assert f"waiting for what process {int(dead.stdout)}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_what_stands_in_the_place_of_a_lock_is_left_alone(tmp_path, kind):
    path = tmp_path / "run" / locks.NAME
    path.parent.mkdir()
    (tmp_path / "file").write_text("must stay")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("file" if kind == "link" else "none"))
    with pytest.raises(EtfzooError, match="is no lock but a link, a pipe or a device: delete it"):
        with locks.lock(tmp_path / "run", "a run"):
            pass
    assert (tmp_path / "file").read_text() == "must stay" and not (tmp_path / "none").exists()
