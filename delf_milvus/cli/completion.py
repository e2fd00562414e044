"""What a shell offers for the values of options, on top of the options themselves."""

from __future__ import annotations


def presets(incomplete: str) -> list[str]:
    """The presets that start so."""
    # Not read from the settings: pydantic takes longer to load than anybody waits for a key.
    return [name for name in ("fast", "standard", "paper") if name.startswith(incomplete)]


def modes(incomplete: str) -> list[str]:
    """The modes of matching that start so."""
    return [name for name in ("full", "hits") if name.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """The formats of feature files that start so."""
    return [name for name in ("npz", "delf", "hloc") if name.startswith(incomplete)]
