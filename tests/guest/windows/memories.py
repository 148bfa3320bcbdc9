"""Memories of guests that tell of how they are read."""


class CountingMemory:
    """Counts the reads of a memory."""

    def __init__(self, inner):
        self.inner, self.reads = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, gpa, size):
        self.reads += 1
        return self.inner.read(gpa, size)

    def readv(self, spans):
        self.reads += 1
        return self.inner.readv(spans)
