"""The kinds of gold, a module each: how a gold of the kind is read, and how an answer is held against it.

A reader takes a gold in normal spelling and gives what it read, or None if the gold is of another kind. A comparison
takes that, the answer, and `same`, which compares parts of the two by their own kinds.
"""

from collections.abc import Callable

Same = Callable[[str, str], bool]
