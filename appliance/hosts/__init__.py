"""Which guests run here, which ports they have, by which route their memory can be read."""
