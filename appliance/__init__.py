"""Parasight: binds every connection of a virtual machine to the guest process that owns it."""

__version__ = "0.1.0"
