"""Google Drive, offered and never demanded: every outcome is a status with its reason, none is an error."""

import os
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path

MOUNT_POINT = Path("/content/drive")
MOUNT_TIMEOUT_MS = 120_000


@dataclass(frozen=True)
class DriveStatus:
    """A folder on Drive that was just written to, or the reason why there is none."""

    path: Path | None
    """The folder, None when Drive is not to be used."""
    reason: str
    """What happened, in a sentence."""

    def __bool__(self) -> bool:
        """Return whether there is a folder."""
        return self.path is not None

    def to_dict(self) -> dict[str, str | None]:
        """Return the status as plain values."""
        return {"path": str(self.path) if self.path else None, "reason": self.reason}

    def _repr_html_(self) -> str:
        """Return the status for a notebook."""
        return f"<p>{escape(self.reason)}</p>"


def drive_folder(mount: bool = False, name: str = "Seedbed", mount_point: Path = MOUNT_POINT) -> DriveStatus:
    """Return a folder on the user's Drive if there is one to be had.

    Args:
        mount: Ask Colab to mount Drive, which opens a dialog that a person must answer. Left at False, Drive is used
            only where it is mounted already.
        name: The folder's name under "My Drive"; it is made when missing.
        mount_point: Where Colab mounts Drive.
    """
    mount_point = Path(mount_point)
    if not (mount_point / "MyDrive").is_dir():
        if not mount:
            return DriveStatus(None, "Google Drive is not mounted; results stay on this machine's disk.")
        if failure := _mount(mount_point):
            return DriveStatus(None, f"{failure} Results stay on this machine's disk.")
    folder = mount_point / "MyDrive" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"seedbed")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return DriveStatus(
            None,
            f"Google Drive is mounted but cannot be written ({error.strerror}). Results stay on this machine's disk.",
        )
    return DriveStatus(folder, f"Results are copied to {folder} on Google Drive.")


def _mount(mount_point: Path) -> str:
    """Mount Drive; return what went wrong, or an empty string."""
    try:
        from google.colab import drive
    except ImportError:
        return "This is not Colab, so there is no Google Drive to mount."
    try:
        drive.mount(str(mount_point), timeout_ms=MOUNT_TIMEOUT_MS)
    except Exception as error:  # whatever Colab raises, training goes on without Drive
        detail = " ".join(str(error).split())[:200]
        return f"Google Drive was not mounted ({type(error).__name__}{': ' + detail if detail else ''})."
    if not (mount_point / "MyDrive").is_dir():
        return "Google Drive was mounted, but its folder MyDrive is not there."
    return ""
