"""``python -m register_adapter`` is the command ``register-adapter``."""

from .commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
