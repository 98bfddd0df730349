"""Packages that only some uses need: those of the extras."""

from __future__ import annotations

from importlib import import_module


def require(module: str, extra: str) -> None:
    """Raises an ImportError that says what to install if a module of an extra is missing."""
    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'personvit-hf[{extra}]'.") from error
