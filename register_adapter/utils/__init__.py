"""What every package uses: files on the Hub, adapter files, and the environment that a result was made in."""

from .environment import git_commit, hardware, machine, version, versions
from .hub import HubAccessError

__all__ = ["HubAccessError", "git_commit", "hardware", "machine", "version", "versions"]
