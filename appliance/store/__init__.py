"""The book: every verdict of this host, in one SQLite file with one writer."""
