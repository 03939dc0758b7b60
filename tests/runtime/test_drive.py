"""Drive is offered: whatever goes wrong becomes a reason, and nothing is mounted unasked."""

import pytest

from utils.runtime.drive import DriveStatus, drive_folder


class MessageError(Exception):
    """What Colab raises when the dialog was closed."""


def forbidden(*args, **kwargs):
    raise AssertionError("mounted unasked")


def test_without_being_asked_nothing_is_mounted(colab, tmp_path):
    colab.drive.mount = forbidden
    status = drive_folder(mount_point=tmp_path / "drive")
    assert status == DriveStatus(None, "Google Drive is not mounted; results stay on this machine's disk.")
    assert not status


def test_a_drive_that_is_mounted_already_is_used(colab, tmp_path):
    colab.drive.mount = forbidden
    (tmp_path / "MyDrive").mkdir()
    status = drive_folder(name="Runs", mount_point=tmp_path)
    assert status.path == tmp_path / "MyDrive" / "Runs"
    assert status.path.is_dir()
    assert list(status.path.iterdir()) == []
    assert status.reason == f"Results are copied to {status.path} on Google Drive."


def test_asked_for_it_is_mounted(colab, tmp_path):
    def mount(point, timeout_ms):
        assert timeout_ms > 0
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)

    colab.drive.mount = mount
    assert drive_folder(mount=True, mount_point=tmp_path / "drive").path.is_dir()


def test_off_colab_it_says_so(tmp_path):
    status = drive_folder(mount=True, mount_point=tmp_path)
    assert status.reason.startswith("This is not Colab, so there is no Google Drive to mount.")
    assert status.to_dict() == {"path": None, "reason": status.reason}


@pytest.mark.parametrize(
    "error",
    [
        MessageError("Error: credential propagation was unsuccessful"),
        ValueError("mount failed"),
        ValueError("Mountpoint must not already contain files"),
        TimeoutError(),
        OSError(107, "Transport endpoint is not connected"),
    ],
)
def test_every_failure_to_mount_is_a_reason(colab, tmp_path, error):
    def mount(point, timeout_ms):
        raise error

    colab.drive.mount = mount
    status = drive_folder(mount=True, mount_point=tmp_path)
    assert status.path is None
    assert f"Google Drive was not mounted ({type(error).__name__}" in status.reason
    assert str(error) in status.reason
    assert "Results stay on this machine's disk." in status.reason


def test_a_mount_without_my_drive_is_a_reason(colab, tmp_path):
    colab.drive.mount = lambda point, timeout_ms: None
    assert "its folder MyDrive is not there" in drive_folder(mount=True, mount_point=tmp_path).reason


def test_a_drive_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "MyDrive").mkdir()
    (tmp_path / "MyDrive" / "Seedbed").write_text("a file where the folder should be")
    status = drive_folder(mount_point=tmp_path)
    assert status.path is None
    assert "mounted but cannot be written (File exists)" in status.reason


def test_the_reason_is_escaped_in_html():
    assert DriveStatus(None, "a < b")._repr_html_() == "<p>a &lt; b</p>"
