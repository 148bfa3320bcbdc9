"""The memory eye: guest-physical bytes and nothing more."""
