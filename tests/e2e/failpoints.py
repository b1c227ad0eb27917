"""Failpoints of processes that a test starts (base/failpoint.h): armed, released and counted through files of one folder."""

import pathlib


class Failpoints:
    def __init__(self, folder: pathlib.Path, monkeypatch=None):
        folder.mkdir()
        self.folder = folder
        self.environment = {"PEWTER_FAILPOINTS_DIR": str(folder)}
        if monkeypatch is not None:
            monkeypatch.setenv("PEWTER_FAILPOINTS_DIR", str(folder))

    def arm(self, *actions):
        """What counts from now on, in all processes: "before_commit=kill@2"; nothing disarms all."""
        new = self.folder / "armed.new"
        new.write_text(",".join(actions))
        new.rename(self.folder / "armed")

    def release(self, name):
        """Lets those go on that pause there, now and later."""
        (self.folder / f"go.{name}").touch()

    def hits(self, name):
        path = self.folder / f"hits.{name}"
        return path.stat().st_size if path.exists() else 0
