"""Frames to flows: decoding, the flow table (the record queue) and the DNS names seen."""
