"""Bytes to processes and sockets. Every walk is bounded."""
