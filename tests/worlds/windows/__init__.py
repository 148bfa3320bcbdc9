"""Guests made of bytes: Windows."""

from tests.worlds.windows.machine import FAMILIES, Machine

__all__ = ["FAMILIES", "Machine"]
