"""Linux guests: facts, processes, sockets, the O(1) lookup, and what in a process is foreign."""
