"""The packet eye: frames from a guest's port or from a capture file."""
