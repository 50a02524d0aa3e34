"""Checks by subject, which refuse a run or warn of it before it costs anything."""
