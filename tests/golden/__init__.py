"""Parity with numbers of released code; one file a mechanism, one folder of numbers a set."""
