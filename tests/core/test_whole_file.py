"""Files appear whole or not at all, and what stood at their place is respected."""

import os
import stat

import pytest
import torch

from stepgraph.files.whole_file import save_tensors, whole_file


def write(path, text: str = "new") -> None:
    with whole_file(path) as partial:
        partial.write_text(text)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail():
        with whole_file(target) as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device", str(partial))

    with pytest.raises(OSError, match="No space left") as caught:
        fail()
    # The error names the file that was asked for, not the temporary one beside it.
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_and_links_stay(tmp_path):
    target, link = tmp_path / "file.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write(pipe)
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_missing_folder_is_named_by_the_path_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "nowhere" / "file.txt")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file.txt")


def test_tensors_can_be_read_by_whoever_may_read_new_files(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
