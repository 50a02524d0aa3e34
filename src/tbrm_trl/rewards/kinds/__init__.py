"""The kinds of gold, each with functions to read a gold and to compare an answer with it.

A reader takes a gold in normal spelling and returns what it read, or None if the gold is of another kind. A comparison
takes that, the answer, and `same`, which compares parts of the two by the parts' own kinds.
"""

from collections.abc import Callable

Same = Callable[[str, str], bool]
