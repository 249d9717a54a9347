"""The league: every router and kind of expert, trained side by side and laid out in one table.

All entries have the same active parameters per token, the same rows in the same order, the same number of tokens, the
same optimiser, and at least three seeds in a full league. An entry is one line of `ENTRIES`; one from outside the
package is the same line in a file of its own (`moestro league --with FILE`).
"""

from moestro.evidence.league.entries import ENTRIES, MEASURES
from moestro.evidence.league.tasks import TASKS, Task

__all__ = ["ENTRIES", "MEASURES", "TASKS", "Task"]
